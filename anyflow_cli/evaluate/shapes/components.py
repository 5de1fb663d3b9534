"""Connected components of many small masks at once, without a loop over pixels or frames.

Each row of a mask is cut into runs; runs that touch vertically are joined by passing on the smallest label.
Doing all frames in one pass costs about a millisecond a clip, where a labelling of pixels would cost ten.

Legend: T frames, H W height and width in pixels, N runs over all rows of all frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Runs:
    """Horizontal runs in a stack of masks: row of T*H, first column, column after the last; each (N,)."""

    row: Ints
    first: Ints
    after: Ints


def largest_component(mask: Mask, weight: Floats) -> Mask:
    """In each frame, the 4-connected part of ``mask`` with the largest sum of ``weight``; all (T, H, W)."""
    if not mask.any():
        return np.zeros_like(mask)
    runs = _runs(mask)
    labels = _joined(runs, mask.shape[1])
    mass = np.bincount(labels, _run_sums(runs, weight), minlength=len(labels))
    frame = runs.row // mask.shape[1]
    best = np.zeros(mask.shape[0])
    np.maximum.at(best, frame, mass[labels])
    kept = mass[labels] == best[frame]
    return _painted(runs, kept, mask.shape)


def component_labels(mask: Mask) -> Ints:
    """Number of the component of each pixel in one frame, 1 and up, 0 outside; (H, W)."""
    labels = np.zeros(mask.shape, np.intp)
    if mask.any():
        runs = _runs(mask[None])
        _, numbers = np.unique(_joined(runs, mask.shape[0]), return_inverse=True)
        for row, first, after, number in zip(runs.row, runs.first, runs.after, numbers, strict=True):
            labels[row, first:after] = number + 1
    return labels


def _runs(mask: Mask) -> Runs:
    frames, height, width = mask.shape
    padded = np.zeros((frames * height, width + 2), np.int8)
    padded[:, 1:-1] = mask.reshape(-1, width)
    change = np.diff(padded, axis=1)
    row, first = np.nonzero(change == 1)
    _, after = np.nonzero(change == -1)
    return Runs(row, first, after)


def _joined(runs: Runs, height: int) -> Ints:
    """A label for each run, equal where runs are connected; (N,)."""
    upper, lower = _touching(runs, height)
    labels = np.arange(len(runs.row))
    while True:
        smallest = np.minimum(labels[upper], labels[lower])
        joined = labels.copy()
        np.minimum.at(joined, upper, smallest)
        np.minimum.at(joined, lower, smallest)
        joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined


def _touching(runs: Runs, height: int) -> tuple[Ints, Ints]:
    """Pairs of runs in neighbouring rows of one frame that share a column."""
    pitch = int(runs.after.max()) + 2
    below = (runs.row + 1) * pitch
    low = np.searchsorted(runs.row * pitch + runs.after, below + runs.first, side="right")
    high = np.searchsorted(runs.row * pitch + runs.first, below + runs.after, side="left")
    high[runs.row % height == height - 1] = 0  # the last row of a frame does not touch the next frame
    count = np.maximum(high - low, 0)
    upper = np.repeat(np.arange(len(count)), count)
    lower = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(low, count)
    return upper, lower


def _run_sums(runs: Runs, weight: Floats) -> NDArray[np.float64]:
    width = weight.shape[2]
    total = np.concatenate([[0.0], np.cumsum(weight.ravel(), dtype=np.float64)])
    return np.asarray(total[runs.row * width + runs.after] - total[runs.row * width + runs.first])


def _painted(runs: Runs, kept: Mask, shape: tuple[int, ...]) -> Mask:
    marks = np.zeros((shape[0] * shape[1], shape[2] + 1), np.int8)
    marks[runs.row[kept], runs.first[kept]] += 1
    marks[runs.row[kept], runs.after[kept]] -= 1
    return np.asarray(np.cumsum(marks, axis=1)[:, :-1].reshape(shape) > 0)
