"""Algorithm 1: forward flow-map training, and the two objectives it is compared with.

``flow_map_loss`` is the algorithm; the functions above it are its equations. One network call with gradient
and one without: the null branch of the guidance and both sides of the difference quotient share the latter,
and the quotient is taken only where it counts, for samples with ``t > r``. Frames may have times of their
own, (B, F); what then is weighted and reweighted one by one is a frame, else a sample. A sample with any
``t > r`` is asked for its derivative in all frames.

Averages over ranks: each rank holds an equal slice of the global batch and the ranks' gradients are averaged,
so a loss that is a mean over its slice needs no more. Only Eq. 7 mixes samples; it takes ``global_mean``,
which a trainer replaces by a reduction over its ranks.

Shapes: B batch of this rank, F latent frames, C channels, H W latent height and width, I samples with t > r;
``(B, ...)``: (B,) where frames share their times, (B, F) where each has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_cli.flow.times import TimeWeight
from anyflow_cli.flow.velocity import (
    Velocity,
    VelocityInputs,
    batch_time,
    evaluate_together,
    flow_map,
    per_frame,
)

GlobalMean = Callable[[Tensor, Tensor], Tensor]
"""Mean of values (B, ...) where mask (B, ...) holds, over all ranks; NaN where it holds for none."""


@dataclass(frozen=True)
class FlowMapLoss:
    """The loss to descend, and the raw errors (no weight, no gradient) that tell how it is going.

    Those with t == r and the others belong apart: Eq. 7 brings them to one level in the loss
    alone.
    """

    loss: Tensor  # ()
    errors: Tensor  # (B, ...)


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Give the state at t on the straight path from data to noise: ``z_t = (1 - t) x + t eps``."""
    t = per_frame(t, x)
    return (1 - t) * x + t * eps


def fuse_guidance(u_c: Tensor, u_null: Tensor, g: Tensor | float) -> Tensor:
    """Fuse guidance into the prediction (Eq. 6): ``u = (u_c - (1 - g) sg(u_null)) / g``."""
    return (u_c - (1 - g) * u_null.detach()) / g


def difference_quotient(u_plus: Tensor, u_minus: Tensor, span: Tensor, g: Tensor | float) -> Tensor:
    """Differentiate u along the path (Eq. 4, Alg. 1): ``(u+ - u-) / (2 d g)``, span (I, ...) = 2 d."""
    return (u_plus - u_minus) / (per_frame(span, u_plus) * g)


def adaptive_weights(loss: Tensor, boundary: Tensor, global_mean: GlobalMean) -> Tensor:
    """Bring losses of t > r to the level of those of t = r (Eq. 7): w (B, ...) from losses (B, ...).

    No gradient. ``w = 1`` on the boundary, ``mean_boundary_loss / (loss + 1e-5)`` off it, of raw losses: w(t)
    comes on top, else it would cancel. A global batch without a boundary sample has no level to follow and is
    left as it is.
    """
    loss = loss.detach()
    level = global_mean(loss, boundary)
    return torch.where(boundary | level.isnan(), 1, level / (loss + 1e-5))


