"""Distribution matching between Gaussians: where its gradient vanishes, points, and leads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.losses import flow_matching_loss, interpolate
from anyflow_cli.flow.matching import (
    Renoising,
    distribution_matching_loss,
    fake_free_matching_loss,
    fake_score_loss,
    guidance_until,
    implied_velocity,
    matching_gradient,
    predict_clean,
)
from anyflow_cli.flow.velocity import GuidanceScale, Velocity, VelocityInputs, per_frame
from tests.flow.gaussian import SHAPE, Bent, Gaussian, Watched, normal

B = 4
T = torch.tensor([0.9, 0.7, 0.4, 0.1]).double()
EPS = normal(0, B, *SHAPE)
REAL, FAKE, NULL = (Gaussian(normal(seed, B, *SHAPE)) for seed in (1, 2, 3))
X = FAKE.mean + FAKE.std * normal(4, B, *SHAPE)


def pull(
    x: Tensor, fake: Gaussian, real: Gaussian, null: Gaussian, guidance: GuidanceScale = 4.0, **options: Any
) -> Tensor:
    """Gradient on x times the number of elements, divided by the 2 of the square."""
    x = x.clone().requires_grad_()
    loss = distribution_matching_loss(x, fake, real, null, T, EPS, guidance, **options)
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


# A gradient without its part along the fake score's residual (PDMD)


def test_the_orthogonal_gradient_has_no_part_along_the_residual() -> None:
    """Of 32 dimensions one is removed, so it keeps nearly all of its length; the exact student has none."""
    fake, real, x = (normal(seed, B, 8, 1, 2, 2) for seed in (5, 6, 7))
    gradient, full = (matching_gradient(x, fake, real, orthogonal=cut) for cut in (True, False))
    along = (gradient * (fake - x)).flatten(1).sum(1)
    torch.testing.assert_close(along, torch.zeros(B).double(), rtol=0, atol=1e-12)
    distance = (x - real).abs().flatten(1).mean(1)
    removed = (full - gradient) * per_frame(distance, x)
    for sample in range(B):  # a multiple of the residual
        ratio = removed[sample] / (fake - x)[sample]
        torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))
    assert pull(X, REAL, REAL, REAL, orthogonal=True).abs().max() < 1e-12


def test_the_orthogonal_gradient_keeps_the_signal_of_many_dimensions() -> None:
    """The share of the gradient on a student's mean grows with the dimensions: nothing is left of one."""

    def kept(dimensions: int) -> float:
        real, fake = (Gaussian(torch.full((1, 1, 1, 1, 1), m).double()) for m in (0.7, 0.5))
        x = fake.mean + fake.std * normal(8, 512, dimensions, 1, 1, 1)
        t, eps = torch.full((512,), 0.6).double(), normal(9, 512, dimensions, 1, 1, 1)
        z = interpolate(x, eps, t)
        full, cut = (
            matching_gradient(x, fake.clean(z, t), real.clean(z, t), orthogonal=orthogonal).mean().item()
            for orthogonal in (False, True)
        )
        return cut / full

    assert abs(kept(1)) < 1e-6
    assert 0.6 < kept(8) < kept(64)
    assert kept(64) > 0.97


def test_a_residual_of_zero_leaves_the_gradient() -> None:
    plain, cut = (matching_gradient(X, X, REAL.mean, orthogonal=orthogonal) for orthogonal in (False, True))
    assert torch.equal(cut, plain)


# Guidance at times and noise of its own (decoupled DMD)

ELSEWHERE = Renoising(torch.tensor([0.3, 0.2, 0.5, 0.05]).double(), normal(10, B, *SHAPE))


def test_guidance_at_the_same_times_and_noise_is_the_gradient_of_eq_5() -> None:
    same = pull(X, FAKE, REAL, NULL, guidance_at=Renoising(T, EPS))
    torch.testing.assert_close(same, pull(X, FAKE, REAL, NULL), rtol=1e-12, atol=1e-12)
    elsewhere = pull(X, FAKE, REAL, NULL, guidance_at=ELSEWHERE)
    assert (elsewhere - same).abs().max() > 0.01


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_the_guidance_term_is_taken_from_its_own_state_alone(guidance: float) -> None:
    """``(g - 1) (x0_c - x0_null)``; the scores are compared without guidance."""
    z, z_at = interpolate(X, EPS, T), interpolate(X, ELSEWHERE.eps, ELSEWHERE.t)
    term = (guidance - 1) * (REAL.clean(z_at, ELSEWHERE.t) - NULL.clean(z_at, ELSEWHERE.t))
    wanted = matching_gradient(X, FAKE.clean(z, T), REAL.clean(z, T) + term)
    torch.testing.assert_close(pull(X, FAKE, REAL, NULL, guidance, guidance_at=ELSEWHERE), wanted)


