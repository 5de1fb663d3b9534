"""Frozen matrices under adapters in less memory: stored as fp8, int8 or nf4, or in the host's memory.

A stored matrix is cast, or copied to the device, whenever it is read, by torch's parametrizations: what is
read is part of the graph, so that a backward pass finds it, and with checkpointing it lives for its block's
forward, recomputation and backward alone. (The hooks of sampling take a weight away after its forward.)
int8 is torchao's, nf4 that of bitsandbytes; both undo it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anyflow_cli.errors import UsageError
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe.schema import BaseWeights

# Package that a setting needs beyond those that are always installed.
PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes", "8bit": "torchao"}


class ReadOnAccess(nn.Module):
    """Casts a stored matrix to the type of the products, on the device that computes, whenever it is read."""

    def __init__(self, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.dtype, self.device = dtype, device

    def forward(self, stored: Tensor) -> Tensor:
        """The matrix as it is used."""
        return stored.to(self.device or stored.device, self.dtype, non_blocking=True)


def require_package(setting: str) -> None:
    """Refuse a setting whose package is not installed.

    Args:
        setting: A key of ``PACKAGES``; others need none.
    """
    package = PACKAGES.get(setting)
    if package is not None and find_spec(package) is None:
        raise UsageError(f"{setting} weights or states need {package}.", f"Run `pip install {package}`.")


def frozen_matrices(network: FlowMapTransformer) -> Iterator[nn.Linear]:
    """The linear layers of the blocks that do not train, those under adapters included."""
    for name, module in network.named_modules():
        is_base = "blocks." in name and "lora_" not in name
        if is_base and isinstance(module, nn.Linear) and not module.weight.requires_grad:
            yield module


def store_base(network: FlowMapTransformer, weights: BaseWeights) -> None:
    """Store the frozen matrices of a network with adapters in another type.

    On the meta device, where a plan asks for sizes alone, int8 and nf4 count as fp8.
    """
    layers = list(frozen_matrices(network))
    if not all(layer.weight.is_meta for layer in layers):
        require_package(weights)
    for layer in layers:
        dtype = layer.weight.dtype
        if weights == "fp8" or layer.weight.is_meta:
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
            parametrize.register_parametrization(layer, "weight", ReadOnAccess(dtype), unsafe=True)
        elif weights == "int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(layer, Int8WeightOnlyConfig())
        else:
            from bitsandbytes.nn.parametrize import replace_parameter_4bit

            replace_parameter_4bit(layer, "weight", quant_type="nf4")


def keep_base_on_host(network: FlowMapTransformer, device: torch.device) -> None:
    """Move a network to a device, except for the frozen matrices, which are copied there to be used."""
    kept = set[int]()
    for layer in list(frozen_matrices(network)):
        if not parametrize.is_parametrized(layer, "weight"):
            access = ReadOnAccess(layer.weight.dtype, device)
            parametrize.register_parametrization(layer, "weight", access, unsafe=True)
        stack: Any = layer.parametrizations.weight  # type: ignore[union-attr]
        stack[0].device, stored = device, stack.original
        if device.type == "cuda":
            stored.data = stored.data.pin_memory()
        kept.add(id(stored))
    for parameter in network.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(device)
