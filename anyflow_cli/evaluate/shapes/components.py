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
    length = runs.after - runs.first
    sums = np.diff(np.cumsum(weight[mask], dtype=np.float64)[np.cumsum(length) - 1], prepend=0.0)
    mass = np.bincount(labels, sums, minlength=len(labels))
    frame = runs.row // mask.shape[1]
    best = np.zeros(mask.shape[0])
    np.maximum.at(best, frame, mass[labels])
    kept = mass[labels] == best[frame]
    largest = mask.copy()
    largest[mask] = np.repeat(kept, length)
    return largest


def component_labels(mask: Mask) -> Ints:
    """Label the components of one mask (H, W) from 1 on, with 0 outside."""
    labels = np.zeros(mask.shape, np.intp)
    if mask.any():
        runs = _runs(mask[None])
        joined = _joined(runs, mask.shape[0])
        numbers = np.cumsum(joined == np.arange(len(joined)))  # of the first run of each component
        labels[mask] = np.repeat(numbers[joined], runs.after - runs.first)
    return labels


def _runs(mask: Mask) -> Runs:
    frames, height, width = mask.shape
    padded = np.zeros((frames * height, width + 1), bool)  # a clear pixel between rows ends every run
    padded[:, 1:] = mask.reshape(-1, width)
    flat = padded.ravel()
    ends = np.flatnonzero(np.append(flat[1:] != flat[:-1], flat[-1]))
    row, first = np.divmod(ends[::2], width + 1)
    return Runs(row, first, ends[1::2] - row * (width + 1))


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
