"""Which arithmetic a machine should use: the one place that decides what ``precision: auto`` means.

By the hardware's abilities, not by a measurement: a resumed run must decide as the interrupted one did.
"""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def resolve_precision(setting: Literal["auto", "fp32", "bf16"], device: torch.device | str) -> Precision:
    """``auto`` is bf16 where the device multiplies bf16 matrices by itself: a CPU is twice as fast then."""
    if setting != "auto":
        return setting
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(precision: Precision, device: torch.device | str, *, keeps_casts: bool = True) -> torch.autocast:
    """Context that runs matrix products in ``precision``; with fp32 it changes nothing.

    ``keeps_casts``: a weight is cast once; of sharded weights the casts would pile up, each of them whole.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16", cache_enabled=keeps_casts)
