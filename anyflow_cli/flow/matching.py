"""Distribution matching (Eq. 5): a gradient from the student's distribution towards the teacher's.

The student's sample (``simulation``) is noised again; the real score (the teacher, guided) and the fake score
(trained on the student's samples) each predict the clean video, and the difference of the predictions is the
gradient. Differences of nearly equal predictions are computed in float64, whatever type autocast gave.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_cli.flow.losses import flow_matching_loss, interpolate
from anyflow_cli.flow.velocity import GuidanceScale, Velocity, guided, per_frame


def matching_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """Gradient of Eq. 5 on x (B, F, C, H, W): ``(x0_fake - x0_real) / mean|x - x0_real|``, float64.

    The mean is per sample. NaN and infinities, as of a sample whose mean is zero, become 0.
    """
    x, x0_fake, x0_real = x.double(), x0_fake.double(), x0_real.double()
    distance = (x - x0_real).abs().flatten(1).mean(1)  # (B,)
    gradient = (x0_fake - x0_real) / per_frame(distance, x)
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
    """
    with torch.no_grad():
        z = interpolate(student_x, eps, t)
        x0_fake = predict_clean(fake, z, t)
        x0_real = predict_clean(guided(real, real_null, guidance), z, t)
        target = student_x.double() - matching_gradient(student_x, x0_fake, x0_real)
    return (student_x.double() - target).square().mean().to(student_x.dtype)


def fake_score_loss(fake: Velocity, student_x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Flow-matching loss of the fake score on the student's samples (B, F, C, H, W), detached."""
    return flow_matching_loss(fake, student_x.detach(), eps, t)
