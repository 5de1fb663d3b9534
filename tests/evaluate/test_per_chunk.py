"""Scores chunk by chunk: means over latent frames and videos."""

from __future__ import annotations

import pytest

from anyflow_cli.evaluate.per_chunk import chunk_curves
from anyflow_cli.evaluate.suite import VideoScore
from tests.evaluate.test_suite import Toy


def video(steady: list[float], named: list[float] | None = None) -> VideoScore:
    scores = [{}] * len(steady) if named is None else [{"named": value} for value in named]
    return VideoScore({}, pieces=tuple({"steady": s} | n for s, n in zip(steady, scores, strict=True)))


def test_a_chunk_is_the_mean_of_its_latent_frames_over_all_videos() -> None:
    found = chunk_curves(Toy(), [video([1, 0.8, 0.6, 0.2]), video([0.8, 0.6, 0.6, 0.4])], (1, 2, 1))
    assert found is not None
    assert found.groups["quality"] == pytest.approx((100, 37.5, -50))  # the dimension ranges from 0.5 to 0.9
    assert found.dimensions.keys() == {"steady"}
    assert "semantic" not in found.groups


def test_without_a_partition_each_latent_frame_is_a_chunk() -> None:
    found = chunk_curves(Toy(), [video([0.9, 0.7, 0.5])], None)
    assert found is not None
    assert found.partition == (1, 1, 1)
    assert found.groups["quality"] == pytest.approx((100, 50, 0))


def test_a_video_without_a_score_does_not_count_as_zero() -> None:
    found = chunk_curves(Toy(), [video([1, 1], [0.5, 0.25]), video([1, 1])], None)
    assert found is not None
    assert found.groups["semantic"] == pytest.approx((50, 25))


def test_a_suite_without_scores_of_latent_frames_has_no_curves() -> None:
    assert chunk_curves(Toy(), [VideoScore({"steady": 1})], None) is None