def local_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, ...) where mask (B, ...) holds, for a process alone; NaN where it holds for none."""
    return values[mask].mean()


def flow_map_loss(
    model: Velocity,
    null: Velocity,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    guidance: float = 3.0,
    delta: float = 0.005,
    weight: TimeWeight = torch.ones_like,
    adaptive: bool = True,
    global_mean: GlobalMean = local_mean,
    null_mask: Tensor | None = None,
) -> FlowMapLoss:
    """Algorithm 1 on data x and noise eps (B, F, C, H, W) at times t >= r, (B,) or (B, F).

    ``null`` is the same network under the negative prompt; with guidance 1 it is not evaluated. ``null_mask``
    (B,) names samples whose own condition was replaced by that prompt: for them ``u_c`` and ``u_null`` are
    the same, there is nothing to guide, g is 1 and ``u_null`` is not asked for. Without the mask they would
    be trained towards ``u = v - (t - r) / g du/dt``, which is no flow map.

    With guidance 1 and no t > r in the slice, the call without gradient is left out: ranks that must call
    alike (FSDP) then have to see to it that each has such a sample. With any other guidance all make the same
    two calls, though one may ask for nothing that is used.
    """
    z = interpolate(x, eps, t)
    v = eps - x
    g = _guidance_per_sample(guidance, null_mask, z)
    asked, of_null = VelocityInputs(model, z, t, r), VelocityInputs(null, z, t, r)
    u_null, du_dt = _null_and_derivative(asked, of_null if guidance != 1 else None, v, delta, g)

    # Guidance-fused training (Eq. 6)
    u_c = model(z, t, r)
    u = fuse_guidance(u_c, u_null, g)

    # Differential derivation equation (Eq. 3)
    u_tgt = v - per_frame(t - r, z) * du_dt

    # metric(u - sg(u_tgt)), with w(t) and Eq. 7
    error = (u - u_tgt).square().flatten(t.dim()).mean(-1)  # (B, ...)
    level = adaptive_weights(error, t == r, global_mean) if adaptive else torch.ones_like(error)
    return FlowMapLoss((weight(t) * level * error).mean(), error.detach())


def _guidance_per_sample(guidance: float, null_mask: Tensor | None, z: Tensor) -> Tensor:
    """Give g (B, 1, 1, 1, 1): the guidance, or 1 for samples under the null condition."""
    g = batch_time(guidance, z)
    return per_frame(g if null_mask is None else torch.where(null_mask, 1, g), z)


@torch.no_grad()
def _null_and_derivative(
    asked: VelocityInputs, of_null: VelocityInputs | None, v: Tensor, delta: float, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Give what takes no gradient, u_null and du/dt, each (B, F, C, H, W), in one call of G + 2 I samples.

    G is how many have g != 1; for the others u_null is 0, as it does not count.

    Both sides of the quotient stay in [r, 1], where the model is trained, and are divided by the distance
    they really have. With t in [r + d, 1 - d] that is 2 d, as in Alg. 1, and the error O(d^2). For t > 1 - d
    the quotient leans to one side and the error is O(d); for t < r + d too, but there du/dt stands times t -
    r < d.
    """
    z, t, r = asked.z, asked.t, asked.r
    inner = (t > r).reshape(len(t), -1).any(1).nonzero().squeeze(1)  # (I,)
    t_plus = (t + delta).clamp(max=1)
    t_minus = torch.maximum(t - delta, r)
    z_plus = z + per_frame(t_plus - t, z) * v
    z_minus = z - per_frame(t - t_minus, z) * v

    plus = VelocityInputs(asked.model, z_plus, t_plus, r).take(inner)
    minus = VelocityInputs(asked.model, z_minus, t_minus, r).take(inner)
    if of_null is None:
        u_null, (u_plus, u_minus) = torch.zeros_like(z), evaluate_together(plus, minus)
    else:
        guided = (g.flatten() != 1).nonzero().squeeze(1)  # (G,)
        if len(guided) + len(inner) == 0:
            guided = guided.new_zeros(1)  # the call is made all the same
        answer, u_plus, u_minus = evaluate_together(of_null.take(guided), plus, minus)
        u_null = torch.zeros_like(z).index_copy(0, guided, answer)
    du_dt = difference_quotient(u_plus, u_minus, plus.t - minus.t, g[inner])
    return u_null, torch.zeros_like(z).index_copy(0, inner, du_dt)


def flow_matching_loss(
    model: Velocity, x: Tensor, eps: Tensor, t: Tensor, weight: TimeWeight = torch.ones_like
) -> Tensor:
    """Regress u(z_t, t, t) onto v, for data x and noise eps (B, F, C, H, W) at t (B,) or (B, F)."""
    z = interpolate(x, eps, t)
    error = model(z, t, t) - (eps - x)
    return (weight(per_frame(t, z)) * error.square()).mean()


def consistency_loss(
    model: Velocity, z: Tensor, t: Tensor, x: Tensor, weight: TimeWeight = torch.ones_like
) -> Tensor:
    """Regress f(z_t, t, 0) onto x, the end of z's path: consistency ODE-init, the baseline of Table 2.

    z (B, F, C, H, W) is the state at t, (B,) or (B, F), of a path that ends in x. For the teacher's own path
    that is ODE-init to the letter. With data that keep the teacher's video x and the noise eps it was made
    from, ``interpolate(x, eps, t)`` is the path's chord: exact at t = 1 and t = 0, and one x for each z. With
    fresh noise the best f is the mean of all x behind z, a denoiser and no consistency model.
    """
    error = flow_map(model, z, t, torch.zeros_like(t)) - x
    return (weight(per_frame(t, z)) * error.square()).mean()
