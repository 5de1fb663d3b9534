"""What a suite of scores is, and how scores of videos become scores of a model.

Sums are VBench's: a dimension is brought to 0..1 by its own range, unclamped; a group (Quality, Semantic,
I2V) is a weighted mean of its dimensions, and Total one of the groups. A dimension that nothing was scored
for leaves its group and the Total empty, with its name, rather than counting as zero. All reported scores run
from 0 to 100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.recipe.schema import ModelSection

VideoPixels = NDArray[np.uint8]  # (T, H, W, 3)
Image = NDArray[np.uint8]  # (H, W, 3)
TEXT_TO_VIDEO = {"quality": 4.0, "semantic": 1.0}  # weights of VBench's groups in its Total
IMAGE_TO_VIDEO = {"quality": 1.0, "i2v": 1.0}  # and of VBench-I2V's
NOT_TOLD = "no prompt tells of it"


@dataclass(frozen=True)
class Dimension:
    """One thing a suite measures; ``low`` and ``high`` are the raw scores that count as 0 and 1."""

    name: str
    group: str
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class VideoScore:
    """Raw scores of one video, only for the dimensions that apply to it.

    ``right``: attribute -> whether the video shows what its prompt names. ``features``: the video's place in
    the feature space of the Fréchet distance. ``notes``: measurements behind the scores, for looking into a
    result. ``pieces``: raw scores of each latent frame's own frames, first to last, where the suite gives
    any; they tell how quality changes along the video.
    """

    scores: dict[str, float]
    right: dict[str, bool] = field(default_factory=dict)
    features: tuple[float, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)
    pieces: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class SuiteClip:
    """A finished video, and what its suite saw of it while it was made."""

    number: int  # of its prompt
    path: Path
    score: VideoScore


@dataclass(frozen=True)
class Assessment:
    """All videos of a variant judged: each by itself, and each dimension over those that it applies to."""

    scores: list[VideoScore]
    raw: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)  # dimensions without a score, and why
    notes: dict[str, Any] = field(default_factory=dict)  # for the protocol card
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sums:
    """Dimensions, groups and their Total, 0..100; None where a dimension of it is missing."""

    dimensions: dict[str, float]
    groups: dict[str, float | None]
    total: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class SuiteResult(Sums):
    """Scores of one model at one step count."""

    suite: str
    videos: int
    correct: float | None  # percent of videos in which every named attribute is right
    distance: float | None  # Fréchet distance to fresh clips of the world
    reasons: dict[str, str] = field(default_factory=dict)  # why a dimension is missing


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
    def from_files(self) -> bool:
        """Whether it reads finished files, rather than the pixels of ``score``."""
        ...

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All it can measure, in the order of reports."""
        ...

    @property
    def groups(self) -> Mapping[str, float]:
        """Weight of each group in Total, in the order of reports."""
        ...

    def check(self, model: ModelSection) -> None:
        """Refuse a model whose videos it cannot score."""
        ...

    def prompts(self, count: int) -> list[str]:
        """The first ``count`` prompts of its own set; always the same."""
        ...

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """The picture that each video is to begin with; None where text is all that is given."""
        ...

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Score finished videos, in order."""
        ...

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Judge all videos of a variant; ``directory`` is the variant's, for what is worth keeping."""
        ...

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Fréchet distance of these videos to the suite's reference; None where it has none."""
        ...


def summarise(suite: Suite, scores: Sequence[VideoScore]) -> SuiteResult:
    """The scores of a model from those of its videos alone."""
    return result_of(suite, mean_of_videos(scores))


def result_of(suite: Suite, assessment: Assessment) -> SuiteResult:
    """The scores of a model from its suite's judgement."""
    scores = assessment.scores
    sums = sum_up(suite.dimensions, suite.groups, assessment.raw)
    judged = [all(s.right.values()) for s in scores if s.right]
    features = [s.features for s in scores if s.features]
    return SuiteResult(
        **vars(sums),
        suite=suite.name,
        videos=len(scores),
        correct=100 * float(np.mean(judged)) if judged else None,
        distance=suite.distance(features) if features else None,
        reasons={name: assessment.missing.get(name, NOT_TOLD) for name in sums.missing},
    )


def mean_of_videos(scores: Sequence[VideoScore]) -> Assessment:
    """A dimension is the mean over the videos that it applies to."""
    known: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.scores.items():
            known.setdefault(name, []).append(value)
    return Assessment(list(scores), {name: float(np.mean(values)) for name, values in known.items()})


def sum_up(dimensions: Sequence[Dimension], groups: Mapping[str, float], raw: Mapping[str, float]) -> Sums:
    """From raw scores of dimensions to Total."""
    known = {d.name: 100 * (raw[d.name] - d.low) / (d.high - d.low) for d in dimensions if d.name in raw}
    means = {group: _group_mean([d for d in dimensions if d.group == group], known) for group in groups}
    missing = tuple(d.name for d in dimensions if d.name not in raw)
    return Sums(known, means, total_score(means, groups), missing)


def total_score(means: Mapping[str, float | None], groups: Mapping[str, float]) -> float | None:
    """The weighted mean of the groups; None where one of them is."""
    weighed = [weight * mean for name, weight in groups.items() if (mean := means[name]) is not None]
    return sum(weighed) / sum(groups.values()) if len(weighed) == len(groups) else None


def _group_mean(members: Sequence[Dimension], known: Mapping[str, float]) -> float | None:
    if any(d.name not in known for d in members):
        return None
    return sum(d.weight * known[d.name] for d in members) / sum(d.weight for d in members)
