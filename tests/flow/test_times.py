"""Times: exact shift, ratios of a global batch, distributions against their closed forms."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.times import (
    TimeRatios,
    grid,
    loss_weight,
    sample_logit_normal,
    sample_times,
    sample_uniform,
    shift,
)

K = 5.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unshift(t: Tensor, k: float = K) -> Tensor:
    """Invert the shift: tau = t / (k - (k - 1) t)."""
    t = t.double()
    return t / (k - (k - 1) * t)


def distance(cdf: Tensor) -> float:
    """Kolmogorov-Smirnov distance times root n, given the closed form at the samples: 1.95 has p = 0.001."""
    ranks = torch.arange(1, len(cdf) + 1) / len(cdf)
    return float((cdf.double().sort().values - ranks).abs().max()) * math.sqrt(len(cdf))


def test_the_grid_of_four_steps_equals_that_of_wan() -> None:
    assert grid(4, 5.0).tolist() == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0], abs=1e-7)
    assert grid(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_grids_fall_from_one_to_zero_exactly(steps: int) -> None:
    times = grid(steps, K)
    assert times.dtype == torch.float32
    assert len(times) == steps + 1
    assert times[[0, -1]].tolist() == [1, 0]
    assert (times.diff() < 0).all()


def test_shift_is_inverted_by_its_inverse_and_keeps_the_ends() -> None:
    tau = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(unshift(shift(tau, K)), tau)
    assert shift(torch.tensor([0.0, 1.0]), K).tolist() == [0, 1]
    assert torch.equal(shift(tau, 1.0), tau)


@pytest.mark.parametrize("count", [4, 8, 16, 32, 48])
@pytest.mark.parametrize("seed", range(3))
def test_shares_of_the_global_batch_are_exact(count: int, seed: int) -> None:
    t, r = sample_times(count, K, TimeRatios(0.5, 0.25), generator(seed))
    assert int((t == r).sum()) == count // 2
    assert int((r == 0).sum()) == count // 4
    assert (r <= t).all()
    assert ((t > 0) & (t <= 1)).all()


@pytest.mark.parametrize(
    ("ratios", "boundary", "zero"), [((1, 0), 10, 0), ((0, 1), 0, 10), ((0.3, 0.5), 3, 5)]
)
def test_shares_can_be_changed(ratios: tuple[float, float], boundary: int, zero: int) -> None:
    t, r = sample_times(10, K, TimeRatios(*ratios), generator())
    assert (int((t == r).sum()), int((r == 0).sum())) == (boundary, zero)


def test_a_small_batch_has_its_shares_on_average() -> None:
    draws = generator()
    times = [sample_times(1, K, TimeRatios(0.5, 0.25), draws) for _ in range(4000)]
    boundary = sum(bool(t == r) for t, r in times) / len(times)
    zero = sum(bool(r == 0) for _, r in times) / len(times)
    assert boundary == pytest.approx(0.5, abs=0.03)
    assert zero == pytest.approx(0.25, abs=0.03)


def test_three_samples_have_their_share_rounded_up_or_down() -> None:
    draws = generator()
    counts = {int((t == r).sum()) for t, r in (sample_times(3, K, TimeRatios(), draws) for _ in range(50))}
    assert counts == {1, 2}


def test_kinds_are_not_in_a_fixed_order() -> None:
    draws = generator()
    at_first = sum(
        bool(t[0] == r[0]) for t, r in (sample_times(8, K, TimeRatios(), draws) for _ in range(400))
    )
    assert 140 < at_first < 260


def test_t_is_the_shifted_maximum_of_two_for_every_kind() -> None:
    """P(max(a, b) <= tau) = tau^2, for boundary samples too: the density p(t) = 2 t of Fig. 10a."""
    t, r = sample_times(20000, K, TimeRatios(0.5, 0.25), generator())
    for kind in (t == r, r == 0, (r > 0) & (r < t)):
        assert distance(unshift(t[kind]).square()) < 1.95
        assert distance(unshift(t[kind], 1.0).square()) > 10  # what a missing shift looks like


def test_free_r_is_the_shifted_minimum_of_two() -> None:
    t, r = sample_times(20000, K, TimeRatios(0, 0), generator())
    assert distance(1 - (1 - unshift(r)).square()) < 1.95
    assert distance(unshift(r) / unshift(t)) < 1.95  # uniform below t, before the shift


def test_times_depend_on_the_seed_only() -> None:
    first, second = (sample_times(8, K, TimeRatios(), generator(3)) for _ in range(2))
    other, _ = sample_times(8, K, TimeRatios(), generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other)


@pytest.mark.parametrize("ratios", [(0.8, 0.3), (-0.1, 0.2), (0.5, -0.1)])
def test_invalid_shares_are_refused(ratios: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="shares"):
        TimeRatios(*ratios)


def test_logit_normal_times() -> None:
    t = sample_logit_normal(20000, K, generator())
    assert distance(torch.special.ndtr(unshift(t).logit())) < 1.95


def test_uniform_times_are_shifted_and_clamped() -> None:
    t = sample_uniform(20000, K, generator())
    assert distance(unshift(t)) < 1.95
    held = sample_uniform(20000, K, generator(), 0.1, 0.9)
    assert torch.equal(held, t.clamp(0.1, 0.9))


@pytest.mark.parametrize("kind", ["beta", "uniform", "normal"])
@pytest.mark.parametrize("k", [1.0, 5.0])
def test_weights_have_mean_one_over_the_shifted_training_times(
    kind: Literal["beta", "uniform", "normal"], k: float
) -> None:
    times = shift(torch.arange(1, 1001, dtype=torch.float64) / 1000, k)
    assert loss_weight(kind, k)(times).mean().item() == pytest.approx(1, abs=1e-6)


def test_beta_weight_has_its_shape() -> None:
    """Beta(2, 1.5): 0 at both ends, its mode at 2/3, w(t) proportional to t (1 - t)^0.5."""
    weight = loss_weight("beta", K)
    t = torch.linspace(0, 1, 301, dtype=torch.float64)
    w = weight(t)
    assert w[[0, -1]].tolist() == [0, 0]
    assert t[w.argmax()].item() == pytest.approx(2 / 3)
    assert (w[150] / w[75]).item() == pytest.approx((0.5 * 0.5**0.5) / (0.25 * 0.75**0.5))


def test_normal_and_uniform_weights_have_their_shape() -> None:
    t = torch.tensor([0.25, 0.5, 0.75])
    w = loss_weight("normal", K)(t)
    assert (w[0] / w[1]).item() == pytest.approx(torch.tensor(-0.5).exp().item())  # one deviation of 0.25 off
    assert w[0].item() == pytest.approx(w[2].item())
    assert loss_weight("uniform", K)(t).tolist() == [1, 1, 1]
