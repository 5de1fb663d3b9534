"""Tensors of files under the names of a module, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from anyflow_cli.model.layouts.quantized import dequantized, scale_names
from anyflow_cli.model.layouts.tensor_files import PICKLE_SUFFIXES, QUANTIZED_TYPES, TYPES, TensorFiles
from anyflow_cli.model.weights_io import LazyWeight, TensorInfo, check_finite


@dataclass(frozen=True)
class NamedWeights:
    """Tensors under the names of a module of ours.

    Attributes:
        files: Where they are.
        stored_names: Our name of each tensor with its name in the files.
        naming: How the names are written, in words.
        reshaped: Shapes of tensors that are stored with the same values in another shape.
        added: What is added to a tensor when it is read.
        parts: Tensors that are one of N equal parts of a stored one along its first axis, as (which, N).
    """

    files: TensorFiles
    stored_names: Mapping[str, str]
    naming: str
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    added: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scales: Mapping[str, str] = field(init=False)  # stored name of a weight -> stored name of its scale

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", scale_names(self.files))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the module, by name."""
        return {name: self.shape(name) for name in self.stored_names}

    @property
    def layout(self) -> str:
        """Names and quantization in words."""
        quantized = sorted({self.stored(name).dtype for name in self.stored_names} & QUANTIZED_TYPES.keys())
        scaled = "scaled" if self.scales else "plain"
        return ", ".join([self.naming, *(f"{scaled} {dtype}" for dtype in quantized)])

    def stored(self, name: str) -> TensorInfo:
        """Description of a tensor in its file."""
        return self.files.tensors[self.stored_names[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor in the module."""
        shape = self.reshaped.get(name, self.stored(name).shape)
        return (shape[0] // self.parts[name][1], *shape[1:]) if name in self.parts else shape

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor as stored; bf16 where it is quantized."""
        stored = self.stored(name).dtype
        return torch.bfloat16 if stored in QUANTIZED_TYPES else TYPES[stored]

    def read(self, name: str) -> Tensor:
        """Load one tensor; quantized ones become fp32.

        Raises:
            UsageError: A value is NaN or infinite.
        """
        stored = self.stored_names[name]
        scale = self.scales.get(stored)
        weight = dequantized(self.files.read(stored), None if scale is None else self.files.read(scale))
        check_finite({name: weight}, str(self.stored(name).file))
        if name in self.parts:
            which, count = self.parts[name]
            weight = weight.chunk(count)[which]
        if name in self.added:
            weight = (weight.float() + self.added[name]()).to(weight.dtype)
        return weight.reshape(self.shape(name))

    def lazy(self) -> dict[str, LazyWeight]:
        """Every tensor, to be read when it is used."""
        return {
            name: LazyWeight(
                torch.Size(self.shape(name)),
                self.dtype(name),
                partial(self.read, name),
                is_view=self.stored(name).file.suffix in PICKLE_SUFFIXES,
            )
            for name in self.stored_names
        }
