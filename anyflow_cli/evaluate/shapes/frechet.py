"""Fréchet distance between two sets of clips, in a fixed feature space of 64 numbers a clip.

The features look at a clip as a whole and know nothing of shapes or prompts, so they also see what the scores
do not ask for. They are, in this order:

    11  square root of the share of pixels nearest to each palette colour 3  mean of each channel 8  square
    roots of the shares of steps between neighbouring pixels by size (sharp edges fall into other bins than
    blurred ones) 8  square roots of the shares of changes over four frames by size (motion, flicker) 2  mean
    absolute change of the frame mean from frame to frame; mean second difference of pixels in time 16  mean
    brightness over time in a 4x4 grid 16  standard deviation of brightness over time in a 4x4 grid

Each is divided by its standard deviation over the reference clips, or by 0.02 where that is less.

Legend: T frames, H W height and width, N clips, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import WORLDS, RgbPixels, render
from anyflow_cli.evaluate.shapes.unmix import NAMES, nearest_labels

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

STEPS = np.array([16, 24, 32, 48, 64, 96, 128, 192], np.float32)  # levels; lower edges of the bins
BRIGHTNESS = np.array([0.299, 0.587, 0.114], np.float32)
GRID = 4
EVERY = 4
LEAST_SCALE = 0.02
REFERENCE_CLIPS = 512
REFERENCE_SEED = 2**40  # far from the seeds of prompts and training


def features(video: RgbPixels) -> tuple[float, ...]:
    """The 64 features of a clip (T, H, W, 3), not yet scaled."""
    gray = video.astype(np.float32) @ BRIGHTNESS  # (T, H, W)
    labels = nearest_labels(video[::EVERY]).ravel()
    edges = np.abs(np.diff(gray[::EVERY], axis=2)), np.abs(np.diff(gray[::EVERY], axis=1))
    still = gray.mean((1, 2))
    jerk = np.abs(gray[2:] - 2 * gray[1:-1] + gray[:-2]).mean()
    parts = [
        np.sqrt(np.bincount(labels, minlength=len(NAMES)) / len(labels)),
        video[::EVERY].mean((0, 1, 2)) / 255,
        _histogram(np.concatenate([edge.ravel() for edge in edges])),
        _histogram(np.abs(gray[EVERY::EVERY] - gray[:-EVERY:EVERY]).ravel()),
        np.array([np.abs(np.diff(still)).mean(), jerk]) / 255,
        _cells(gray.mean(0)) / 255,
        _cells(gray.std(0)) / 255,
    ]
    return tuple(float(value) for value in np.concatenate(parts))


def frechet_distance(first: Doubles, second: Doubles) -> float:
    """Squared Fréchet distance of Gaussians fitted to (N, D) and (M, D), as FID defines it."""
    shift = first.mean(0) - second.mean(0)
    a, b = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = _root(a)
    cross = np.linalg.eigvalsh(root @ b @ root)  # its roots sum to the trace of (a b)^(1/2)
    return float(shift @ shift + np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(cross, 0)).sum())


def distance_to_world(world: str, clips: Sequence[Sequence[float]]) -> float | None:
    """Distance of clips, given by their features, to fresh clips of a world; None for fewer than two."""
    if len(clips) < 2:
        return None
    reference, scale = _reference(world)
    return frechet_distance(np.asarray(clips, np.float64) / scale, reference)


@lru_cache(maxsize=2)
def _reference(world: str) -> tuple[Doubles, Doubles]:
    """Scaled features (N, D) of the reference clips, and the scale (D,)."""
    scenes = [WORLDS[world].scene(REFERENCE_SEED + i) for i in range(REFERENCE_CLIPS)]
    raw = np.array([features(render(scene)) for scene in scenes])
    scale = np.maximum(raw.std(0), LEAST_SCALE)
    return raw / scale, scale


def _histogram(values: Floats) -> Doubles:
    """Square roots of the shares of values in each bin, so that rare large steps weigh in too."""
    bins = np.searchsorted(STEPS, values, side="right")
    counts = np.bincount(bins, minlength=len(STEPS) + 1)[1:]
    return np.asarray(np.sqrt(counts / len(values)))


def _cells(image: Floats) -> Floats:
    """Means over a GRID x GRID grid of an image (H, W)."""
    height, width = (length // GRID for length in image.shape)
    return np.asarray(image.reshape(GRID, height, GRID, width).mean((1, 3)).ravel(), np.float32)


def _root(matrix: Doubles) -> Doubles:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
