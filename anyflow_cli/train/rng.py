"""All random numbers of a training step, as a function of (seed, step, name of the stream).

No generator lives longer than a step, so a run that resumes at any step draws the same numbers as an
undisturbed one. Everything is drawn for the whole global batch and then cut, so the numbers depend neither on
the number of processes nor on the micro-batch.

Positions: the samples of a global batch are numbered 0..N-1. Of K processes, process k has k, k+K, k+2K, ...
Its micro-batches are consecutive pieces of these, so the m-th micro-batches of all processes together are a
consecutive piece of the global batch. Objectives put boundary samples first, which makes the mean of Eq. 7
exact under gradient accumulation: see ``BoundaryMean``.

Legend: N global batch, B micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyflow_cli.flow.noise import batch_noise

Reduce = Callable[[Tensor], Tensor]
GENERATOR_BITS = 0xFFFFFFFF  # of a seed, which torch's CPU generator reads


def stream_seed(*parts: object) -> int:
    """Hash printable parts to a 63-bit seed, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BoundaryMean:
    """Mean over samples of the global batch (Eq. 7), exact with accumulation and over processes.

    Boundary samples come first in the global batch, and the m-th micro-batches of all processes are a
    consecutive piece of it. So when the first other sample needs the mean, every boundary sample has had its
    forward pass on some process, and a running sum, reduced over processes in each micro-batch, is complete.
    Use one object per phase, term and step.
    """

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self._totals: dict[str, Tensor] = {}

    def __call__(self, values: Tensor, mask: Tensor, name: str = "boundary") -> Tensor:
        """Mean of values (B,) where mask (B,) is true, over this step so far; NaN if it never was.

        Means of other names than ``boundary`` are of the micro-batches so far.
        """
        chosen = values.double().where(mask, 0)  # selecting by the mask would wait for the device
        found = self._reduce(torch.stack([chosen.sum(), mask.sum().double()]))
        total = self._totals[name] = self._totals.get(name, 0.0) + found
        return (total[0] / total[1]).to(values.dtype)


@dataclass(frozen=True)
class StepRng:
    """The random numbers of one micro-batch."""

    seed: int
    step: int
    count: int  # N
    positions: tuple[int, ...]  # of the micro-batch in the global batch
    global_mean: BoundaryMean = field(default_factory=lambda: BoundaryMean(lambda values: values))

    def generator(self, stream: str) -> torch.Generator:
        """A generator that is the same on every process, for numbers that are shared or cut by ``local``."""
        return torch.Generator().manual_seed(stream_seed(self.seed, self.step, stream) & GENERATOR_BITS)

    def local(self, values: Tensor) -> Tensor:
        """Cut values of the global batch (N, ...) to the micro-batch (B, ...)."""
        return values[list(self.positions)]

    def generators(self, stream: str) -> list[torch.Generator]:
        """One generator per sample, B in all, for a callee that draws by itself."""
        return [torch.Generator().manual_seed(seed) for seed in self._seeds(stream)]

    def noise(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal noise (B, *shape), from one generator per sample."""
        return batch_noise(self._seeds(stream), shape)

    def _seeds(self, stream: str) -> list[int]:
        seeds = [stream_seed(self.seed, self.step, stream, position) for position in self.positions]
        return [seed & GENERATOR_BITS for seed in seeds]


def micro_positions(count: int, micro_batch: int | None, rank: int, ranks: int) -> list[tuple[int, ...]]:
    """Positions in a global batch of ``count`` of each micro-batch of a rank; None: its whole share."""
    own = tuple(range(rank, count, ranks))
    size = micro_batch or len(own)
    return [own[start : start + size] for start in range(0, len(own), size)]