def test_guidance_elsewhere_takes_one_more_evaluation_in_the_same_call() -> None:
    fake, real = Watched(FAKE), Watched(REAL)
    distribution_matching_loss(X, fake, real, Watched(NULL, real.calls), T, EPS, guidance_at=ELSEWHERE)
    assert [len(t) for _, t, _, _ in fake.calls] == [B]
    ((batch, t, r, gradient),) = real.calls
    assert (batch, gradient) == (3 * B, False)
    assert torch.equal(t, r)
    torch.testing.assert_close(t, torch.cat((T, ELSEWHERE.t, ELSEWHERE.t)))


# Without a fake score (FSF-DMD)

ZERO = torch.zeros(B).double()


def fake_free(x: Tensor, student: Velocity, real: Gaussian, r: Tensor = ZERO, **options: Any) -> Tensor:
    """Gradient on x, as ``pull``."""
    x = x.clone().requires_grad_()
    loss = fake_free_matching_loss(x, student, real, real, T, EPS, r=r, **options)
    return torch.autograd.grad(loss, x)[0] * x.numel() / 2


@pytest.mark.parametrize("r", [ZERO, 0.5 * T])
def test_a_students_jumps_imply_its_velocity(r: Tensor) -> None:
    """Off by (1 - df/dz) times the difference from the tangent, up to delta squared; df/dz = s_r / s_t."""
    z, w = interpolate(X, EPS, T), REAL(interpolate(X, EPS, T), T, T)
    slope = per_frame(FAKE.scale(r) / FAKE.scale(T), X)
    wanted = w - slope * (w - FAKE(z, T, T))
    errors = [
        (implied_velocity(VelocityInputs(FAKE, z, T, r), w, delta) - wanted).abs().max().item()
        for delta in (0.02, 0.01)
    ]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_without_a_fake_score_the_exact_student_has_no_gradient_and_another_is_pulled_back() -> None:
    assert fake_free(X, REAL, REAL).abs().max() < 1e-3
    other = fake_free(FAKE.mean + FAKE.std * normal(4, B, *SHAPE), FAKE, REAL)
    assert ((other * (REAL.mean - FAKE.mean)).flatten(1).sum(1) < 0).all()


def test_the_diagonal_of_the_student_does_not_matter() -> None:
    """It is near the data's velocity by the joint loss, whatever the student's samples are."""
    broken = Bent(FAKE, lambda u, z, t, r: torch.where(per_frame(t == r, z), torch.nan, u(z, t, r)))
    torch.testing.assert_close(fake_free(X, broken, REAL), fake_free(X, FAKE, REAL))


def test_a_jumps_average_velocity_alone_would_shrink_the_samples() -> None:
    """u(z, t, 0) leads to a sample, not to the mean behind z: it has a gradient at the exact student."""
    real = Gaussian(torch.zeros(1, 1, 1, 1, 1).double())
    noise, eps = normal(5, 512, *SHAPE), normal(6, 512, *SHAPE)
    t = torch.rand(512, generator=torch.Generator().manual_seed(0)).double()
    std = torch.tensor(real.std).double().requires_grad_()
    jump_alone = Bent(real, lambda u, z, t, r: u(z, t, 0 * r))
    implied = fake_free_matching_loss(std * noise, real, real, real, t, eps, r=0 * t)
    average = distribution_matching_loss(std * noise, jump_alone, real, real, t, eps)
    assert torch.autograd.grad(implied, std)[0].abs() < 1e-4
    assert torch.autograd.grad(average, std)[0] > 0.1


def test_descent_without_a_fake_score_moves_the_student_to_the_real_distribution() -> None:
    real, mean = Gaussian(torch.full((1, 1, 1, 1, 1), 0.8).double()), torch.tensor(-0.5).double()
    for step in range(60):
        start = mean.clone().requires_grad_()
        x = start + real.std * normal(step, 64, *SHAPE)
        t = torch.rand(64, generator=torch.Generator().manual_seed(step)).double()
        student = Gaussian(mean.expand(1, 1, 1, 1, 1), real.std)
        loss = fake_free_matching_loss(x, student, real, real, t, normal(1000 + step, 64, *SHAPE), r=0 * t)
        mean = mean - 0.1 * torch.autograd.grad(loss, start)[0]
    assert mean.item() == pytest.approx(0.8, abs=0.05)


def test_without_a_fake_score_the_teacher_is_followed_by_one_call_of_the_student() -> None:
    """Within the student's own times, at both ends of the quotient."""
    student, real = Watched(FAKE), Watched(REAL)
    r = torch.full((B,), 0.09).double()
    fake_free_matching_loss(X, student, real, real, T, EPS, r=r, delta=0.2, t_max=0.95)
    assert [(batch, gradient) for batch, _, _, gradient in real.calls] == [(2 * B, False)]
    ((batch, t, to, gradient),) = student.calls
    assert (batch, gradient) == (3 * B, False)
    assert torch.equal(to, r.repeat(3))
    assert t.max() <= 0.95
    assert (t >= to).all()


def test_both_variants_of_the_gradient_combine() -> None:
    cut = fake_free(X, FAKE, REAL, orthogonal=True)
    assert (cut - fake_free(X, FAKE, REAL)).abs().max() > 1e-3
