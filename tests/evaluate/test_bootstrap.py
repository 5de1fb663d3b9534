"""Bootstrap over prompts: exact where nothing varies, calibrated where it does, paired across step counts."""

from __future__ import annotations

import numpy as np
import pytest

from anyflow_cli.evaluate.bootstrap import draw_seeds, draw_totals, interval, trend
from anyflow_cli.evaluate.report.tables import trend_sentence
from anyflow_cli.evaluate.suite import VideoScore, summarize
from tests.evaluate.test_suite import Toy


def scores(values: np.ndarray, named: bool = True) -> list[VideoScore]:
    return [
        VideoScore({"steady": float(v), "lively": 1.0} | ({"named": 0.5} if named else {})) for v in values
    ]


def total_and_draws(made: list[VideoScore]) -> tuple[float, np.ndarray]:
    """Total of videos with one prompt each, and Total of each draw."""
    total, drawn = summarize(Toy(), made).total, draw_totals(Toy(), made, range(len(made)))
    assert total is not None
    assert drawn is not None
    return total, drawn


def test_equal_videos_have_an_interval_of_zero_width_at_the_total() -> None:
    made = scores(np.full(10, 0.7))
    drawn = draw_totals(Toy(), made, range(10))
    assert drawn is not None
    bounds = interval(drawn)
    assert bounds is not None
    assert bounds.low == pytest.approx(summarize(Toy(), made).total)
    assert bounds.high == pytest.approx(bounds.low)


def test_the_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.05, 100)
    drawn = draw_totals(Toy(), scores(values), range(100))
    assert drawn is not None
    slope = (
        100 / 0.4 / 1.5 * 0.8
    )  # dTotal / draw score: range of the dimension, its weight in Quality, weight of Quality in Total
    assert drawn.std() == pytest.approx(slope * values.std() / 10, rel=0.1)
    assert drawn.mean() == pytest.approx(summarize(Toy(), scores(values)).total, abs=0.5)


def test_videos_of_a_prompt_are_drawn_together() -> None:
    values = np.repeat([0.6, 0.8, 0.65, 0.75, 0.7], 20)
    together = draw_totals(Toy(), scores(values), np.repeat(range(5), 20).tolist())
    apart = draw_totals(Toy(), scores(values), range(100))
    assert together is not None
    assert apart is not None
    assert together.std() > 3 * apart.std()


def test_four_prompts_are_too_few_for_an_interval() -> None:
    assert draw_totals(Toy(), scores(np.linspace(0.6, 0.8, 4)), range(4)) is None


def test_no_interval_where_a_dimension_is_missing() -> None:
    assert draw_totals(Toy(), scores(np.full(9, 0.7), named=False), range(9)) is None


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.02, "improves"), (-0.02, "degrades"), (0.0, "flat"), (0.0005, "flat")]
)
def test_a_verdict_needs_more_than_noise(gain: float, verdict: str) -> None:
    rng = np.random.default_rng(1)
    prompt = rng.normal(0.7, 0.1, 64)  # prompts differ far more than step counts do
    both = [prompt + rng.normal(0, 0.02, 64), prompt + gain + rng.normal(0, 0.02, 64)]
    by_steps = {}
    for steps, values in zip((32, 4), reversed(both), strict=True):
        by_steps[steps] = total_and_draws(scores(values))
    found = trend(by_steps)
    assert found is not None
    assert (found.fewest, found.most) == (4, 32)
    assert found.change == pytest.approx(by_steps[32][0] - by_steps[4][0])
    assert found.interval.low < found.change < found.interval.high
    assert found.verdict == verdict


def test_training_seeds_add_their_variance_without_bias() -> None:
    """Over many repetitions the variance of the draws is that of the mean over seeds and prompts."""
    rng, seeds, prompts = np.random.default_rng(3), 3, 25
    found = []
    for _ in range(200):
        prompt = rng.normal(80, 5, prompts)
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=500) / prompts  # (R, P)
        found.append(draw_seeds([weights @ prompt + shift for shift in rng.normal(0, 2, seeds)]).var())
    assert np.mean(found) == pytest.approx(2**2 / seeds + 5**2 / prompts * (prompts - 1) / prompts, rel=0.1)


def test_seeds_of_two_methods_are_paired_in_one_stream() -> None:
    shifts, draws = (-3.0, 0.0, 3.0), np.zeros(2000)
    first = [draws + shift for shift in shifts]
    second = [draws + shift + 1 for shift in shifts]
    assert np.ptp(draw_seeds(second) - draw_seeds(first)) == pytest.approx(0, abs=1e-9)
    assert np.ptp(draw_seeds(second, stream=1) - draw_seeds(first)) > 5
    assert (draw_seeds(first[:1]) == first[0]).all()


def test_one_step_count_has_no_trend() -> None:
    assert trend({4: (80.0, np.zeros(3))}) is None


def test_a_dimension_of_few_prompts_still_has_an_interval() -> None:
    """Two of six prompts: one draw in eleven contains neither."""
    toy = Toy()
    videos = scores(np.linspace(0.6, 0.8, 6))
    rare = toy.dimensions[0].name
    for video in videos[2:]:
        del video.scores[rare]
    drawn = draw_totals(toy, videos, range(6))
    assert drawn is not None
    assert 0 < np.isnan(drawn).mean() < 0.2
    assert interval(drawn) is not None


def test_step_counts_are_paired_by_the_draws_both_have_a_value_for() -> None:
    """One model has a score of a rare dimension on two prompts, the other on three."""
    by_steps, rare = {}, Toy().dimensions[0].name
    for steps, some in ((1, 2), (4, 3)):
        videos = scores(np.linspace(0.6, 0.7, 6) + 0.1 * (steps == 4))
        for video in videos[some:]:
            del video.scores[rare]
        by_steps[steps] = total_and_draws(videos)
    found = trend(by_steps)
    assert found is not None
    assert found.verdict == "improves"
    assert np.isfinite([found.interval.low, found.interval.high]).all()
    assert interval(np.array([1.0, np.nan, np.nan])) is None


def test_a_drop_after_the_best_step_count_is_found_despite_an_overall_rise() -> None:
    rng = np.random.default_rng(2)
    prompt = rng.normal(0.7, 0.1, 64)
    by_steps = {}
    for steps, gain in ((1, 0.0), (4, 0.1), (8, 0.09), (32, 0.04)):
        by_steps[steps] = total_and_draws(scores(prompt + gain + rng.normal(0, 0.01, 64)))
    found = trend(by_steps)
    assert found is not None
    assert found.verdict == "improves"
    assert found.drop is not None
    assert found.drop.best == 4
    assert found.drop.change == pytest.approx(by_steps[32][0] - by_steps[4][0])
    assert found.drop.interval.high < 0
    del by_steps[32], by_steps[8]
    rising = trend(by_steps)
    assert rising is not None
    assert rising.drop is None
    assert "The best step count is 4; from there to 32 steps Total changes by -" in trend_sentence(found)
