"""Decomposition of a clip into background, moving shape and white dots, with a share for each pixel.

Edges are antialiased, so each pixel is a mixture of three colors: background, shape and white. Solving for
the shares gives sub-pixel masks, and the residual of the mixture is a defect. The colors of background and
shape are estimated from the clip, so a wrong tint does not appear in every pixel.

Legend: T frames, H W height and width, K foreground pixels of all frames; colors are RGB, 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import BACKGROUNDS, DOT_COLOR, RGB, Rgb, RgbPixels
from anyflow_cli.evaluate.shapes.components import Floats

Labels = NDArray[np.uint8]

FOREGROUND = 16.0  # distance from the background color from which a pixel counts as foreground
CORE = 0.9  # fraction of the largest shape shares above which a pixel is inside the shape

PALETTE = {**BACKGROUNDS, **RGB, "white": DOT_COLOR}
PALETTE_NAMES = tuple(PALETTE)
PALETTE_RGB = np.array(list(PALETTE.values()), np.float32)


def rgb_array(color: Rgb) -> Floats:
    """Convert a color of the world to an array (3,)."""
    return np.array(color, np.float32)


WHITE = rgb_array(DOT_COLOR)


@dataclass(frozen=True)
class Mixture:
    """Shares of shape, white and residual, each (T, H, W), and the two estimated colors."""

    labels: Labels  # nearest palette color of each pixel, index into PALETTE_NAMES
    shape: Floats
    white: Floats
    unexplained: Floats
    background: str
    background_rgb: Floats
    color: str | None  # None where only background and white were found
    color_rgb: Floats


def unmix(video: RgbPixels, labels: Labels) -> Mixture:
    """Decompose a clip (T, H, W, 3) with the nearest palette color of each pixel (T, H, W)."""
    counts = np.bincount(labels.ravel(), minlength=len(PALETTE_NAMES))
    background = max(BACKGROUNDS, key=lambda name: counts[PALETTE_NAMES.index(name)])
    ground = _median_color(video[::4][labels[::4] == PALETTE_NAMES.index(background)])
    pixels = video.reshape(-1, 3)
    distance = sum((pixels[:, c] - ground[c]) ** 2 for c in range(3))  # squared, exact
    where = np.flatnonzero(distance > FOREGROUND**2)
    found = pixels[where] - ground  # (K, 3)
    color = _dominant_color(found, ground)
    rgb = _core_color(found, ground, rgb_array(RGB[color])) if color else ground
    shares = np.zeros((3, len(pixels)), np.float32)
    mixed = _shares(found, rgb - ground, WHITE - ground)
    left = found - mixed[0][:, None] * (rgb - ground) - mixed[1][:, None] * (WHITE - ground)
    shares[:, where] = *mixed, np.sqrt(square_norms(left)) / 255
    shape, white, unexplained = shares.reshape(3, *labels.shape)
    return Mixture(labels, shape, white, unexplained, background, ground, color, rgb)


def nearest_labels(video: RgbPixels) -> Labels:
    """Index into PALETTE_NAMES of the color nearest to each pixel, (T, H, W), at 5 bits per channel."""
    five = (video >> 3).astype(np.uint16)
    return np.asarray(_label_table()[(five[..., 0] << 10) | (five[..., 1] << 5) | five[..., 2]])


@lru_cache(maxsize=1)
def _label_table() -> Labels:
    level = np.arange(32, dtype=np.float32) * 8 + 3.5
    cube = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = ((cube[:, None] - PALETTE_RGB) ** 2).sum(-1)
    return np.asarray(distance.argmin(1), np.uint8)


def square_norms(vectors: Floats) -> Floats:
    """Squared length of each vector (..., 3)."""
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.asarray(x * x + y * y + z * z)


def _median_color(pixels: RgbPixels) -> Floats:
    """Median of each channel of (K, 3), by counting, which is much faster than sorting."""
    if not len(pixels):
        return np.asarray(PALETTE_RGB[0])
    halves = [np.cumsum(np.bincount(pixels[:, c], minlength=256)) for c in range(3)]
    return np.array([np.searchsorted(half, half[-1] / 2) for half in halves], np.float32)


def _dominant_color(contrast: Floats, ground: Floats) -> str | None:
    """The palette color most foreground pixels point to, at any opacity; white is projected out."""
    if not len(contrast):
        return None
    white = (WHITE - ground) / np.linalg.norm(WHITE - ground)
    chroma = contrast - (contrast @ white)[:, None] * white
    strength = np.sqrt(square_norms(chroma))
    towards = np.array(list(RGB.values()), np.float32) - ground
    towards -= (towards @ white)[:, None] * white
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    vote = (chroma @ towards.T).argmax(1)
    votes = np.bincount(vote, np.where(strength > FOREGROUND, strength, 0), minlength=len(RGB))
    return list(RGB)[int(votes.argmax())] if votes.any() else None


def _core_color(contrast: Floats, ground: Floats, color: Floats) -> Floats:
    """Median color inside the shape, which the palette's color locates."""
    share, white = _shares(contrast, color - ground, WHITE - ground)
    if not share.any():
        return color
    core = (share >= CORE * np.quantile(share[share > 0], 0.9)) & (white < 0.2)
    return np.asarray(ground + np.median(contrast[core], axis=0), np.float32) if core.any() else color


def _shares(contrast: Floats, color: Floats, white: Floats) -> tuple[Floats, Floats]:
    """Least-squares shares (K,) of color and white, each in 0..1."""
    axes = np.stack([color, white], axis=1)
    gram = axes.T @ axes + np.eye(2, dtype=np.float32)
    shape_share, white_share = np.linalg.solve(gram, axes.T @ contrast.T)
    alone = contrast @ color / max(float(color @ color), 1.0)
    shape_share = np.where(white_share < 0, alone, shape_share)
    white_share = np.where(shape_share < 0, contrast @ white / (white @ white), white_share)
    return np.clip(shape_share, 0, 1), np.clip(white_share, 0, 1)
