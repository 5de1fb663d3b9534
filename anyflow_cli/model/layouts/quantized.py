"""Weights stored as fp8 or int8, with or without scales.

Plain fp8 is only cast. Scaled weights are ``W = X.weight * scale``, with the scale under one of these names:

``X.scale_weight``  ComfyUI until 2025, one number per tensor, with a marker ``scaled_fp8``
``X.weight_scale``  LightX2V, one number per output row, fp8 or int8
``X.weight_scale``  newer ComfyUI, with the format as JSON in ``X.comfy_quant`` or the file's metadata

The scales of activations (``X.scale_input``, ``X.input_scale``) serve fp8 arithmetic, which is not used here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.tensor_files import QUANTIZED_TYPES, TensorFiles

SCALES = ("scale_weight", "weight_scale")
UNUSED = ("scale_input", "input_scale", "comfy_quant")
SCALED_MARKER = "scaled_fp8"
SCALED_FORMATS = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
FORMAT_KEYS = {"format", "full_precision_matrix_mult"}


def is_quantization(name: str) -> bool:
    """Whether a tensor only serves the quantization of another one."""
    last = name.rpartition(".")[2]
    return last in SCALES or last in UNUSED or last == SCALED_MARKER


def scale_names(files: TensorFiles) -> dict[str, str]:
    """The name of each scaled weight with the name of its scale.

    Raises:
        UsageError: A format cannot be undone by a multiplication.
    """
    for layer, settings in _formats(files):
        unknown = settings.keys() - FORMAT_KEYS
        if settings.get("format") not in SCALED_FORMATS or unknown:
            shown = " with ".join([str(settings.get("format")), *sorted(unknown)])
            raise UsageError(
                f"{files.files[0]} stores {layer} as {shown}, which anyflow cannot read.",
                "Use the file in bf16, fp16 or fp8.",
            )
    found = {}
    for name in files.tensors:
        layer, _, last = name.rpartition(".")
        if last in SCALES:
            found[f"{layer}.weight"] = name
    return found


def _formats(files: TensorFiles) -> Iterator[tuple[str, Mapping[str, Any]]]:
    listed = files.metadata.get("_quantization_metadata")
    if listed is not None:
        yield from json.loads(listed).get("layers", {}).items()
    for name in files.tensors:
        if name.endswith(".comfy_quant"):
            yield name.removesuffix(".comfy_quant"), json.loads(bytes(files.read(name).tolist()))


def dequantized(weight: Tensor, scale: Tensor | None) -> Tensor:
    """The weight as fp32 if it is quantized, else unchanged. A scale per row may have one axis or two."""
    if scale is None:
        return weight.float() if weight.dtype in QUANTIZED_TYPES.values() else weight
    factor = scale.float()
    if factor.numel() > 1:
        factor = factor.reshape(-1, *[1] * (weight.dim() - 1))
    return weight.float() * factor
