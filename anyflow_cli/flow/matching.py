"""Distribution matching (Eq. 5): a gradient from the student's distribution towards the teacher's.

The student's sample (``simulation``) is noised again; the real score (the teacher, guided) and the fake score
(trained on the student's samples) each predict the clean video, and the difference of the predictions is the
gradient. ``distribution_matching_loss`` is the paper's, with two published variants: guidance at times and
noise of its own, and a gradient without its part along the fake score's residual.
``fake_free_matching_loss`` takes the student's own jumps in place of the fake score. Differences of nearly
equal predictions are computed in float64, whatever type autocast gave.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_cli.flow.losses import difference_quotient, flow_matching_loss, interpolate
from anyflow_cli.flow.velocity import (
    GuidanceScale,
    Velocity,
    VelocityInputs,
    along_path,
    evaluate_together,
    guided,
    per_frame,
)


class Renoising(NamedTuple):
    """Times (B,) and noise (B, F, C, H, W) that samples are noised with again."""

    t: Tensor
    eps: Tensor


def matching_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor, *, orthogonal: bool = False) -> Tensor:
    """Gradient of Eq. 5 on x (B, F, C, H, W): ``(x0_fake - x0_real) / mean|x - x0_real|``, float64.

    The mean is per sample. NaN and infinities, as of a sample whose mean is zero, become 0. With
    ``orthogonal``, the difference loses its projection on ``x0_fake - x``, per sample (PDMD): what the fake
    score gets wrong about a sample lies mostly along it.
    """
    x, x0_fake, x0_real = x.double(), x0_fake.double(), x0_real.double()
    distance = (x - x0_real).abs().flatten(1).mean(1)  # (B,)
    difference = x0_fake - x0_real
    if orthogonal:
        residual = x0_fake - x
        along, square = ((one * residual).flatten(1).sum(1) for one in (difference, residual))
        difference = difference - per_frame(torch.where(square > 0, along / square, 0), x) * residual
    gradient = difference / per_frame(distance, x)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def predict_clean(model: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """Clean video that a score predicts from z (B, F, C, H, W) at t (B,): ``x0 = z - t v``, float64."""
    return z.double() - per_frame(t, z).double() * model(z, t, t).double()


def guidance_until(t_max: float, scale: float) -> GuidanceScale:
    """A scale of guidance at times up to t_max, and none (1) above."""
    return scale if t_max == 1 else lambda t: torch.where(t <= t_max, scale, 1.0)


def distribution_matching_loss(
    student_x: Tensor,
    fake: Velocity,
    real: Velocity,
    real_null: Velocity,
    t: Tensor,
    eps: Tensor,
    guidance: GuidanceScale = 4.0,
    *,
    guidance_at: Renoising | None = None,
    orthogonal: bool = False,
) -> Tensor:
    """Loss with the gradient of Eq. 5, ``mse(x, sg(x - gradient))``; its value is the gradient's mean square.

    Args:
        student_x: The student's samples (B, F, C, H, W), the only input that receives gradient.
        fake: Fake score; conditional only.
        real: Real score under the prompts.
        real_null: Real score under the negative prompt.
        t: Times (B,) to noise the samples to.
        eps: Noise (B, F, C, H, W).
        guidance: Scale of the real score's guidance, ``x0_null + guidance (x0 - x0_null)``.
        guidance_at: Where the real score is guided, if not at t (decoupled DMD): the term ``(guidance - 1)
            (x0 - x0_null)``, which has no fake score, is then predicted from a state of its own.
        orthogonal: Whether the gradient is PDMD's, see ``matching_gradient``.
    """
    with torch.no_grad():
        z = interpolate(student_x, eps, t)
        x0_fake = predict_clean(fake, z, t)
        if guidance_at is None:
            x0_real = predict_clean(guided(real, real_null, guidance), z, t)
        else:
            x0_real = _guided_elsewhere(student_x, real, real_null, z, t, guidance_at, guidance)
        gradient = matching_gradient(student_x, x0_fake, x0_real, orthogonal=orthogonal)
    return _loss_with(gradient, student_x)


def fake_free_matching_loss(
    student_x: Tensor,
    student: Velocity,
    real: Velocity,
    real_null: Velocity,
    t: Tensor,
    eps: Tensor,
    guidance: GuidanceScale = 4.0,
    *,
    r: Tensor,
    delta: float = 0.005,
    t_max: float = 1.0,
    orthogonal: bool = False,
) -> Tensor:
    """Matching without a fake score: the student's jumps say what velocity its samples have (FSF-DMD).

    With the real velocity w, guided, as tangent, the student's is ``u + (t - r) (du/dt + du/dz w)`` of its
    jump f from t to r, and the difference from w is ``df/dz (w - v)``: it vanishes where the student's flow
    is the teacher's, and has the sign of the difference for any flow map, whatever its diagonal u(z, t, t)
    predicts. An error that all jumps to r share gives no gradient.

    Args:
        student_x: The student's samples (B, F, C, H, W), the only input that receives gradient.
        student: The student, evaluated without gradient.
        real: Real score under the prompts.
        real_null: Real score under the negative prompt.
        t: Times (B,) to noise the samples to.
        eps: Noise (B, F, C, H, W).
        guidance: Scale of the real score's guidance.
        r: Ends (B,) of the jumps: 0, or where the trained expert's times begin.
        delta: Half the span of the difference quotient.
        t_max: Last time that the student is trained at.
        orthogonal: Whether the gradient is PDMD's, see ``matching_gradient``.
    """
    with torch.no_grad():
        z = interpolate(student_x, eps, t)
        w = guided(real, real_null, guidance)(z, t, t).to(z.dtype)
        v = implied_velocity(VelocityInputs(student, z, t, r), w, delta, t_max)
        x0_fake, x0_real = (z.double() - per_frame(t, z).double() * each.double() for each in (v, w))
        gradient = matching_gradient(student_x, x0_fake, x0_real, orthogonal=orthogonal)
    return _loss_with(gradient, student_x)


def implied_velocity(student: VelocityInputs, w: Tensor, delta: float, t_max: float = 1.0) -> Tensor:
    """Velocity at (z, t) that a jump to r implies along w: ``u + (t - r) du/dt``, by a quotient (Eq. 4)."""
    plus, minus = along_path(student, w, delta, t_max)
    u, u_plus, u_minus = evaluate_together(student, plus, minus)
    return u + per_frame(student.t - student.r, u) * difference_quotient(
        u_plus, u_minus, plus.t - minus.t, g=1
    )


def _guided_elsewhere(
    x: Tensor,
    real: Velocity,
    real_null: Velocity,
    z: Tensor,
    t: Tensor,
    at: Renoising,
    guidance: GuidanceScale,
) -> Tensor:
    """Clean video that the real score predicts from z at t, guided by what it predicts elsewhere, float64."""
    z_at = interpolate(x, at.eps, at.t)
    inputs = ((real, z, t), (real, z_at, at.t), (real_null, z_at, at.t))
    v, v_at, null_at = evaluate_together(*(VelocityInputs(each, y, s, s) for each, y, s in inputs))
    scale = per_frame(guidance(at.t), z) if callable(guidance) else guidance
    term = (scale - 1) * per_frame(at.t, z).double() * (v_at.double() - null_at.double())
    return z.double() - per_frame(t, z).double() * v.double() - term


def _loss_with(gradient: Tensor, x: Tensor) -> Tensor:
    """Loss whose gradient on x (B, F, C, H, W) is a given one times 2 / size, in the type of x."""
    return (x.double() - (x.double() - gradient).detach()).square().mean().to(x.dtype)


def fake_score_loss(fake: Velocity, student_x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Flow-matching loss of the fake score on the student's samples (B, F, C, H, W), detached."""
    return flow_matching_loss(fake, student_x.detach(), eps, t)
