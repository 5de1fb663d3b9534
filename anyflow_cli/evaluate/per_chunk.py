"""How quality changes along a video: scores of a model chunk by chunk, which is where exposure bias shows.

A causal model goes on from its own chunks; what it gets wrong adds up, and later chunks are worse. Suites
score pieces of one latent frame each; a chunk's score is the mean over its pieces and all videos, so any
model can be held against any partition.

Legend: V videos, F latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyflow_cli.evaluate.suite import Dimension, Suite, VideoScore


@dataclass(frozen=True)
class ChunkCurves:
    """Scores of each chunk, 0..100, first to last, by group of dimensions."""

    partition: tuple[int, ...]  # latent frames of each chunk
    groups: dict[str, tuple[float, ...]]
    dimensions: dict[str, tuple[float, ...]]  # what each group is the weighted mean of


def chunk_curves(
    suite: Suite, scores: Sequence[VideoScore], partition: tuple[int, ...] | None
) -> ChunkCurves | None:
    """Chunks of a model's videos (None: each latent frame by itself); None where the suite scores no pieces.

    A group has only the dimensions that every piece of every chunk was scored for.
    """
    pieces = [score.pieces for score in scores if score.pieces]
    if not pieces:
        return None
    sizes = partition or (1,) * len(pieces[0])
    found = {d.name: _by_chunk(pieces, d, sizes) for d in suite.dimensions}
    known = {name: values for name, values in found.items() if values is not None}
    groups = {}
    for group in suite.groups:
        members = [d for d in suite.dimensions if d.group == group and d.name in known]
        if members:
            weights = [d.weight for d in members]
            mean = np.average([known[d.name] for d in members], axis=0, weights=weights)
            groups[group] = tuple(float(value) for value in mean)
    return ChunkCurves(sizes, groups, known)


def _by_chunk(
    videos: Sequence[tuple[dict[str, float], ...]], dimension: Dimension, sizes: Sequence[int]
) -> tuple[float, ...] | None:
    """Mean of one dimension over the pieces of each chunk; None if some latent frame was never scored."""
    raw = np.array([[piece.get(dimension.name, np.nan) for piece in video] for video in videos])  # (V, F)
    known = ~np.isnan(raw)
    if not known.any(0).all():
        return None
    frames = np.where(known, raw, 0).sum(0) / known.sum(0)  # (F,)
    frames = 100 * (frames - dimension.low) / (dimension.high - dimension.low)
    return tuple(float(chunk.mean()) for chunk in np.split(frames, np.cumsum(sizes)[:-1]))
