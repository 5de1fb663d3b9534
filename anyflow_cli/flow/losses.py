"""Algorithm 1: forward flow-map training, and the two objectives that it is compared with.

``flow_map_loss`` is the algorithm; the functions above it are its equations. It makes one network call with
gradient and one without: the null branch of the guidance and both sides of the difference quotient share the
latter, and only samples with ``t > r`` are in the quotient. On the guided path the null branch is a call of
its own, since the quotient moves along what it gives; a teacher's velocity is a call of the teacher, and a
composition two calls, one after the other. Frames may have times of their own, (B, F); weights then apply per
frame, else per sample. For a sample with any ``t > r`` the target for t > r is computed in all frames.

Means over ranks: each rank holds an equal slice of the global batch and gradients are averaged over ranks, so
a loss that is a mean over its slice needs no reduction. Only Eq. 7 mixes samples; it takes ``global_mean``,
which a trainer replaces by a reduction over its ranks.

Shapes: B samples of this rank, F latent frames, C channels, H W latent height and width, I samples with t >
r, G samples with guidance other than 1; ``(B, ...)`` is (B,) where frames share their times, else (B, F).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from anyflow_cli.flow.times import TimeWeight
from anyflow_cli.flow.velocity import (
    Velocity,
    VelocityInputs,
    along_path,
    batch_time,
    evaluate_together,
    flow_map,
    in_fp32,
    per_frame,
)


class GlobalMean(Protocol):
    """Mean over all ranks."""

    def __call__(self, values: Tensor, mask: Tensor, name: str = "boundary") -> Tensor:
        """Mean of values (B, ...) where mask (B, ...) is true, anywhere; NaN if nowhere.

        ``name`` tells means of one step apart.
        """


LossScale = Literal["raw", "weighted"]
"""The loss that Eq. 7 levels: the raw error, or the error times w(t)."""

Adaptive = Literal["off", "group", "sample"]
"""What Eq. 7 scales to the boundary's loss: nothing, all losses at t > r by one factor, or each of them."""

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


def adaptive_weights(
    loss: Tensor, boundary: Tensor, global_mean: GlobalMean, adaptive: Adaptive = "sample"
) -> Tensor:
    """Weights w (B, ...) that scale losses at t > r (B, ...) to the mean loss at t = r (Eq. 7).

    ``w = 1`` on the boundary (t = r), ``mean_boundary_loss / (loss + 1e-5)`` off it, without gradient. The
    losses are raw: w(t) is applied afterwards, else it would cancel. In a global batch without a boundary
    sample all weights are 1. With ``group`` the divisor is the mean loss at t > r (with gradient
    accumulation, over the micro-batches so far), which keeps the ratios between samples.
    """
    loss = loss.detach()
    if adaptive == "off":
        return torch.ones_like(loss)
    scale = global_mean(loss, boundary)
    level = loss if adaptive == "sample" else global_mean(loss, ~boundary, "inner")
    return torch.where(boundary | scale.isnan(), 1, scale / (level + 1e-5))


