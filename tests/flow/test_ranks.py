"""Means over ranks: loss and gradient of four processes equal those of one with the full batch."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from anyflow_cli.flow.losses import GlobalMean, flow_map_loss, local_mean
from anyflow_cli.flow.times import TimeRatios, loss_weight, sample_times
from tests.flow.gaussian import SHAPE, Bent, Gaussian, normal

B = 8
MEAN = normal(0, B, *SHAPE)
X, EPS = normal(1, B, *SHAPE), normal(2, B, *SHAPE)
TIMES = sample_times(B, 5.0, TimeRatios(), torch.Generator().manual_seed(0))
# In order of their kind, so that the first ranks hold boundary samples only and the last ones none
T, R = (time.double()[(TIMES[0] > TIMES[1]).long().argsort()] for time in TIMES)


def loss_and_gradient(share: slice, global_mean: GlobalMean) -> tuple[Tensor, Tensor]:
    """Loss of Alg. 1 on a slice of the batch, and its gradient on the parameter of a wrong student."""
    parameter = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    model = Bent(Gaussian(MEAN[share]), lambda u, z, t, r: u(z, t, r) + parameter * z)
    loss = flow_map_loss(
        model, model, X[share], EPS[share], T[share], R[share],
        weight=loss_weight("beta", 5.0), global_mean=global_mean,
    ).loss  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, parameter)[0]


def share_of(rank: int, ranks: int) -> slice:
    return slice(rank * B // ranks, (rank + 1) * B // ranks)


@dataclass
class Meeting:
    """Ranks as threads: a mean waits for the values of all."""

    ranks: int
    barrier: threading.Barrier = field(init=False)
    brought: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks, timeout=30)

    def mean_of(self, rank: int) -> GlobalMean:
        def mean(values: Tensor, mask: Tensor, name: str = "boundary") -> Tensor:
            self.brought[rank] = values, mask
            self.barrier.wait()
            parts = list(self.brought.values())
            self.barrier.wait()
            return local_mean(
                torch.cat([values for values, _ in parts]), torch.cat([mask for _, mask in parts])
            )

        return mean

    def run(self) -> list[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(self.ranks) as pool:
            work = [
                pool.submit(loss_and_gradient, share_of(rank, self.ranks), self.mean_of(rank))
                for rank in range(self.ranks)
            ]
            return [part.result() for part in work]


def check_equal_to_one_process(losses: Tensor, gradients: Tensor) -> None:
    """Loss and gradient of each rank (ranks,), averaged as a trainer averages gradients."""
    whole, gradient = loss_and_gradient(slice(None), local_mean)
    torch.testing.assert_close(losses.mean(), whole)
    torch.testing.assert_close(gradients.mean(), gradient)


def test_four_ranks_equal_one() -> None:
    losses, gradients = zip(*Meeting(4).run(), strict=True)
    check_equal_to_one_process(torch.stack(losses), torch.stack(gradients))


def test_ranks_without_the_reduction_differ() -> None:
    """Without the reduction each rank scales its losses differently, or not at all."""
    losses, gradients = zip(*(loss_and_gradient(share_of(r, 4), local_mean) for r in range(4)), strict=True)
    whole, gradient = loss_and_gradient(slice(None), local_mean)
    assert abs(torch.stack(losses).mean() / whole - 1) > 0.05
    assert abs(torch.stack(gradients).mean() / gradient - 1) > 0.05


def mean_over_processes(values: Tensor, mask: Tensor, name: str = "boundary") -> Tensor:
    """Sum and count over the process group; 0 / 0 is the NaN that the contract asks for."""
    sums = torch.stack([values[mask].sum(), mask.sum().to(values.dtype)])
    dist.all_reduce(sums)
    return sums[0] / sums[1]


def work(rank: int, ranks: int, folder: str) -> None:
    """One process of the next test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    numbers = loss_and_gradient(share_of(rank, ranks), mean_over_processes)
    torch.save(torch.stack(numbers), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_process_group_equals_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call, attr-defined]
    check_equal_to_one_process(
        *torch.stack([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)], dim=1)
    )
