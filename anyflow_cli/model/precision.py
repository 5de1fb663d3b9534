"""Arithmetic of a machine: the meaning of ``precision: auto``, and autocast.

The choice depends on what the hardware supports, not on a measurement, so that a resumed run decides as
before.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES_OF_PRECISION: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_precision(setting: Literal["auto", "fp32", "bf16"], device: torch.device | str) -> Precision:
    """Resolve ``auto``: bf16 where the device multiplies bf16 matrices natively, else fp32."""
    if setting != "auto":
        return setting
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(precision: Precision, device: torch.device | str, *, keeps_casts: bool = True) -> torch.autocast:
    """Context that runs matrix products in ``precision``; with fp32 it does nothing.

    Args:
        precision: Type of the products.
        device: Device that runs them.
        keeps_casts: Cache cast weights until the context ends. Pass False for sharded weights, of which every
            cast is a full tensor.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keeps_casts)
