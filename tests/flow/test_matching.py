"""Distribution matching between Gaussians: where its gradient vanishes, points, and leads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.losses import flow_matching_loss, interpolate
from anyflow_cli.flow.matching import (
    distribution_matching_loss,
    fake_score_loss,
    guidance_until,
    matching_gradient,
    predict_clean,
)
from anyflow_cli.flow.velocity import GuidanceScale, per_frame
from tests.flow.gaussian import SHAPE, Bent, Gaussian, Watched, normal

B = 4
T = torch.tensor([0.9, 0.7, 0.4, 0.1]).double()
EPS = normal(0, B, *SHAPE)
REAL, FAKE, NULL = (Gaussian(normal(seed, B, *SHAPE)) for seed in (1, 2, 3))
X = FAKE.mean + FAKE.std * normal(4, B, *SHAPE)


def pull(x: Tensor, fake: Gaussian, real: Gaussian, null: Gaussian, guidance: GuidanceScale = 4.0) -> Tensor:
    """Gradient on x times the number of elements, divided by the 2 of the square."""
    x = x.clone().requires_grad_()
    loss = distribution_matching_loss(x, fake, real, null, T, EPS, guidance)
    return torch.autograd.grad(loss, x)[0] * x.numel() / 2


def test_scores_predict_the_mean_of_the_clean_data() -> None:
    torch.testing.assert_close(predict_clean(REAL, X, T), REAL.clean(X, T))


def test_predictions_are_float64_in_any_precision() -> None:
    low = Bent(REAL, lambda u, z, t, r: u(z, t, r).bfloat16())
    assert predict_clean(low, X.float(), T.float()).dtype == torch.float64


def test_the_gradient_vanishes_where_fake_and_real_agree() -> None:
    """At guidance 1 the null branch does not matter; where all three agree, guidance does not."""
    assert pull(X, REAL, REAL, NULL, guidance=1.0).abs().max() < 1e-12
    assert pull(X, REAL, REAL, REAL).abs().max() < 1e-12


def test_descent_leads_from_the_fake_mean_to_the_real_one() -> None:
    """For equal widths, x0_fake - x0_real = (mean_fake - mean_real) t^2 / s_t^2."""
    got = pull(X, FAKE, REAL, REAL)
    z = interpolate(X, EPS, T)
    share = per_frame(T.square() / REAL.scale(T).square(), X)
    distance = (X - REAL.clean(z, T)).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got, (FAKE.mean - REAL.mean) * share / distance)
    assert (got * (REAL.mean - X)).sum() < 0


def test_guidance_4_extrapolates_by_three() -> None:
    """x0 = x0_c + 3 (x0_c - x0_null): guidance 4 in the usual convention, the default."""
    z = interpolate(X, EPS, T)
    x0_c, x0_null = REAL.clean(z, T), NULL.clean(z, T)
    wanted = matching_gradient(X, FAKE.clean(z, T), x0_c + 3 * (x0_c - x0_null))
    torch.testing.assert_close(pull(X, FAKE, REAL, NULL), wanted)


def test_descent_moves_the_student_to_the_real_distribution() -> None:
    """A student x = m + std eps, with the exact fake score, ends at the real mean."""
    real, mean = Gaussian(torch.full((1, 1, 1, 1, 1), 0.8).double()), torch.tensor(-0.5).double()
    for step in range(60):
        start = mean.clone().requires_grad_()
        x = start + real.std * normal(step, 64, *SHAPE)
        t = torch.rand(64, generator=torch.Generator().manual_seed(step)).double()
        fake = Gaussian(mean.expand(1, 1, 1, 1, 1), real.std)
        loss = distribution_matching_loss(x, fake, real, real, t, normal(1000 + step, 64, *SHAPE))
        mean = mean - 0.1 * torch.autograd.grad(loss, start)[0]
    assert mean.item() == pytest.approx(0.8, abs=0.05)


def test_the_distance_is_per_sample() -> None:
    """Scaling the three videos of one sample changes no sample's gradient."""
    factor = torch.tensor([1.0, 100.0, 1.0, 0.01]).double().reshape(B, 1, 1, 1, 1)
    one = matching_gradient(X, FAKE.mean, REAL.mean)
    torch.testing.assert_close(matching_gradient(factor * X, factor * FAKE.mean, factor * REAL.mean), one)


def test_undefined_directions_give_zero_gradient() -> None:
    x = X.clone()
    x[0] = REAL.mean[0]  # distance 0, fake elsewhere: infinite
    fake = FAKE.mean.clone()
    x[1] = fake[1] = REAL.mean[1]  # 0 / 0
    fake[2, 0, 0, 0, 0] = torch.nan
    gradient = matching_gradient(x, fake, REAL.mean)
    assert gradient.isfinite().all()
    assert gradient[:2].abs().max() == 0
    assert gradient[2, 0, 0, 0, 0] == 0
    assert gradient[2, 1].abs().min() > 0


def test_the_difference_is_taken_in_high_precision() -> None:
    """Predictions that agree to 1e-9 differ in float64; in fp32 the difference would be 0."""
    x, real = torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE).double()
    gradient = matching_gradient(x, real + 1e-9, real)
    torch.testing.assert_close(gradient, torch.full_like(real, 1e-9), rtol=1e-5, atol=0)


def test_the_loss_is_the_mean_square_of_the_gradient_in_the_students_dtype() -> None:
    loss = distribution_matching_loss(X.float(), FAKE, REAL, NULL, T, EPS)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(pull(X, FAKE, REAL, NULL).square().mean().item(), rel=1e-5)


def test_scores_run_without_gradient_and_the_real_one_once() -> None:
    fake, real, null = Watched(FAKE), Watched(REAL), Watched(NULL)
    distribution_matching_loss(X.clone().requires_grad_(), fake, real, null, T, EPS)
    assert [(batch, gradient) for batch, _, _, gradient in fake.calls] == [(B, False)]
    assert [(batch, gradient) for batch, _, _, gradient in real.calls] == [(2 * B, False)]


def test_the_fake_score_loss_gives_the_samples_no_gradient() -> None:
    x = X.clone().requires_grad_()
    a = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fake = Bent(FAKE, lambda u, z, t, r: u(z, t, r) + a)
    loss = fake_score_loss(fake, x, EPS, T)
    torch.testing.assert_close(loss, flow_matching_loss(FAKE, X, EPS, T))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss, x, retain_graph=True)
    (to_score,) = torch.autograd.grad(loss, a)
    torch.testing.assert_close(to_score, 2 * (FAKE(interpolate(X, EPS, T), T, T) - (EPS - X)).mean())


def test_above_a_time_the_real_score_is_not_guided() -> None:
    """To the bit what guidance 1 gives there, and what the full scale gives up to it."""
    cut, full, none = (pull(X, FAKE, REAL, NULL, scale) for scale in (guidance_until(0.7, 3.0), 3.0, 1.0))
    assert torch.equal(cut[:1], none[:1])  # at 0.9
    assert torch.equal(cut[1:], full[1:])
    assert not torch.equal(full[:1], none[:1])
    assert guidance_until(1.0, 3.0) == 3.0
