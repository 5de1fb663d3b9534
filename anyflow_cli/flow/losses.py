"""Algorithm 1: forward flow-map training, and the two objectives that it is compared with.

``flow_map_loss`` is the algorithm; the functions above it are its equations. It makes one network call with
gradient and one without: the null branch of the guidance and both sides of the difference quotient share the
latter, and only samples with ``t > r`` are in the quotient. On the guided path the null branch is a call of
its own, since the quotient moves along what it gives. Frames may have times of their own, (B, F);
weights then apply per frame, else per sample. For a sample with any ``t > r`` the derivative is computed in
all frames.

Means over ranks: each rank holds an equal slice of the global batch and gradients are averaged over ranks, so
a loss that is a mean over its slice needs no reduction. Only Eq. 7 mixes samples; it takes ``global_mean``,
which a trainer replaces by a reduction over its ranks.

Shapes: B samples of this rank, F latent frames, C channels, H W latent height and width, I samples with t >
r, G samples with guidance other than 1; ``(B, ...)`` is (B,) where frames share their times, else (B, F).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
"""Mean of values (B, ...) where mask (B, ...) is true, over all ranks; NaN where it is true nowhere."""

LossScale = Literal["raw", "weighted"]
"""The loss that Eq. 7 levels: the raw error, or the error times w(t)."""

GuidancePath = Literal["data", "guided"]
"""The path of du/dt under guidance: the data's, as in Alg. 1, or that of the guided velocity."""


@dataclass(frozen=True)
class FlowMapLoss:
    """The loss to minimize, and the raw errors (unweighted, without gradient) to report.

    Report errors of t == r and of t > r apart: Eq. 7 brings them to one scale in the loss only.
    """

    loss: Tensor  # ()
    errors: Tensor  # (B, ...)


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """State at t on the straight path from data to noise (Alg. 1): ``z_t = (1 - t) x + t eps``."""
    t = per_frame(t, x)
    return (1 - t) * x + t * eps


def fuse_guidance(u_c: Tensor, u_null: Tensor, g: Tensor | float) -> Tensor:
    """Fuse guidance into the prediction (Eq. 6): ``u = (u_c - (1 - g) sg(u_null)) / g``."""
    return (u_c - (1 - g) * u_null.detach()) / g


def difference_quotient(u_plus: Tensor, u_minus: Tensor, span: Tensor, g: Tensor | float) -> Tensor:
    """Derivative of u on the path (Eq. 4, Alg. 1): ``(u+ - u-) / (2 delta g)``, span = 2 delta (I, ...)."""
    return (u_plus - u_minus) / (per_frame(span, u_plus) * g)


def adaptive_weights(loss: Tensor, boundary: Tensor, global_mean: GlobalMean) -> Tensor:
    """Weights w (B, ...) that scale losses at t > r (B, ...) to the mean loss at t = r (Eq. 7).

    ``w = 1`` on the boundary (t = r), ``mean_boundary_loss / (loss + 1e-5)`` off it, without gradient. The
    losses are raw: w(t) is applied afterwards, else it would cancel. In a global batch without a boundary
    sample all weights are 1.
    """
    loss = loss.detach()
    scale = global_mean(loss, boundary)
    return torch.where(boundary | scale.isnan(), 1, scale / (loss + 1e-5))


