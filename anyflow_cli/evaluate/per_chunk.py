"""Scores of a model chunk by chunk, which shows how quality changes along a video.

A causal model conditions each chunk on its own earlier ones, so its errors accumulate (exposure bias). Suites
score the frames of each latent frame; the score of a chunk is the mean over its latent frames and all videos.
Any model can thus be scored by any partition.

Legend: V videos, F latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anyflow_cli.evaluate.suite import Dimension, Suite, VideoScore


@dataclass(frozen=True)
class ChunkCurves:
    """Scores of each chunk, 0..100, in order.

    Attributes:
        partition: Latent frames of each chunk.
        groups: Weighted mean of a group's dimensions.
        dimensions: Scores the groups are made of.
    """

    partition: tuple[int, ...]
    groups: dict[str, tuple[float, ...]]
    dimensions: dict[str, tuple[float, ...]]


def chunk_curves(
    suite: Suite, scores: Sequence[VideoScore], partition: tuple[int, ...] | None
) -> ChunkCurves | None:
    """Average the scores of latent frames over chunks and videos; None where the suite has no such scores.

    Without a partition each latent frame is a chunk. A group includes only the dimensions that have a score
    at every latent frame.
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
    """Mean of one dimension over each chunk; None if some latent frame has no score in any video."""
    raw = np.array([[piece.get(dimension.name, np.nan) for piece in video] for video in videos])  # (V, F)
    known = ~np.isnan(raw)
    if not known.any(0).all():
        return None
    frames = np.where(known, raw, 0).sum(0) / known.sum(0)  # (F,)
    frames = 100 * (frames - dimension.low) / (dimension.high - dimension.low)
    return tuple(float(chunk.mean()) for chunk in np.split(frames, np.cumsum(sizes)[:-1]))