def local_mean(values: Tensor, mask: Tensor, name: str = "boundary") -> Tensor:
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
    adaptive: Adaptive = "sample",
    loss_scale: LossScale = "raw",
    guidance_path: GuidancePath = "data",
    teacher: Velocity | None = None,
    s: Tensor | None = None,
    fp32_target: bool = False,
    global_mean: GlobalMean = local_mean,
    null_mask: Tensor | None = None,
    t_max: float = 1.0,
) -> FlowMapLoss:
    """Forward flow-map training (Alg. 1; Eq. 3, 4, 6, 7), and variants of its target.

    With guidance 1, no teacher, no s and no t > r in the slice, the call without gradient is skipped: ranks
    that must call the network equally often (FSDP) then need such a sample each. Otherwise all ranks make
    the same calls.

    Args:
        model: The network under the prompts.
        null: The same network under the negative prompt; not evaluated with guidance 1 or a teacher.
        x: Data (B, F, C, H, W).
        eps: Noise (B, F, C, H, W).
        t: Start times of the jumps, (B,) or (B, F); like r, s and the mask, best on the host.
        r: End times, r <= t, in the shape of t.
        guidance: g of Eq. 6.
        delta: Half the span of the difference quotient (Eq. 4).
        weight: w(t), see ``times.loss_weight``.
        adaptive: What Eq. 7 scales.
        loss_scale: What Eq. 7 levels. With ``weighted``, as in the published code, w(t) cancels for t > r.
        guidance_path: ``data`` is Alg. 1. ``guided`` takes u_null at (t, t) and du/dt along the guided
            velocity ``w = g v + (1 - g) u_null``: the jumps then compose to the flow of w for every g. Both
            agree for g = 1 and on the boundary.
        teacher: A velocity v(z, t), guided already, that replaces eps - x in the target and on the path. The
            target then has no noise, and the network learns the teacher's flow map without Eq. 6.
        s: Times between r and t, in their shape: the target for t > r is then the composition of the
            network's own jumps t -> s -> r, ``((t - s) u(z, t, s) + (s - r) u(z_s, s, r)) / (t - r)``. Only
            boundary samples tell it which flow to learn: without them every flow map has zero loss. Under
            guidance it learns the flow of w, as with a guided path.
        fp32_target: Whether to evaluate the network outside autocast for the target.
        global_mean: Mean over all ranks, for Eq. 7.
        null_mask: Samples (B,) whose prompt was replaced by the negative one. There ``u_c = u_null``, g is
            1 and ``u_null`` not evaluated; else they would learn v - (t - r) / g du/dt, not a flow map.
        t_max: Last time that the network is trained at.
    """
    # Which samples are evaluated follows from t, r and the mask where these are: on the host nothing waits.
    inner, boundary = (mask.reshape(len(t), -1).any(1) for mask in (t > r, t == r))
    has_text = torch.ones_like(inner) if null_mask is None else ~null_mask
    t, r, s = t.to(x.device), r.to(x.device), None if s is None else s.to(x.device)
    z, v, g = interpolate(x, eps, t), eps - x, batch_time(guidance, x)
    g = per_frame(torch.where(has_text.to(x.device), g, 1), z)
    if teacher is not None:
        v = _velocity_of(VelocityInputs(teacher, z, t, t), v, boundary if s is not None else None)
        g, guidance = torch.ones_like(g), 1.0
    cond, uncond = (VelocityInputs(in_fp32(each) if fp32_target else each, z, t, r) for each in (model, null))
    null_inputs = uncond if guidance != 1 else None
    if s is not None:
        u_null, u_tgt = _composition_target(cond, null_inputs, v, g, s, inner, has_text)
    else:
        along_w, is_taught = guidance_path == "guided" and guidance != 1, teacher is not None
        path = {"along_w": along_w, "alike": along_w or is_taught}
        u_null, u_tgt = _quotient_target(cond, null_inputs, v, g, delta, t_max, inner, has_text, **path)

    # Guidance-fused training (Eq. 6)
    u = fuse_guidance(model(z, t, r), u_null, g)

    # metric(u - sg(u_tgt)), with w(t) and Eq. 7
    error = (u - u_tgt).square().flatten(t.dim()).mean(-1)  # (B, ...)
    leveled = error if loss_scale == "raw" else weight(t) * error
    scale = adaptive_weights(leveled, t == r, global_mean, adaptive)
    return FlowMapLoss((weight(t) * scale * error).mean(), error.detach())


def _samples(mask: Tensor) -> Tensor:
    """Numbers of the samples in which a mask (B,) is true, in order."""
    return mask.nonzero().squeeze(1)


def _or_first(index: Tensor) -> Tensor:
    """The samples, or the first one where there is none: all ranks make the same calls."""
    return index if len(index) else index.new_zeros(1)


@torch.no_grad()
def _velocity_of(inputs: VelocityInputs, default: Tensor, where: Tensor | None) -> Tensor:
    """Evaluate a velocity without gradient in the samples of a mask (B,), or all; elsewhere a default."""
    index = torch.arange(len(default)) if where is None else _or_first(_samples(where))
    (found,) = evaluate_together(inputs.select(index.to(default.device)))
    return default.index_copy(0, index.to(default.device), found)