def local_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``GlobalMean`` of a single process: mean of values (B, ...) where mask (B, ...) is true."""
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
    loss_scale: LossScale = "raw",
    guidance_path: GuidancePath = "data",
    global_mean: GlobalMean = local_mean,
    null_mask: Tensor | None = None,
    t_max: float = 1.0,
) -> FlowMapLoss:
    """Forward flow-map training (Alg. 1; Eq. 3, 4, 6, 7).

    With guidance 1 and no t > r in the slice, the call without gradient is skipped: ranks that must call the
    network equally often (FSDP) then need such a sample each. With any other guidance all ranks make the same
    two calls.

    Args:
        model: The network under the prompts.
        null: The same network under the negative prompt; not evaluated with guidance 1.
        x: Data (B, F, C, H, W).
        eps: Noise (B, F, C, H, W).
        t: Start times of the jumps, (B,) or (B, F).
        r: End times, r <= t, in the shape of t.
        guidance: g of Eq. 6.
        delta: Half the span of the difference quotient (Eq. 4).
        weight: w(t), see ``times.loss_weight``.
        adaptive: Whether to apply Eq. 7.
        loss_scale: What Eq. 7 levels. With ``weighted``, as in the published code, w(t) cancels for t > r.
        guidance_path: ``data`` is Alg. 1. ``guided`` takes u_null at (t, t) and du/dt along the guided
            velocity ``w = g v + (1 - g) u_null``: the jumps then compose to the flow of w for every g. Both
            agree for g = 1 and on the boundary.
        global_mean: Mean over all ranks, for Eq. 7.
        null_mask: (B,) marks samples whose prompt was replaced by the negative one. For them ``u_c`` and
            ``u_null`` agree, so g is 1 and ``u_null`` is not evaluated. Without the mask they would be
            trained towards ``u = v - (t - r) / g du/dt``, which is not a flow map.
        t_max: Last time that the network is trained at.
    """
    z = interpolate(x, eps, t)
    v = eps - x
    g = batch_time(guidance, z)
    g = per_frame(g if null_mask is None else torch.where(null_mask, 1, g), z)
    cond, uncond = VelocityInputs(model, z, t, r), VelocityInputs(null, z, t, r)
    if guidance_path == "guided" and guidance != 1:
        u_null = _null(VelocityInputs(null, z, t, t), g)
        if bool((t == r).all()):
            with torch.no_grad():
                evaluate_together(cond.select(t.new_zeros(1, dtype=torch.long)))  # all ranks make the call
        _, du_dt = _null_and_derivative(cond, None, g * v + (1 - g) * u_null, delta, g, t_max)
    else:
        u_null, du_dt = _null_and_derivative(cond, uncond if guidance != 1 else None, v, delta, g, t_max)

    # Guidance-fused training (Eq. 6)
    u_c = model(z, t, r)
    u = fuse_guidance(u_c, u_null, g)

    # Differential derivation equation (Eq. 3)
    u_tgt = v - per_frame(t - r, z) * du_dt

    # metric(u - sg(u_tgt)), with w(t) and Eq. 7
    error = (u - u_tgt).square().flatten(t.dim()).mean(-1)  # (B, ...)
    leveled = error if loss_scale == "raw" else weight(t) * error
    scale = adaptive_weights(leveled, t == r, global_mean) if adaptive else torch.ones_like(error)
    return FlowMapLoss((weight(t) * scale * error).mean(), error.detach())


@torch.no_grad()
def _null(uncond: VelocityInputs, g: Tensor) -> Tensor:
    """Compute u_null (B, F, C, H, W) without gradient where g is not 1; 0 elsewhere."""
    guided = (g.flatten() != 1).nonzero().squeeze(1)  # (G,)
    if len(guided) == 0:
        guided = guided.new_zeros(1)  # all ranks make the call
    (u_guided,) = evaluate_together(uncond.select(guided))
    return torch.zeros_like(uncond.z).index_copy(0, guided, u_guided)


@torch.no_grad()
def _null_and_derivative(
    cond: VelocityInputs,
    uncond: VelocityInputs | None,
    v: Tensor,
    delta: float,
    g: Tensor,
    t_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute u_null and du/dt without gradient, (B, F, C, H, W) each, in one forward of G + 2I samples.

    Where g is 1, u_null has no effect and is 0.

    Both sides of the quotient stay in [r, t_max], where the model is trained, and are divided by their true
    distance. For t in [r + delta, t_max - delta] that is 2 delta, as in Alg. 1, and the error is O(delta^2).
    Beyond, the quotient is one-sided and the error O(delta); for t < r + delta Eq. 3 multiplies it by t - r <
    delta.
    """
    z, t, r = cond.z, cond.t, cond.r
    inner = (t > r).reshape(len(t), -1).any(1).nonzero().squeeze(1)  # (I,)
    t_plus = (t + delta).clamp(max=t_max)
    t_minus = torch.maximum(t - delta, r)
    z_plus = z + per_frame(t_plus - t, z) * v
    z_minus = z - per_frame(t - t_minus, z) * v

    plus = VelocityInputs(cond.model, z_plus, t_plus, r).select(inner)
    minus = VelocityInputs(cond.model, z_minus, t_minus, r).select(inner)
    if uncond is None:
        u_null, (u_plus, u_minus) = torch.zeros_like(z), evaluate_together(plus, minus)
    else:
        guided = (g.flatten() != 1).nonzero().squeeze(1)  # (G,)
        if len(guided) + len(inner) == 0:
            guided = guided.new_zeros(1)  # all ranks make the call
        u_guided, u_plus, u_minus = evaluate_together(uncond.select(guided), plus, minus)
        u_null = torch.zeros_like(z).index_copy(0, guided, u_guided)
    du_dt = difference_quotient(u_plus, u_minus, plus.t - minus.t, g[inner])
    return u_null, torch.zeros_like(z).index_copy(0, inner, du_dt)


def flow_matching_loss(
    model: Velocity, x: Tensor, eps: Tensor, t: Tensor, weight: TimeWeight = torch.ones_like
) -> Tensor:
    """Flow matching, the case t = r of Eq. 3: ``w(t) |u(z_t, t, t) - v|^2``.

    Args:
        model: The network.
        x: Data (B, F, C, H, W).
        eps: Noise (B, F, C, H, W).
        t: Times, (B,) or (B, F).
        weight: w(t).
    """
    z = interpolate(x, eps, t)
    error = model(z, t, t) - (eps - x)
    return (weight(per_frame(t, z)) * error.square()).mean()


def consistency_loss(
    model: Velocity, z: Tensor, t: Tensor, x: Tensor, weight: TimeWeight = torch.ones_like
) -> Tensor:
    """Consistency ODE-init, the baseline of Table 2: ``w(t) |f(z_t, t, 0) - x|^2``.

    On the teacher's own path that is ODE-init as published. With the teacher's video x and the noise eps that
    it was sampled from, ``interpolate(x, eps, t)`` is the path's chord: exact at t = 0 and t = 1, and one x
    for each z. With fresh noise the best f is the mean of all x behind z, a denoiser instead of a consistency
    model.

    Args:
        model: The network.
        z: States (B, F, C, H, W) of a path that ends in x.
        t: Their times, (B,) or (B, F).
        x: Ends of the paths (B, F, C, H, W).
        weight: w(t).
    """
    error = flow_map(model, z, t, torch.zeros_like(t)) - x
    return (weight(per_frame(t, z)) * error.square()).mean()
