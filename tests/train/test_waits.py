"""Where the host waits for the device: nowhere in a sampling loop, and once per role in a training step.

On a CPU nothing waits, so weights, latents and text stand for a device: what is computed from them is on it,
and reading it, or asking how many elements a mask has, is a wait.
"""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.experts import ExpertScale
from anyflow_cli.flow.samplers import SAMPLERS, expert_consistency
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.chunk_sampling import Guidance, sample_chunks
from anyflow_cli.model.experts import ExpertPair, bind
from anyflow_cli.model.rotary import rotation
from anyflow_cli.sample.unipc import sample_unipc
from tests.train.small import BOUNDARY, LATENT, NEGATIVE, Kind, RandomData, backbone, network, trainer

WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
         torch.ops.aten.masked_select)  # fmt: skip
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)


class DeviceWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that would wait for the device of ``tensors``, and copies of whole tensors."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits, self.joined = Counter[str](), 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        on_device = any(self.holds(tensor) for tensor in inputs)
        out, operator = func(*args, **(kwargs or {})), func._overloadpacket
        if on_device:
            masked = operator in INDEXED and any(
                index is not None and index.dtype == torch.bool and self.holds(index) for index in args[1]
            )
            if operator in WAITS or masked:
                self.waits[str(operator)] += 1
            if operator is torch.ops.aten.cat:
                self.joined += out.numel()
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._add(leaf)
        return out

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))


class Reads(TorchFunctionMode):
    """Counts reads of tensors that a watch holds, which are no operators."""

    def __init__(self, watch: DeviceWatch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.watch.holds(args[0]):
            self.watch.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def conditions(network: Any) -> tuple[Velocity, Velocity]:
    text = torch.randn(2, *NEGATIVE.shape, generator=torch.Generator().manual_seed(3))
    return bind(network, Condition(text)), bind(network, Condition(torch.zeros_like(text)))


def solve(method: str, model: Velocity, z: Tensor, steps: int) -> Tensor:
    if method == "unipc":
        return sample_unipc(model, z, steps, 5.0)
    generator = torch.Generator().manual_seed(0)
    if method == "expert-consistency":
        return expert_consistency(model, z, grid(steps, 5.0), generator, BOUNDARY)
    return SAMPLERS[method](model, z, grid(steps, 5.0), generator)


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("method", [*SAMPLERS, "unipc", "expert-consistency"])
def test_a_guided_sampling_waits_for_nothing_and_joins_the_text_s_keys_once(
    method: str, experts: int
) -> None:
    net = network().requires_grad_(False)
    if experts == 2:
        net = ExpertPair(net, network(1).requires_grad_(False), BOUNDARY)
    scale = 3.0 if experts == 1 else ExpertScale(4.0, 3.0, BOUNDARY)
    model = guided(*conditions(net), scale)
    z, joined = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(5)), []
    solve(method, model, z, 4)  # text keys, rotations, layouts
    remade = rotation.cache_info().misses
    for steps in (1, 3):
        watch = DeviceWatch([*net.parameters(), z])
        with watch, Reads(watch):
            solve(method, model, z, steps)
        assert not watch.waits
        joined.append(watch.joined)
    assert joined[1] <= 3 * joined[0] <= 3 * 2.5 * experts * z.numel()  # only states and times
    assert rotation.cache_info().misses == remade


def test_a_causal_sampling_waits_for_nothing() -> None:
    net = backbone("causal-flow-map").network_of("student").requires_grad_(False)
    cond, null = conditions(net)
    z = torch.randn(2, *LATENT, generator=torch.Generator().manual_seed(5))
    watch = DeviceWatch([*net.parameters(), z])
    with watch, Reads(watch):
        list(
            sample_chunks(
                cond, z, (1, 1, 1), SAMPLERS["flow-map"], [grid(2, 5.0)], guidance=Guidance(null, 2.0)
            )
        )
    assert not watch.waits


@pytest.mark.parametrize(
    "kind", ["flow-map", "flow-matching", "on-policy", "causal-flow-map", "causal-on-policy"]
)
def test_a_training_step_reads_one_tensor_per_role(tmp_path: Path, kind: Kind) -> None:
    run = trainer(tmp_path, kind, lora=True, micro_batch=2)
    source = RandomData(4)
    batches = source.stream(0)
    run.step = 1
    run.train_step(next(batches))
    run.step = 2
    batch = next(batches)
    watch = DeviceWatch([*run.backbone.parameters(), batch.latents, batch.condition.text])
    with watch, Reads(watch):
        run.train_step(batch)
        run.ema.update(2)
    assert dict(watch.waits) == {"tolist": len(run.optimizers)}


def test_the_watch_detects_waits() -> None:
    x = torch.ones(3)
    watch = DeviceWatch([x])
    with watch, Reads(watch):
        y = 2 * x
        (y > 1).nonzero()
        float(y.sum())
        y.tolist()
        y[y > 1]
        torch.ones(3).tolist()
    assert sum(watch.waits.values()) == 4
