"""Does the score grow with the number of steps? Bootstrap intervals over prompts, and a verdict from them.

Prompts are drawn with replacement, all videos of a prompt together, the same draw for every variant: what
differs between two step counts is then told apart from what differs between prompts.

Legend: V videos, P prompts, D dimensions, R draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.evaluate.suite import Suite, VideoScore

Doubles = NDArray[np.float64]
Verdict = Literal["improves", "flat", "degrades"]

DRAWS = 2000
LEVEL = 0.95
COMPLETE = 0.5  # share of the draws that an interval needs
LEAST_PROMPTS = 5  # of fewer, a bootstrap knows nothing


@dataclass(frozen=True)
class Interval:
    """A value between its bounds at LEVEL."""

    low: float
    high: float


@dataclass(frozen=True)
class Fall:
    """Total at the most steps less that at the best number of steps, where it is lower beyond doubt."""

    best: int
    change: float
    interval: Interval


@dataclass(frozen=True)
class Trend:
    """Total at the most steps less that at the fewest, in points; and the way down, if there is one."""

    fewest: int
    most: int
    change: float
    interval: Interval
    verdict: Verdict
    fall: Fall | None


def totals(suite: Suite, scores: Sequence[VideoScore], prompts: Sequence[int]) -> Doubles | None:
    """Total of each draw (R,), ``prompts`` being the numbers of their prompts.

    NaN in a draw in which no video tells of some dimension. None for fewer than LEAST_PROMPTS, and where
    more than half of the draws have no Total.
    """
    sums, counts = _per_prompt(suite, scores, prompts)
    if len(sums) < LEAST_PROMPTS:
        return None
    draws = _draws(len(sums))
    counted = draws @ counts  # (R, D)
    if (counted > 0).all(1).mean() < COMPLETE:
        return None
    counted[counted == 0] = np.nan
    low, high = (np.array([getattr(d, side) for d in suite.dimensions]) for side in ("low", "high"))
    return np.asarray(100 * ((draws @ sums / counted - low) / (high - low)) @ _weights(suite))


def interval(values: Doubles) -> Interval | None:
    """The middle LEVEL of the draws that have a value; None where more than half of them have none."""
    known = values[~np.isnan(values)]
    if len(known) < COMPLETE * len(values):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def trend(by_steps: dict[int, tuple[float, Doubles]]) -> Trend | None:
    """From Total and its draws at each number of steps; None for fewer than two."""
    if len(by_steps) < 2:
        return None
    fewest, most = min(by_steps), max(by_steps)
    bounds = interval(by_steps[most][1] - by_steps[fewest][1])
    if bounds is None:
        return None
    verdict: Verdict = "improves" if bounds.low > 0 else "degrades" if bounds.high < 0 else "flat"
    return Trend(fewest, most, by_steps[most][0] - by_steps[fewest][0], bounds, verdict, _fall(by_steps))


def _fall(by_steps: dict[int, tuple[float, Doubles]]) -> Fall | None:
    """More steps than the best may do harm behind a verdict that compares the two ends."""
    best, most = max(by_steps, key=lambda steps: by_steps[steps][0]), max(by_steps)
    bounds = interval(by_steps[most][1] - by_steps[best][1])
    if best == min(by_steps) or bounds is None or bounds.high >= 0:
        return None
    return Fall(best, by_steps[most][0] - by_steps[best][0], bounds)


def _per_prompt(
    suite: Suite, scores: Sequence[VideoScore], prompts: Sequence[int]
) -> tuple[Doubles, Doubles]:
    """Sum of raw scores and number of videos that have one, each (P, D)."""
    names = [dimension.name for dimension in suite.dimensions]
    raw = np.array([[score.scores.get(name, np.nan) for name in names] for score in scores])  # (V, D)
    member = np.equal.outer(np.unique(prompts), prompts).astype(np.float64)  # (P, V)
    known = ~np.isnan(raw)
    return member @ np.where(known, raw, 0), member @ known


def _draws(prompts: int) -> Doubles:
    """How often each prompt is in each draw, (R, P); always the same, so that variants stay paired."""
    picked = np.random.default_rng(0).integers(prompts, size=(DRAWS, prompts))
    return np.stack([np.bincount(row, minlength=prompts) for row in picked]).astype(np.float64)


def _weights(suite: Suite) -> Doubles:
    """What each dimension contributes to Total, (D,)."""
    groups = suite.groups
    whole = {group: sum(d.weight for d in suite.dimensions if d.group == group) for group in groups}
    shares = [groups[d.group] * d.weight / whole[d.group] for d in suite.dimensions]
    return np.array(shares) / sum(groups.values())
