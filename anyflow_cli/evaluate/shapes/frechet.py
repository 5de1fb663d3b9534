"""Fréchet distance between two sets of clips, in a fixed feature space of 64 numbers per clip.

The features describe a clip as a whole, without reference to shapes or prompts, so they also react to defects
that no score covers. In order:

    11  square root of the share of pixels nearest to each palette color
     3  mean of each channel
     8  square root of the share of steps between adjacent pixels in each bin of step size (edge sharpness)
     8  square root of the share of changes over four frames in each bin of size (motion, flicker)
     2  mean absolute change of the frame mean between frames; mean second difference of pixels in time
    16  mean brightness over time in a 4x4 grid
    16  standard deviation of brightness over time in a 4x4 grid

Each is divided by its standard deviation over the reference clips, or by 0.02 if that is larger.

Legend: T frames, H W height and width, N clips, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import WORLDS, RgbPixels, render
from anyflow_cli.evaluate.shapes.components import Floats
from anyflow_cli.evaluate.shapes.unmix import PALETTE_NAMES, nearest_labels

Features = NDArray[np.float64]

BIN_EDGES = np.array([16, 24, 32, 48, 64, 96, 128, 192], np.float32)  # lower edges, in levels
BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)
GRID = 4
FRAME_STRIDE = 4
LEAST_SCALE = 0.02
REFERENCE_CLIPS = 512
REFERENCE_SEED = 2**40  # far from the seeds of prompts and training data


def features(video: RgbPixels) -> tuple[float, ...]:
    """Compute the 64 unscaled features of a clip (T, H, W, 3)."""
    gray = video.astype(np.float32) @ BRIGHTNESS  # (T, H, W)
    labels = nearest_labels(video[::FRAME_STRIDE]).ravel()
    edges = np.abs(np.diff(gray[::FRAME_STRIDE], axis=2)), np.abs(np.diff(gray[::FRAME_STRIDE], axis=1))
    still = gray.mean((1, 2))
    jerk = np.abs(gray[2:] - 2 * gray[1:-1] + gray[:-2]).mean()
    parts = [
        np.sqrt(np.bincount(labels, minlength=len(PALETTE_NAMES)) / len(labels)),
        video[::FRAME_STRIDE].mean((0, 1, 2)) / 255,
        _histogram(np.concatenate([edge.ravel() for edge in edges])),
        _histogram(np.abs(gray[FRAME_STRIDE::FRAME_STRIDE] - gray[:-FRAME_STRIDE:FRAME_STRIDE]).ravel()),
        np.array([np.abs(np.diff(still)).mean(), jerk]) / 255,
        _cells(gray.mean(0)) / 255,
        _cells(gray.std(0)) / 255,
    ]
    return tuple(float(value) for value in np.concatenate(parts))


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Fréchet distance between Gaussians fitted to (N, D) and (M, D), as in FID."""
    shift = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _root(a)
    cross = np.linalg.eigvalsh(root @ b @ root)  # square roots sum to the trace of (a b)^(1/2)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def distance_to_world(world: str, clips: Sequence[Sequence[float]]) -> float | None:
    """Distance of clips, as features, to fresh clips of a world; None for fewer than two."""
    if len(clips) < 2:
        return None
    reference, scale = _reference(world)
    return frechet_distance(np.asarray(clips, np.float64) / scale, reference)


@lru_cache(maxsize=2)
def _reference(world: str) -> tuple[Features, Features]:
    """Scaled features (N, D) of the reference clips and their scale (D,)."""
    scenes = [WORLDS[world].scene(REFERENCE_SEED + i) for i in range(REFERENCE_CLIPS)]
    raw = np.array([features(render(scene)) for scene in scenes])
    scale = np.maximum(raw.std(0), LEAST_SCALE)
    return raw / scale, scale


def _histogram(values: Floats) -> Features:
    """Square root of the share of values in each bin, which gives rare large steps more weight."""
    bins = np.searchsorted(BIN_EDGES, values, side="right")
    counts = np.bincount(bins, minlength=len(BIN_EDGES) + 1)[1:]
    return np.asarray(np.sqrt(counts / len(values)))


def _cells(image: Floats) -> Floats:
    """Means of an image (H, W) over a GRID x GRID grid."""
    height, width = (length // GRID for length in image.shape)
    return np.asarray(image.reshape(GRID, height, GRID, width).mean((1, 3)).ravel(), np.float32)


def _root(matrix: Features) -> Features:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
