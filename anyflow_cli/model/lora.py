"""LoRA adapters of one network: peft's layers, with a switch between them that affects the forward only.

peft's ``set_adapter`` also changes ``requires_grad``, so that evaluating another adapter would freeze the one
in training. And a checkpointed block is recomputed in the backward pass, when another adapter may be active:
here the recomputation runs under the adapter of its forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_cli.model.network import FlowMapTransformer

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
        network.checkpoint_contexts = lambda: (nullcontext(), self.use(self.active))

    def add(self, name: str, size: LoraSize, *, adapt_times: bool) -> None:
        """Add an adapter that changes nothing yet, to self-attention, feed-forward and time embedders."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = f"({BLOCKS}|{TIMES})" if adapt_times else BLOCKS
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

    @torch.no_grad()
    def merged(self, weights: Mapping[str, Tensor], name: str | None) -> dict[str, Tensor]:
        """Plain state dict of the network, with the adapter, if any, added in fp32."""
        plain = {
            key.replace(".base_layer.", "."): value for key, value in weights.items() if ".lora_" not in key
        }
        for path, layer in self._layers:
            if name in layer.lora_A:
                base = plain[f"{path}.weight"]
                plain[f"{path}.weight"] = base.float() + layer.get_delta_weight(name).float()
        return plain


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
