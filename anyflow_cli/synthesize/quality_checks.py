"""Checks of a clip's pixels: the failures of synthesis that would poison a data set.

The limits catch clear failures only (a still camera on a calm lake passes). They were set on the shapes
world, whose least moving scene moves 40 times more pixels than STATIC_CHANGE, and whose darkest has 15 times
more bright values than BLACK. Flicker of a decoder stays below MOVED, so it does not pass for motion.

Legend: T frames, H W height and width in pixels, F latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

STATIC_CHANGE = 0.001  # share of pixels that differ from the first frame by MOVED at any time
MOVED = 0.05
BLACK = 0.002  # share of values brighter than DARK_PIXEL
DARK_PIXEL = 0.1
SATURATED = 0.95  # share of values at either end of the range
RANGE_END = 1.5 / 255


def find_defect(latents: Tensor, video: Tensor) -> str | None:
    """Name the defect of latents (F, C, h, w) and their video (T, 3, H, W) in [0, 1]; None without one."""
    if not (torch.isfinite(latents).all() and torch.isfinite(video).all()):
        return "not finite"
    if (video > DARK_PIXEL).float().mean() < BLACK:
        return "black"
    if ((video < RANGE_END) | (video > 1 - RANGE_END)).float().mean() > SATURATED:
        return "saturated"
    moved = (video - video[:1]).abs().amax((0, 1)) > MOVED  # (H, W)
    if len(video) > 1 and moved.float().mean() < STATIC_CHANGE:
        return "frozen"
    return None
