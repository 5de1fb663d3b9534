"""LoRA adapters of one network: peft's layers, with a switch between them that affects the forward only.

peft's ``set_adapter`` also changes ``requires_grad``, so that evaluating another adapter would freeze the one
in training. And a checkpointed block is recomputed in the backward pass, when another adapter may be active:
here the recomputation runs under the adapter of its forward.

``MergedNetwork`` is the plain network that an adapter makes of its base.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.model.experts import networks_of
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.weights_io import LazyWeight, listed, shown

BLOCKS = r"blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
TIMES = r"condition_embedder\.((time|delta)_embedder\.linear_[12]|delta_proj)"


@dataclass(frozen=True)
class LoraSize:
    """Rank and alpha of LoRA adapters; their output is scaled by ``alpha / rank``."""

    rank: int
    alpha: float


class LoraAdapters:
    """Named LoRA adapters of one network; at most one is active, none at first. They are added frozen.

    Their weights are fp32: run them under autocast on a base of another type.
    """

    def __init__(self, network: FlowMapTransformer) -> None:
        self.network = network.requires_grad_(False)
        self.active: str | None = None
        self._layers: list[tuple[str, Any]] = []
        for one in networks_of(network):
            one.checkpoint_contexts = lambda: (nullcontext(), self.use(self.active))

    def add(self, name: str, size: LoraSize, *, adapt_times: bool, expert: str = "both") -> None:
        """Add an adapter that changes nothing yet, to self-attention, feed-forward and time embedders.

        Of a network with two experts: to both, or to one.
        """
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        within = "(high|low)" if expert == "both" else expert
        prefix = "" if self.network.config.boundary is None else rf"{within}\."
        targets = rf"{prefix}({BLOCKS}|{TIMES})" if adapt_times else prefix + BLOCKS
        config = LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several on purpose
            inject_adapter_in_model(config, self.network, adapter_name=name)
        modules = self.network.named_modules()
        self._layers = [(path, module) for path, module in modules if isinstance(module, LoraLayer)]
        for _, layer in self._layers:
            # else each layer saves its own copy of the input for backward, though autocast undoes the cast
            layer.cast_input_dtype_enabled = False
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.float()  # peft uses the base's type
        self.network.requires_grad_(False)
        self.activate(self.active)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's weights by name, ending in ``.lora_A.weight`` or ``.lora_B.weight``."""
        return {
            f"{path}.lora_{side}.weight": layer[name].weight
            for path, module in self._layers
            for side, layer in (("A", module.lora_A), ("B", module.lora_B))
            if name in layer
        }

    def activate(self, name: str | None) -> None:
        """Choose the adapter of later forwards; None runs the base network."""
        self.active = name
        for _, layer in self._layers:
            layer._active_adapter = [] if name is None else [name]
            layer._disable_adapters = name is None

    def use(self, name: str | None) -> AbstractContextManager[None]:
        """Activate an adapter inside the block; afterwards what was active before."""
        return _ActiveAdapter(self, name)


class _ActiveAdapter:
    """A reentrant switch: a recomputation may enter it more than once."""

    def __init__(self, adapters: LoraAdapters, name: str | None) -> None:
        self._adapters, self._name = adapters, name
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before.append(self._adapters.active)
        self._switch(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._switch(self._before.pop())

    def _switch(self, name: str | None) -> None:
        if name != self._adapters.active:
            self._adapters.activate(name)


class MergedNetwork:
    """A network with trained weights in it, merged tensor by tensor when each is read.

    What was not trained stays as it is stored. Adapters are added in fp32: a small one would
    vanish in the bf16 rounding of a large weight.

    Args:
        base: The network that training started from, as stored.
        trained: Adapter weights (``...lora_A.weight``) and weights that were trained in full, by name.
        size: Rank and alpha of the adapter; None where there is none.

    Raises:
        UsageError: A trained weight has no place in the network, or another shape.
    """

    def __init__(
        self, base: FlowMapTransformer, trained: Mapping[str, Tensor], size: LoraSize | None = None
    ) -> None:
        self.config, self._base = base.config, {k: v.detach() for k, v in base.state_dict().items()}
        self._trained, self._scale = trained, size.alpha / size.rank if size else 0.0
        shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
        for problem in [*self._misfits(shapes), *(adapter_problems(shapes, size.rank) if size else ())]:
            raise UsageError(
                f"The trained weights do not fit the model: {problem}.",
                "Use the model and the recipe that the run was started with.",
            )

    def _misfits(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, shape in shapes.items():
            layer, is_adapter, side = name.rpartition(".lora_")
            stored = self._base.get(f"{layer}.weight" if is_adapter else name)
            wide = {"A.weight": 1, "B.weight": 0}.get(side)  # the side of a pair that is as wide as the layer
            if stored is None or (is_adapter and stored.dim() != 2):
                yield f"{shown(name)} is unexpected"
            elif is_adapter and wide is not None and shape[wide : wide + 1] != stored.shape[wide : wide + 1]:
                yield f"{shown(name)} has shape {shape} beside a weight of shape {tuple(stored.shape)}"
            elif not is_adapter and shape != stored.shape:
                yield f"{shown(name)} has shape {shape} instead of {tuple(stored.shape)}"
        experts = {name.partition(".")[0] for name in shapes} if self.config.boundary is not None else {""}
        wanted = {name for name in self._base if "" in experts or name.partition(".")[0] in experts}
        if not any(".lora_" in name for name in shapes) and (missing := wanted - shapes.keys()):
            yield f"{listed(sorted(missing))} missing"

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name; see ``WeightSource``."""
        return {name: self._weight(name) for name in self._base}

    def _weight(self, name: str) -> LazyWeight:
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_B.weight" in self._trained:
            return LazyWeight(self._base[name].shape, torch.float32, partial(self._merge, layer))
        return LazyWeight.of(self._trained.get(name, self._base[name]).detach())

    @torch.no_grad()
    def _merge(self, layer: str) -> Tensor:
        a, b = (self._trained[f"{layer}.lora_{side}.weight"].float() for side in "AB")
        base = self._base[f"{layer}.weight"].to(a.device)  # one tensor: products are slow on a CPU
        merged: Tensor = base.float() + (b @ a) * self._scale
        return merged


def adapter_problems(shapes: Mapping[str, tuple[int, ...]], rank: int) -> Iterator[str]:
    """In words, what is wrong with the weights of an adapter, by name in ``Backbone.state_dict_of``."""
    if not any(".lora_" in name for name in shapes):
        yield "it holds no LoRA weights"
    for name, shape in shapes.items():
        layer, found, side = name.rpartition(".lora_")
        if not found:
            continue
        other = f"{layer}.lora_{'B' if side.startswith('A') else 'A'}.weight"
        if side not in ("A.weight", "B.weight") or other not in shapes:
            yield f"{shown(name)} is not one of a pair"
        elif len(shape) != 2 or shape[0 if side == "A.weight" else 1] != rank:
            yield f"{shown(name)} has shape {shape}"
