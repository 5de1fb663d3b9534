"""The LoRA adapters of one network: peft's layers, our own switch between them.

peft's ``set_adapter`` also decides what trains, so that a look at another adapter would freeze the one in
training; and a checkpointed block is recomputed during the backward pass, when another adapter may be active.
Here a switch changes the forward alone, and a recomputation runs under the adapter of its forward.
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

from anyflow_cli.model.network import Contexts, FlowMapTransformer

BLOCKS = r"blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
TIMES = r"condition_embedder\.((time|delta)_embedder\.linear_[12]|delta_proj)"


@dataclass(frozen=True)
class LoraSize:
    """Rank and alpha of the adapters; their output is scaled by ``alpha / rank``."""

    rank: int
    alpha: float


class Adapters:
    """Adapters of ``network`` by name; at most one is active, none at first. They come frozen.

    They are fp32: on a base of another type run them under autocast.
    """

    def __init__(self, network: FlowMapTransformer) -> None:
        self.network = network.requires_grad_(False)
        self.active: str | None = None
        self._layers: list[tuple[str, Any]] = []
        network.checkpoint_contexts = self._checkpoint_contexts

    def add(self, name: str, size: LoraSize, *, adapt_times: bool) -> None:
        """Add one that changes nothing yet, to self-attention, feed-forward and, if asked, time embedders."""
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        targets = f"({BLOCKS}|{TIMES})" if adapt_times else BLOCKS
        config = LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
            inject_adapter_in_model(config, self.network, adapter_name=name)
        modules = self.network.named_modules()
        self._layers = [(path, module) for path, module in modules if isinstance(module, LoraLayer)]
        for _, layer in self._layers:
            # else each keeps an input of its own for its backward pass, though autocast undoes the cast
            layer.cast_input_dtype_enabled = False
        for parameter in self.parameters(name).values():
            parameter.data = parameter.data.float()  # peft gives it the base's type
        self.network.requires_grad_(False)
        self.activate(self.active)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's weights under the network's names and ``.lora_A.weight`` or ``.lora_B.weight``."""
        return {
            f"{path}.lora_{side}.weight": layer[name].weight
            for path, module in self._layers
            for side, layer in (("A", module.lora_A), ("B", module.lora_B))
            if name in layer
        }

    def activate(self, name: str | None) -> None:
        """Choose the adapter of the forwards to come; None: the network without adapters."""
        self.active = name
        for _, layer in self._layers:
            layer._active_adapter = [] if name is None else [name]
            layer._disable_adapters = name is None

    def under(self, name: str | None) -> AbstractContextManager[None]:
        """Run the network with this adapter inside the block, then with what was active before."""
        return _Under(self, name)

    def _checkpoint_contexts(self) -> Contexts:
        """Around a checkpointed block: nothing in the forward, its adapter in the recomputation."""
        return nullcontext(), _Under(self, self.active)

    @torch.no_grad()
    def merged(self, weights: Mapping[str, Tensor], name: str | None) -> dict[str, Tensor]:
        """Weights of the network as a plain state dict; the adapter, if any, has been added in fp32."""
        plain = {
            key.replace(".base_layer.", "."): value for key, value in weights.items() if ".lora_" not in key
        }
        for path, layer in self._layers:
            if name in layer.lora_A:
                base = plain[f"{path}.weight"]
                plain[f"{path}.weight"] = base.float() + layer.get_delta_weight(name).float()
        return plain


class _Under:
    """A switch that can be entered again: a recomputation may run more than once."""

    def __init__(self, adapters: Adapters, name: str | None) -> None:
        self._adapters = adapters
        self._name = name
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
