"""Connected components of a stack of small masks, without a loop over pixels or frames.

Rows of a mask are split into runs of set pixels; runs that touch vertically are merged by propagating the
smallest label. One pass over all frames takes about a millisecond per clip.

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
    """Horizontal runs of set pixels in a stack of masks: row in T*H, first column, end column; each (N,)."""

    row: Ints
    first: Ints
    after: Ints


def largest_component(mask: Mask, weight: Floats) -> Mask:
    """Keep the 4-connected component of each frame with the largest sum of ``weight``; all (T, H, W)."""
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
    """Label the components of one mask (H, W) from 1 on, with 0 outside."""
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
    """Label of each run, equal for connected runs; (N,)."""
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
    """Pairs of runs in adjacent rows of one frame that share a column."""
    pitch = int(runs.after.max()) + 2
    below = (runs.row + 1) * pitch
    low = np.searchsorted(runs.row * pitch + runs.after, below + runs.first, side="right")
    high = np.searchsorted(runs.row * pitch + runs.first, below + runs.after, side="left")
    high[runs.row % height == height - 1] = 0  # the last row of a frame is not adjacent to the next frame
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
