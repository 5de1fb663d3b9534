"""Flow times: shift, sampling grids, the times of a training batch and their weight w(t).

Times are in [0, 1]: 1 is noise, 0 is data. The shift applies to the uniform grid of sampling **and** to times
drawn for training. ``sample_times`` draws for the **global** batch: every rank draws all of it from an
equally seeded generator and keeps its own slice, so the paper's ratios hold for any number of ranks.

Shapes: B global batch, N steps, K times per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WeightKind = Literal["beta", "uniform", "normal"]
TimeWeight = Callable[[Tensor], Tensor]

TRAINING_TIMES = 1000  # the grid over which w(t) has mean 1


@dataclass(frozen=True)
class TimeRatios:
    """Shares of the global batch with ``r = t`` (boundary) and ``r = 0``; the rest draws r (Sec. 4.2.1)."""

    boundary: float = 0.5
    to_zero: float = 0.25

    def __post_init__(self) -> None:
        """Refuse negative shares and a sum above 1."""
        if min(self.boundary, self.to_zero) < 0 or self.boundary + self.to_zero > 1:
            raise ValueError(f"boundary={self.boundary} and to_zero={self.to_zero} are not shares of a batch")


class TimeInterval(NamedTuple):
    """Times that a network is trained on: all of [0, 1], or the part of one of two experts."""

    low: float = 0.0
    high: float = 1.0

    def shifted(self, tau: Tensor, k: float) -> Tensor:
        """Uniform numbers tau in [0, 1] as shifted times of the interval, in the proportions of ``shift``."""
        if self == WHOLE:
            return shift(tau, k)
        low, high = (end / (k + (1 - k) * end) for end in self)  # the ends before the shift
        return shift(low + (high - low) * tau, k).clamp(*self)


WHOLE = TimeInterval()


def shift(tau: Tensor, k: float) -> Tensor:
    """Shift times towards noise: ``s(tau) = k tau / (1 + (k - 1) tau)``; 0 and 1 are exact fixed points."""
    return k * tau / (1 + (k - 1) * tau)


def grid(steps: int, k: float) -> Tensor:
    """Shifted times 1 = s_0 > ... > s_N = 0 of an N-step sampler, (N + 1,) fp32."""
    return shift(torch.linspace(1, 0, steps + 1, dtype=torch.float64), k).float()


def sample_times(
    count: int,
    k: float,
    ratios: TimeRatios,
    generator: torch.Generator,
    each: int | None = None,
    interval: TimeInterval = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Draw t >= r for a global batch (Sec. 4.2.1).

    ``t = max(a, b)`` and ``r = min(a, b)`` of uniform a, b; then ``r = t`` and ``r = 0`` for their ratios,
    the shift, and a random order. On the boundary ``t == r`` holds to the bit. A ratio that is not a whole
    number of samples is rounded up or down at random, so that it is right on average even for a batch of one.

    Args:
        count: Samples B of the global batch.
        k: Shift.
        ratios: Shares with r = t and r = 0.
        generator: Equally seeded on every rank.
        each: Times K per sample; None for one. All times of a sample have the same kind of r.
        interval: Times to draw from; its start takes the place of ``r = 0``.

    Returns:
        t and r, each (B,) or, with ``each``, (B, K).
    """
    shape = (count,) if each is None else (count, each)
    a, b = torch.rand(2, *shape, generator=generator, device=generator.device)
    t, r = torch.maximum(a, b), torch.minimum(a, b)
    offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
    position = (torch.arange(count, device=generator.device) + offset) / count
    position = position if each is None else position.unsqueeze(1)
    r = torch.where(position < ratios.boundary + ratios.to_zero, 0, r)
    r = torch.where(position < ratios.boundary, t, r)
    order = torch.randperm(count, generator=generator, device=generator.device)
    return interval.shifted(t, k)[order], interval.shifted(r, k)[order]


def sample_logit_normal(
    count: int, k: float, generator: torch.Generator, interval: TimeInterval = WHOLE
) -> Tensor:
    """Draw ``t = s(sigmoid(N(0, 1)))``, (B,), for flow matching and the fake score."""
    tau = torch.randn(count, generator=generator, device=generator.device).sigmoid()
    return interval.shifted(tau, k)


def sample_uniform(
    count: int,
    k: float,
    generator: torch.Generator,
    t_min: float = 0.0,
    t_max: float = 1.0,
    interval: TimeInterval = WHOLE,
) -> Tensor:
    """Draw ``t = s(U(0, 1))``, (B,), for distribution matching, clamped to [t_min, t_max] in the interval."""
    tau = torch.rand(count, generator=generator, device=generator.device)
    return interval.shifted(tau, k).clamp(max(t_min, interval.low), min(t_max, interval.high))


def loss_weight(kind: WeightKind, k: float) -> TimeWeight:
    """Weight w(t) of Fig. 10, scaled to mean 1 over the shifted grid of training times."""
    density = _DENSITIES[kind]
    mean = density(grid(TRAINING_TIMES, k)[:-1].double()).mean().item()
    return lambda t: density(t) / mean


def _beta(t: Tensor) -> Tensor:
    return t * (1 - t).sqrt()  # Beta(2, 1.5), not normalized


def _normal(t: Tensor) -> Tensor:
    return torch.exp(-0.5 * ((t - 0.5) / 0.25) ** 2)


_DENSITIES: dict[WeightKind, TimeWeight] = {"beta": _beta, "uniform": torch.ones_like, "normal": _normal}
