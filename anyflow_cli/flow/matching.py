"""Distribution matching (Eq. 5): what pulls the student's own samples towards the teacher's distribution.

The student's sample comes from ``simulation``; here it is noised again, the real score (the teacher, guided)
and the fake score (trained on the student's samples) each predict the clean video, and their difference is
the gradient. Differences of nearly equal predictions are taken in float64, whatever autocast gave.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_cli.flow.losses import flow_matching_loss, interpolate
from anyflow_cli.flow.velocity import Velocity, guided, per_frame


def matching_gradient(x: Tensor, x0_fake: Tensor, x0_real: Tensor) -> Tensor:
    """Give Eq. 5's gradient on x (B, F, C, H, W): ``(x0_fake - x0_real) / mean|x - x0_real|``.

    The mean is per sample. A sample whose mean is zero has no direction: its NaN, and infinities with it,
    become 0.
    """
    x, x0_fake, x0_real = x.double(), x0_fake.double(), x0_real.double()
    distance = (x - x0_real).abs().flatten(1).mean(1)  # (B,)
    gradient = (x0_fake - x0_real) / per_frame(distance, x)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def predict_clean(model: Velocity, z: Tensor, t: Tensor) -> Tensor:
    """Give the clean video a score sees in z (B, F, C, H, W) at t (B,): ``x0 = z - t v``, float64."""
    return z.double() - per_frame(t, z).double() * model(z, t, t).double()


def distribution_matching_loss(
    student_x: Tensor,
    fake: Velocity,
    real: Velocity,
    real_null: Velocity,
    t: Tensor,
    eps: Tensor,
    guidance: float = 4.0,
) -> Tensor:
    """Turn Eq. 5 into a loss, ``mse(x, sg(x - gradient))``, whose value is the gradient's mean square.

    student_x, eps (B, F, C, H, W), t (B,). ``guidance`` is of the usual convention, ``x0_null + 4 (x0_c -
    x0_null)``; the fake score is conditional only. Gradient reaches ``student_x`` alone.
    """
    with torch.no_grad():
        z = interpolate(student_x, eps, t)
        x0_fake = predict_clean(fake, z, t)
        x0_real = predict_clean(guided(real, real_null, guidance), z, t)
        target = student_x.double() - matching_gradient(student_x, x0_fake, x0_real)
    return (student_x.double() - target).square().mean().to(student_x.dtype)


def fake_score_loss(fake: Velocity, student_x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Teach the fake score the student's samples (B, F, C, H, W) by flow matching; they get no gradient."""
    return flow_matching_loss(fake, student_x.detach(), eps, t)
