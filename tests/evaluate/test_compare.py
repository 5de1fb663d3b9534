"""Comparison of two models: paired by prompt, over common videos, from new or finished evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.compare import Side, compare, is_finished, read_side, side_of
from anyflow_cli.evaluate.report.page import write_comparison, write_results
from anyflow_cli.evaluate.report.tables import comparison_table
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.evaluate.suite import VideoScore
from tests.evaluate.drawn import Drawn, make_job
from tests.evaluate.test_suite import Toy

RNG = np.random.default_rng(0)
PROMPT = RNG.normal(0.7, 0.1, 64)  # prompts differ far more than the two models
NOISE = RNG.normal(0, 0.02, (2, 64))


def side(name: str, values: np.ndarray, steps: int = 4) -> Side:
    scores = [VideoScore({"steady": float(v), "lively": 1.0, "named": 0.5}) for v in values]
    return Side(name, "toy", 1, {steps: {(f"prompt {n}", n): s for n, s in enumerate(scores)}}, None)


@pytest.mark.parametrize(
    ("gain", "finding"),
    [(0.03, "better"), (-0.03, "worse"), (0.0, "no difference"), (0.001, "no difference")],
)
def test_a_finding_requires_more_than_noise(gain: float, finding: str) -> None:
    first, second = side("a", PROMPT + NOISE[0]), side("b", PROMPT + gain + NOISE[1])
    (found,) = compare(Toy(), first, second).differences
    assert found.finding == finding
    assert found.interval is not None
    assert found.change is not None
    assert found.interval.low < found.change < found.interval.high
    assert found.interval.high - found.interval.low < 5  # far narrower than that of either Total


def test_it_is_antisymmetric_and_zero_against_itself() -> None:
    first, second = side("a", PROMPT + NOISE[0]), side("b", PROMPT + NOISE[1])
    (there,), (back,) = (compare(Toy(), *pair).differences for pair in ((first, second), (second, first)))
    assert there.change == pytest.approx(-(back.change or 0))
    (same,) = compare(Toy(), first, first).differences
    assert (same.change, same.interval and same.interval.low) == (0, 0)


def test_only_common_videos_count() -> None:
    first = side("a", PROMPT)
    some = {key: score for key, score in first.by_steps[4].items() if key[1] < 20}
    second = Side("b", "toy", 1, {4: some, 8: some}, None)
    (found,) = compare(Toy(), first, second).differences
    assert (found.steps, found.videos, found.change) == (4, 20, 0)


def test_few_prompts_give_a_change_but_no_finding() -> None:
    (found,) = compare(Toy(), side("a", PROMPT[:4]), side("b", PROMPT[:4] + 0.1)).differences
    assert found.change == pytest.approx(100 * 0.1 / 0.4 / 1.5 * 0.8)
    assert (found.interval, found.finding) == (None, "too few prompts")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda: side("b", PROMPT, steps=8), "no video with the same prompt, seed and step count"),
        (lambda: Side("b", "vbench", 1, {}, None), "scored with vbench 1, not with toy 1"),
        (lambda: Side("b", "toy", 2, {}, None), "scored with toy 2, not with toy 1"),
    ],
)
def test_sides_that_cannot_be_compared_are_refused(second: Callable[[], Side], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(Toy(), side("a", PROMPT), second())


def test_a_finished_evaluation_is_read_as_it_was_written(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), prompts=5, teacher=False)
    found = run_evaluation(job, Drawn().open)
    assert not is_finished(str(job.out))
    write_results(found, job.protocol.suite, job.out)
    assert is_finished(str(job.out))
    made, read = side_of("it", found), read_side(job.out)
    assert read.by_steps.keys() == made.by_steps.keys() == {1}
    for steps, videos in made.by_steps.items():
        assert read.by_steps[steps] == videos
    result = compare(job.protocol.suite, made, read)
    assert [one.change for one in result.differences] == [0]
    assert sorted(write_comparison(result, tmp_path)) == ["comparison.json", "comparison.png"]


def test_both_sides_use_the_chunks_of_the_causal_one() -> None:
    piece = VideoScore({"steady": 0.7}, pieces=({"steady": 0.9}, {"steady": 0.7}, {"steady": 0.5}))
    causal, plain = (
        Side(name, "toy", 1, {4: {("a", 1): piece}}, p) for name, p in (("a", (1, 2)), ("b", None))
    )
    for pair in ((causal, plain), (plain, causal)):
        for side in compare(Toy(), *pair).chunks:
            assert side[4].groups["quality"] == pytest.approx((100, 25))


def test_a_results_file_with_missing_fields_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"card": {}, "scores": []}')
    with pytest.raises(UsageError, match=r"results\.json is damaged: card\.suite: Field required"):
        read_side(tmp_path)


def test_a_deviation_of_either_side_is_kept_in_a_comparison(tmp_path: Path) -> None:
    job = make_job(tmp_path, prompts=5, teacher=False)
    quick = replace(job, protocol=replace(job.protocol, deviations=("only the first 5 of 12 prompts",)))
    found = run_evaluation(quick, Drawn().open)
    write_results(found, job.protocol.suite, quick.out)
    whole = replace(side_of("a", found), deviations=())
    for marked in (side_of("b", found), read_side(quick.out)):
        result = compare(job.protocol.suite, whole, marked)
        assert result.as_json()["comparable"] is False
        assert str(comparison_table(result).caption) == (
            "not comparable with other results: only the first 5 of 12 prompts"
        )
    assert compare(job.protocol.suite, whole, whole).as_json()["comparable"] is True
