"""Confidence intervals of Total by a bootstrap over prompts and training seeds; its trend over step counts.

Prompts are drawn with replacement, each with all of its videos, and every model and step count gets the same
draws. A difference between two step counts is thereby paired: variation between prompts cancels. Training
runs that differ in their seed are a second level: each draw also resamples the runs.

Legend: V videos, P prompts, D dimensions, R draws, S training seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.evaluate.suite import Suite, VideoScore

Draws = NDArray[np.float64]
Verdict = Literal["improves", "flat", "degrades"]

DRAW_COUNT = 2000
LEVEL = 0.95
MIN_KNOWN = 0.5  # share of the draws that must have a value for an interval
MIN_PROMPTS = 5  # with fewer prompts the bootstrap has no meaning


@dataclass(frozen=True)
class Interval:
    """Confidence interval at LEVEL."""

    low: float
    high: float


@dataclass(frozen=True)
class PeakDrop:
    """Change of Total from the best to the largest step count, where it is significantly negative."""

    best: int
    change: float
    interval: Interval


@dataclass(frozen=True)
class Trend:
    """Change of Total from the smallest to the largest step count, in points."""

    fewest: int
    most: int
    change: float
    interval: Interval
    verdict: Verdict
    drop: PeakDrop | None


def draw_totals(suite: Suite, scores: Sequence[VideoScore], prompts: Sequence[int]) -> Draws | None:
    """Compute Total of each bootstrap draw, (R,).

    Args:
        suite: Suite the scores belong to.
        scores: One per video, (V,).
        prompts: Number of the prompt of each video, (V,).

    Returns:
        NaN for a draw in which some dimension has no score; None with fewer than MIN_PROMPTS prompts, and
        where more than half of the draws have no Total.
    """
    sums, counts = _per_prompt(suite, scores, prompts)
    if len(sums) < MIN_PROMPTS:
        return None
    draws = _resampled(len(sums))
    counted = draws @ counts  # (R, D)
    if (counted > 0).all(1).mean() < MIN_KNOWN:
        return None
    counted[counted == 0] = np.nan
    low, high = (np.array([getattr(d, side) for d in suite.dimensions]) for side in ("low", "high"))
    return np.asarray(100 * ((draws @ sums / counted - low) / (high - low)) @ _weights(suite))


def draw_seeds(totals: Sequence[Draws], stream: int = 0) -> Draws:
    """Mean Total over training runs in each draw, (R,), with the runs resampled along with the prompts.

    A bootstrap over S runs has (S - 1) / S of the variance between them, so deviations from the mean over
    runs are scaled up accordingly.

    Args:
        totals: ``draw_totals`` of each training run, on the same prompts.
        stream: Runs of two methods are paired, seed by seed, if they have the same stream.
    """
    runs = np.stack(totals)  # (S, R)
    mean: Draws = runs.mean(0)
    if len(runs) == 1:
        return mean
    picked = np.random.default_rng(1 + stream).integers(len(runs), size=runs.shape)  # (S, R)
    resampled = np.take_along_axis(runs, picked, 0).mean(0)
    return np.asarray(mean + np.sqrt(len(runs) / (len(runs) - 1)) * (resampled - mean))


def interval(values: Draws) -> Interval | None:
    """Take the central LEVEL of the draws that have a value; None where more than half of them have none."""
    known = values[~np.isnan(values)]
    if len(known) < MIN_KNOWN * len(values):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def trend(by_steps: dict[int, tuple[float, Draws]]) -> Trend | None:
    """Compare Total (and its draws) across step counts; None with fewer than two."""
    if len(by_steps) < 2:
        return None
    fewest, most = min(by_steps), max(by_steps)
    bounds = interval(by_steps[most][1] - by_steps[fewest][1])
    if bounds is None:
        return None
    verdict: Verdict = "improves" if bounds.low > 0 else "degrades" if bounds.high < 0 else "flat"
    return Trend(fewest, most, by_steps[most][0] - by_steps[fewest][0], bounds, verdict, _drop(by_steps))


def _drop(by_steps: dict[int, tuple[float, Draws]]) -> PeakDrop | None:
    """Find a decline after an interior maximum, which comparing the two ends does not show."""
    best, most = max(by_steps, key=lambda steps: by_steps[steps][0]), max(by_steps)
    bounds = interval(by_steps[most][1] - by_steps[best][1])
    if best == min(by_steps) or bounds is None or bounds.high >= 0:
        return None
    return PeakDrop(best, by_steps[most][0] - by_steps[best][0], bounds)


def _per_prompt(suite: Suite, scores: Sequence[VideoScore], prompts: Sequence[int]) -> tuple[Draws, Draws]:
    """Sum of raw scores and number of scored videos per prompt, each (P, D)."""
    names = [dimension.name for dimension in suite.dimensions]
    raw = np.array([[score.scores.get(name, np.nan) for name in names] for score in scores])  # (V, D)
    member = np.equal.outer(np.unique(prompts), prompts).astype(np.float64)  # (P, V)
    known = ~np.isnan(raw)
    return member @ np.where(known, raw, 0), member @ known


def _resampled(prompts: int) -> Draws:
    """How often each prompt occurs in each draw, (R, P); seeded, so that all models are paired."""
    picked = np.random.default_rng(0).integers(prompts, size=(DRAW_COUNT, prompts))
    return np.stack([np.bincount(row, minlength=prompts) for row in picked]).astype(np.float64)


def _weights(suite: Suite) -> Draws:
    """Weight of each dimension in Total, (D,)."""
    groups = suite.groups
    whole = {group: sum(d.weight for d in suite.dimensions if d.group == group) for group in groups}
    shares = [groups[d.group] * d.weight / whole[d.group] for d in suite.dimensions]
    return np.array(shares) / sum(groups.values())
