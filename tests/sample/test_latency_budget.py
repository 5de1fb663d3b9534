"""A latency budget: the largest step count that fits what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from anyflow_cli.errors import AnyflowError
from anyflow_cli.recipe.schema import ModelSection
from anyflow_cli.sample import latency_budget
from anyflow_cli.sample.latency_budget import MAX_STEPS, VideoCost, measure_cost, steps_within
from anyflow_cli.sample.sampler import Latency, VideoSampler


class Slow:
    """A sampler whose step takes a quarter of a second, with one second around the steps.

    Of that second decoding takes a half, and writing the file a quarter. The first video, one on the way
    and the first decoding take longer.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.decoded = 0
        self.latency = Latency(0.0, 0.0)
        self.model = ModelSection()

    def latents(self, prompts: Sequence[str], seeds: Sequence[int], nfe: int) -> Iterator[Any]:
        self.latency = Latency(0.25 + 0.25 * nfe + (9.0 if len(self.asked) in (0, 3) else 0.0), 0.0)
        self.asked.append(nfe)
        yield from prompts

    def decode(self, latents: Any) -> Any:
        clock.seconds += 0.5 if self.decoded else 9.5
        self.decoded += 1
        return latents


class Clock:
    """Seconds that pass where a test says so."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


clock = Clock()


def write(path: Path, video: Any, fps: float) -> None:
    clock.seconds += 0.25


@pytest.fixture(autouse=True)
def _no_real_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_budget, "time", clock)
    monkeypatch.setattr(latency_budget, "write_mp4", write)


def slow() -> VideoSampler:
    return cast("VideoSampler", Slow())


def test_what_slows_single_videos_does_not_count() -> None:
    assert measure_cost(slow(), "a circle") == VideoCost(0.25, 1.0)


@pytest.mark.parametrize(("seconds", "steps"), [(1.25, 1), (1.49, 1), (1.5, 2), (3.0, 8), (1000, MAX_STEPS)])
def test_the_most_steps_that_fit_are_taken_and_said(
    seconds: float, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert steps_within(seconds, slow(), "a circle") == steps
    assert f"A step takes 0.250 s, everything else 1.000 s: {steps} steps" in caplog.text


def test_a_budget_that_no_step_fits_is_refused() -> None:
    with pytest.raises(AnyflowError, match=r"one step takes 1\.25 s here, more than the 1\.2 s allowed"):
        steps_within(1.2, slow(), "a circle")
