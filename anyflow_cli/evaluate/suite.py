"""What a suite of scores is, and how scores of videos become scores of a model.

Sums are VBench's: a dimension is the mean over its videos, brought to 0..1 by its own range; Quality and
Semantic are weighted means of dimensions; Total = (4 Quality + Semantic) / 5. A dimension that no video was
scored for leaves its group and the Total empty, with its name, rather than counting as zero. All reported
scores run from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.recipe.schema import Model

Video = NDArray[np.uint8]  # (T, H, W, 3)
Group = Literal["quality", "semantic"]
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0  # of VBench


@dataclass(frozen=True)
class Dimension:
    """One thing a suite measures; ``low`` and ``high`` are the raw scores that count as 0 and 1."""

    name: str
    group: Group
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class VideoScore:
    """Raw scores of one video, only for the dimensions that apply to it.

    ``right``: attribute -> whether the video shows what its prompt names. ``features``: the video's place in
    the feature space of the Fréchet distance. ``notes``: measurements behind the scores, for looking into a
    result.
    """

    scores: dict[str, float]
    right: dict[str, bool] = field(default_factory=dict)
    features: tuple[float, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """Scores of one model at one step count, 0..100; None where something needed for it was not scored."""

    suite: str
    videos: int
    dimensions: dict[str, float]
    quality: float | None
    semantic: float | None
    total: float | None
    correct: float | None  # percent of videos in which every named attribute is right
    distance: float | None  # Fréchet distance to fresh clips of the world
    missing: tuple[str, ...] = ()


class Suite(Protocol):
    """A set of prompts with a way to score what a model makes of them."""

    @property
    def name(self) -> str:
        """As the command line spells it."""
        ...

    @property
    def version(self) -> int:
        """Goes up whenever a score of an unchanged video could change; older scores are then not reused."""
        ...

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All it can measure, in the order of reports."""
        ...

    def check(self, model: Model) -> None:
        """Refuse a model whose videos it cannot score."""
        ...

    def prompts(self, count: int) -> list[str]:
        """The first ``count`` prompts of its own set; always the same."""
        ...

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[VideoScore]:
        """Score finished videos, in order."""
        ...

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Fréchet distance of these videos to the suite's reference; None where it has none."""
        ...


def summarise(suite: Suite, scores: Sequence[VideoScore]) -> SuiteResult:
    """The scores of a model from those of its videos."""
    raw = {d.name: [s.scores[d.name] for s in scores if d.name in s.scores] for d in suite.dimensions}
    dimensions = {d.name: _normalised(d, raw[d.name]) for d in suite.dimensions if raw[d.name]}
    quality, semantic = (_group_mean(suite, dimensions, group) for group in ("quality", "semantic"))
    judged = [all(s.right.values()) for s in scores if s.right]
    features = [s.features for s in scores if s.features]
    return SuiteResult(
        suite=suite.name,
        videos=len(scores),
        dimensions=dimensions,
        quality=quality,
        semantic=semantic,
        total=total_score(quality, semantic),
        correct=100 * float(np.mean(judged)) if judged else None,
        distance=suite.distance(features) if features else None,
        missing=tuple(d.name for d in suite.dimensions if not raw[d.name]),
    )


def total_score(quality: float | None, semantic: float | None) -> float | None:
    """VBench's Total."""
    if quality is None or semantic is None:
        return None
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)


def _normalised(dimension: Dimension, raw: Sequence[float]) -> float:
    return 100 * (float(np.mean(raw)) - dimension.low) / (dimension.high - dimension.low)


def _group_mean(suite: Suite, dimensions: dict[str, float], group: str) -> float | None:
    members = [d for d in suite.dimensions if d.group == group]
    if any(d.name not in dimensions for d in members):
        return None
    weight = sum(d.weight for d in members)
    return sum(d.weight * dimensions[d.name] for d in members) / weight