@torch.no_grad()
def _quotient_target(
    cond: VelocityInputs,
    uncond: VelocityInputs | None,
    v: Tensor,
    g: Tensor,
    delta: float,
    t_max: float,
    inner: Tensor,
    has_text: Tensor,
    *,
    along_w: bool,
    alike: bool,
) -> tuple[Tensor, Tensor]:
    """Compute u_null and the target of the differential derivation equation (Eq. 3), both without gradient.

    Args:
        cond: The network at (z, t, r).
        uncond: Its null branch; None without guidance.
        v: Instantaneous velocity of the path (B, F, C, H, W).
        g: Scale of guidance, broadcast over v.
        delta: Half the span of the difference quotient.
        t_max: Last time of the network.
        inner: Which samples (B,) have a t > r.
        has_text: Which samples (B,) are guided.
        along_w: Whether the path is that of the guided velocity instead of v.
        alike: Whether a slice without t > r makes the call of the quotient too.
    """
    known, along = None, v
    if along_w and uncond is not None:
        known = _velocity_of(replace(uncond, r=cond.t), torch.zeros_like(v), has_text)
        along, uncond = g * v + (1 - g) * known, None
    if alike and not inner.any():
        evaluate_together(cond.select(cond.t.new_zeros(1, dtype=torch.long)))  # all ranks make the call
    u_null, du_dt = _null_and_derivative(cond, uncond, along, delta, g, inner, has_text, t_max)
    return (u_null if known is None else known), v - per_frame(cond.t - cond.r, v) * du_dt


@torch.no_grad()
def _composition_target(
    cond: VelocityInputs,
    uncond: VelocityInputs | None,
    v: Tensor,
    g: Tensor,
    s: Tensor,
    inner: Tensor,
    has_text: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute u_null at t = r, and as target v there and two jumps over s elsewhere, without gradient.

    Args:
        cond: The network at (z, t, r).
        uncond: Its null branch; None without guidance.
        v: Velocity of the data or of the teacher, (B, F, C, H, W).
        g: Scale of guidance, broadcast over v.
        s: Times between r and t.
        inner: Which samples (B,) have a t > r.
        has_text: Which samples (B,) are guided.
    """
    u_null = torch.zeros_like(v)
    if uncond is not None:
        u_null = _velocity_of(uncond, u_null, has_text & ~inner)
        u_null = torch.where(per_frame(inner.to(v.device), v), 0, u_null)
    index = _or_first(_samples(inner)).to(v.device)
    first, second = (each.select(index) for each in (replace(cond, r=s), replace(cond, t=s)))
    (u_first,) = evaluate_together(first)
    z_s = first.z - per_frame(first.t - first.r, first.z) * u_first
    (u_second,) = evaluate_together(replace(second, z=z_s))
    span = first.t - second.r
    share = torch.where(span == 0, 0, (second.t - second.r) / torch.where(span == 0, 1, span))
    composed = torch.lerp(u_first, u_second, per_frame(share, z_s).to(u_first.dtype))
    u_tgt = v.index_copy(0, index, fuse_guidance(composed, u_null[index], g[index]))
    return u_null, torch.where(per_frame(inner.to(v.device), v), u_tgt, v)


@torch.no_grad()
def _null_and_derivative(
    cond: VelocityInputs,
    uncond: VelocityInputs | None,
    v: Tensor,
    delta: float,
    g: Tensor,
    inner: Tensor,
    has_text: Tensor,
    t_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute u_null and du/dt without gradient, (B, F, C, H, W) each, in one forward of G + 2I samples.

    u_null is 0 but for the G samples with text, du/dt but for the I inner ones, those with t > r.

    Both sides of the quotient stay in [r, t_max], where the model is trained, and are divided by their true
    distance. For t in [r + delta, t_max - delta] that is 2 delta, as in Alg. 1, and the error is O(delta^2).
    Beyond, the quotient is one-sided and the error O(delta); for t < r + delta Eq. 3 multiplies it by t - r <
    delta.
    """
    z = cond.z
    index = _samples(inner).to(z.device)  # (I,)
    plus, minus = (each.select(index) for each in along_path(cond, v, delta, t_max))
    if uncond is None:
        u_null, (u_plus, u_minus) = torch.zeros_like(z), evaluate_together(plus, minus)
    else:
        guided = _samples(has_text).to(z.device)  # (G,)
        if len(guided) + len(index) == 0:
            guided = guided.new_zeros(1)  # all ranks make the call
        u_guided, u_plus, u_minus = evaluate_together(uncond.select(guided), plus, minus)
        u_null = torch.zeros_like(z).index_copy(0, guided, u_guided)
    du_dt = difference_quotient(u_plus, u_minus, plus.t - minus.t, g[index])
    return u_null, torch.zeros_like(z).index_copy(0, index, du_dt)


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
