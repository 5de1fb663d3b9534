"""Scores of a model from scores of videos: VBench's arithmetic, without values for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from anyflow_cli.evaluate.suite import (
    TEXT_TO_VIDEO,
    Assessment,
    Dimension,
    Image,
    SuiteClip,
    VideoPixels,
    VideoScore,
    mean_of_videos,
    summarize,
)
from anyflow_cli.recipe.schema import ModelSection


@dataclass(frozen=True)
class Toy:
    name: str = "toy"
    version: int = 1
    from_files: bool = False
    dimensions: tuple[Dimension, ...] = (
        Dimension("steady", "quality", low=0.5, high=0.9),
        Dimension("lively", "quality", weight=0.5),
        Dimension("named", "semantic"),
    )
    figures: tuple[str, ...] = ("clean",)
    groups: Mapping[str, float] = field(default_factory=lambda: TEXT_TO_VIDEO)

    def check(self, model: ModelSection) -> None:
        pass

    def prompts(self, count: int) -> list[str]:
        return ["a"] * count

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        return None

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        return []

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        return mean_of_videos([clip.score for clip in clips])

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        return float(len(features))


def test_dimensions_are_normalized_then_weighted() -> None:
    result = summarize(Toy(), [VideoScore({"steady": 0.7, "lively": 1.0, "named": 0.25})])
    assert result.dimensions == pytest.approx({"steady": 50, "lively": 100, "named": 25})
    assert result.groups["quality"] == pytest.approx((50 + 0.5 * 100) / 1.5)
    assert result.groups["semantic"] == pytest.approx(25)
    assert result.total == pytest.approx((4 * 100 / 1.5 + 25) / 5)


def test_a_dimension_is_the_mean_of_the_videos_it_applies_to() -> None:
    scores = [
        VideoScore({"steady": 0.9, "lively": 1.0, "named": 1.0}),
        VideoScore({"steady": 0.7, "lively": 0.0}),
    ]
    result = summarize(Toy(), scores)
    assert result.dimensions == pytest.approx({"steady": 75, "lively": 50, "named": 100})
    assert result.videos == 2


def test_a_missing_dimension_is_named_and_leaves_no_total() -> None:
    result = summarize(Toy(), [VideoScore({"steady": 0.7, "lively": 1.0})])
    assert result.missing == ("named",)
    assert result.groups["semantic"] is None
    assert result.total is None
    assert result.groups["quality"] is not None


def test_correct_counts_only_videos_whose_prompt_names_an_attribute() -> None:
    scores = [
        VideoScore({}, {"colour": True, "shape": True}),
        VideoScore({}, {"colour": True, "shape": False}),
        VideoScore({}, {}),
    ]
    assert summarize(Toy(), scores).correct == 50
    assert summarize(Toy(), scores[2:]).correct is None


def test_a_figure_is_the_mean_of_a_note_that_every_video_has() -> None:
    notes = [VideoScore({"steady": 0.7}, notes={"clean": value}) for value in (0.5, 0.7)]
    result = summarize(Toy(), notes)
    assert result.figures == {"clean": pytest.approx(60)}
    assert summarize(Toy(), [*notes, VideoScore({"steady": 0.7})]).figures == {"clean": None}
    assert result.total == summarize(Toy(), [VideoScore({"steady": 0.7})]).total


def test_the_distance_uses_all_videos_with_features() -> None:
    scores = [VideoScore({}, features=(1.0,)), VideoScore({}, features=(2.0,)), VideoScore({})]
    assert summarize(Toy(), scores).distance == 2
    assert summarize(Toy(), scores[2:]).distance is None
