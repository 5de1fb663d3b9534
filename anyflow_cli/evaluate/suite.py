"""Interface of a benchmark suite, and the arithmetic from scores of videos to the score of a model.

The arithmetic is VBench's: each dimension is normalized by its own range, without clamping; a group (Quality,
Semantic, I2V) is a weighted mean of its dimensions, and Total a weighted mean of the groups. A dimension
without any score leaves its group and Total empty instead of counting as zero. Reported scores run from 0 to
100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from anyflow_cli.recipe.schema import ModelSection

VideoPixels = NDArray[np.uint8]  # (T, H, W, 3)
Image = NDArray[np.uint8]  # (H, W, 3)
TEXT_TO_VIDEO = {"quality": 4.0, "semantic": 1.0}  # weights of the groups in VBench's Total
IMAGE_TO_VIDEO = {"quality": 1.0, "i2v": 1.0}  # the same of VBench-I2V
NO_PROMPT = "no prompt names it"
RawScore = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class Dimension:
    """One quality that a suite measures; ``low`` and ``high`` are the raw scores that map to 0 and 1."""

    name: str
    group: str
    weight: float = 1.0
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class VideoScore:
    """Raw scores of one video, for the dimensions that apply to it.

    Attributes:
        scores: Raw score of each dimension.
        right: Attribute named by the prompt -> whether the video shows it.
        features: Point in the feature space of the Fréchet distance.
        notes: Measurements behind the scores.
        pieces: Raw scores of the frames of each latent frame, in order; empty where the suite has none.
    """

    scores: dict[str, RawScore]
    right: dict[str, bool] = field(default_factory=dict)
    features: tuple[RawScore, ...] = ()
    notes: dict[str, float] = field(default_factory=dict)
    pieces: tuple[dict[str, RawScore], ...] = ()


@dataclass(frozen=True)
class SuiteClip:
    """A finished video file with the score it got while it was generated."""

    number: int  # of its prompt
    path: Path
    score: VideoScore


@dataclass(frozen=True)
class ScoringNotes:
    """VBench's part of a model's card: what was run, in which environment, with which weights."""

    dimensions_run: tuple[str, ...]
    static_filter: bool
    vbench: dict[str, str]  # versions of packages
    vbench_weights: dict[str, str]  # SHA-256 by file


@dataclass(frozen=True)
class Assessment:
    """Scores of all videos of a model at one step count.

    Attributes:
        scores: One per video.
        raw: Raw score of each dimension over the videos it applies to.
        missing: Dimension without a score -> the reason.
        notes: Further entries of the model's card.
        deviations: Differences from the suite's own protocol that only scoring revealed.
    """

    scores: list[VideoScore]
    raw: dict[str, float]
    missing: dict[str, str] = field(default_factory=dict)
    notes: ScoringNotes | None = None
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoreSummary:
    """Dimensions, groups and Total, 0..100; a group or Total with a missing dimension is None."""

    dimensions: dict[str, float]
    groups: dict[str, float | None]
    total: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class SuiteResult(ScoreSummary):
    """Summary of one model at one step count."""

    suite: str
    videos: int
    correct: float | None  # percentage of videos that show every attribute their prompt names
    distance: float | None  # Fréchet distance to fresh clips of the world
    figures: dict[str, float | None] = field(default_factory=dict)  # 0..100, not part of Total
    reasons: dict[str, str] = field(default_factory=dict)  # of missing dimensions


class Suite(Protocol):
    """A set of prompts and a way to score the videos generated from them."""

    @property
    def name(self) -> str:
        """Name on the command line."""
        ...

    @property
    def version(self) -> int:
        """Version of the scores: raised whenever the score of an unchanged video could change."""
        ...

    @property
    def from_files(self) -> bool:
        """Whether the suite scores finished files in ``assess`` rather than pixels in ``score``."""
        ...

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """All dimensions, in the order of reports."""
        ...

    @property
    def groups(self) -> Mapping[str, float]:
        """Weight of each group in Total, in the order of reports."""
        ...

    @property
    def figures(self) -> tuple[str, ...]:
        """Notes of videos, 0..1, whose mean is reported beside the scores."""
        ...

    def check(self, model: ModelSection) -> None:
        """Raise a UsageError for a model whose videos the suite cannot score."""
        ...

    def prompts(self, count: int) -> list[str]:
        """Return the first ``count`` prompts of the suite; always the same ones."""
        ...

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """Return the conditioning image of each video; None for text-to-video."""
        ...

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Score the pixels of videos, in order."""
        ...

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Score all videos of a model at one step count; ``directory`` is for intermediate results."""
        ...

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Return the Fréchet distance to the suite's reference set; None where there is none."""
        ...


def summarize(suite: Suite, scores: Sequence[VideoScore]) -> SuiteResult:
    """Summarize scores of videos, for suites that score pixels."""
    return result_of(suite, mean_of_videos(scores))


def result_of(suite: Suite, assessment: Assessment) -> SuiteResult:
    """Summarize an assessment."""
    scores = assessment.scores
    summary = compute_summary(suite.dimensions, suite.groups, assessment.raw)
    correct = [all(s.right.values()) for s in scores if s.right]
    features = [s.features for s in scores if s.features]
    return SuiteResult(
        **vars(summary),
        suite=suite.name,
        videos=len(scores),
        correct=100 * float(np.mean(correct)) if correct else None,
        distance=suite.distance(features) if features else None,
        figures={name: _mean_note(scores, name) for name in suite.figures},
        reasons={name: assessment.missing.get(name, NO_PROMPT) for name in summary.missing},
    )


def mean_of_videos(scores: Sequence[VideoScore]) -> Assessment:
    """Average each dimension over the videos it applies to."""
    known: dict[str, list[float]] = {}
    for score in scores:
        for name, value in score.scores.items():
            known.setdefault(name, []).append(value)
    return Assessment(list(scores), {name: float(np.mean(values)) for name, values in known.items()})


def compute_summary(
    dimensions: Sequence[Dimension], groups: Mapping[str, float], raw: Mapping[str, float]
) -> ScoreSummary:
    """Compute normalized dimensions, groups and Total from raw scores."""
    known = {d.name: 100 * (raw[d.name] - d.low) / (d.high - d.low) for d in dimensions if d.name in raw}
    means = {group: _group_mean([d for d in dimensions if d.group == group], known) for group in groups}
    missing = tuple(d.name for d in dimensions if d.name not in raw)
    return ScoreSummary(known, means, total_score(means, groups), missing)


def total_score(means: Mapping[str, float | None], groups: Mapping[str, float]) -> float | None:
    """Weighted mean of the groups; None where a group is missing."""
    weighed = [weight * mean for name, weight in groups.items() if (mean := means[name]) is not None]
    return sum(weighed) / sum(groups.values()) if len(weighed) == len(groups) else None


def _mean_note(scores: Sequence[VideoScore], name: str) -> float | None:
    """Mean of a note in percent; None where a video lacks it, as those scored by version 0.1 do."""
    known = [score.notes[name] for score in scores if name in score.notes]
    return 100 * float(np.mean(known)) if known and len(known) == len(scores) else None


def _group_mean(members: Sequence[Dimension], known: Mapping[str, float]) -> float | None:
    if any(d.name not in known for d in members):
        return None
    return sum(d.weight * known[d.name] for d in members) / sum(d.weight for d in members)
