"""Velocity models: the one contract between the mathematics in ``flow`` and everything that predicts ``u``.

The protocol, models from closed forms, classifier-free guidance, and the flow map that follows from ``u``.
Networks are in ``anyflow_cli.model``. A model carries its condition, so that a caller may drop, repeat or
concatenate samples (``select``, ``concat``) and text, chunks and caches follow.

Shapes: B batch, F latent frames, C channels, H W latent height and width, N selected samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Velocity(Protocol):
    """Average velocity ``u(z, t, r)`` over ``[r, t]``, with the conditions of B samples bound."""

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict u (B, F, C, H, W) of z (B, F, C, H, W) at times t, r (B,) or (B, F) in [0, 1], r <= t."""

    def select(self, index: Tensor) -> Velocity:
        """Bind the conditions of the samples ``index`` (N,) only; it may repeat and reorder."""

    def concat(self, *others: Velocity) -> Velocity:
        """Bind the conditions of self and the others, concatenated along the batch."""


@dataclass(frozen=True)
class VelocityInputs:
    """Inputs of one velocity evaluation: z (B, F, C, H, W), and t, r, (B,) or (B, F)."""

    model: Velocity
    z: Tensor
    t: Tensor
    r: Tensor

    def select(self, index: Tensor) -> VelocityInputs:
        """Keep the samples ``index`` (N,)."""
        return VelocityInputs(self.model.select(index), self.z[index], self.t[index], self.r[index])


def along_path(
    inputs: VelocityInputs, v: Tensor, delta: float, t_max: float = 1.0
) -> tuple[VelocityInputs, VelocityInputs]:
    """The inputs at t + delta and t - delta on the path of velocity v (B, F, C, H, W), within [r, t_max]."""
    z, t, r = inputs.z, inputs.t, inputs.r
    t_plus, t_minus = (t + delta).clamp(max=t_max), torch.maximum(t - delta, r)
    plus, minus = z + per_frame(t_plus - t, z) * v, z - per_frame(t - t_minus, z) * v
    return VelocityInputs(inputs.model, plus, t_plus, r), VelocityInputs(inputs.model, minus, t_minus, r)


def evaluate_together(*inputs: VelocityInputs) -> tuple[Tensor, ...]:
    """Evaluate one network on several inputs in one call; each result has the shape and dtype of its z.

    Without any sample the network is not called.
    """
    z = torch.cat([each.z for each in inputs])
    if len(z) == 0:
        return tuple(each.z for each in inputs)
    model = inputs[0].model.concat(*(each.model for each in inputs[1:]))
    u = model(z, torch.cat([each.t for each in inputs]), torch.cat([each.r for each in inputs]))
    return torch.split(u.to(z.dtype), [len(each.z) for each in inputs])


def at_times(model: Velocity, t: float, r: float) -> Velocity:
    """The same velocity, to be evaluated on a batch whose samples are all at times t and r.

    Of two experts it is the one at work there, found on the host instead of by reading a device's times. A
    velocity that depends on times in this way has a method of this name.
    """
    choose: Callable[[float, float], Velocity] | None = getattr(model, "at_times", None)
    return model if choose is None else choose(t, r)


@dataclass(frozen=True)
class _Unconditional:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    choose: Callable[[float, float], Velocity] | None = None

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.function(z, t, r)

    def at_times(self, t: float, r: float) -> Velocity:
        return self if self.choose is None else self.choose(t, r)

    def select(self, index: Tensor) -> Velocity:
        return self

    def concat(self, *others: Velocity) -> Velocity:
        return self


def from_function(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    choose: Callable[[float, float], Velocity] | None = None,
) -> Velocity:
    """Velocity model of a function of (z, t, r) that has no condition; ``choose`` serves ``at_times``."""
    return _Unconditional(function, choose)


GuidanceScale = float | Callable[[Tensor], Tensor]
"""Scale of classifier-free guidance: one number, or a function of the times (B,) or (B, F)."""


@dataclass(frozen=True)
class _Guided:
    cond: Velocity
    uncond: Velocity
    scale: GuidanceScale

    @cached_property
    def _both(self) -> Velocity:
        """Both conditions, joined once for all steps: keys of a text take gigabytes."""
        return self.cond.concat(self.uncond)

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return guided_halves(self._both, self.scale)(z, t, r)

    def at_times(self, t: float, r: float) -> Velocity:
        return guided_halves(at_times(self._both, t, r), self.scale)

    def select(self, index: Tensor) -> Velocity:
        return _Guided(self.cond.select(index), self.uncond.select(index), self.scale)

    def concat(self, *others: Velocity) -> Velocity:
        parts = cast("tuple[_Guided, ...]", others)
        assert all(part.scale == self.scale for part in parts)
        cond = self.cond.concat(*(part.cond for part in parts))
        uncond = self.uncond.concat(*(part.uncond for part in parts))
        return _Guided(cond, uncond, self.scale)


def guided(cond: Velocity, uncond: Velocity, scale: GuidanceScale) -> Velocity:
    """Classifier-free guidance, ``u_null + scale (u - u_null)``, in one call of twice the batch."""
    return _Guided(cond, uncond, scale)


def guided_halves(both: Velocity, scale: GuidanceScale) -> Velocity:
    """Guidance of a velocity of both conditions; the negative one is that of its batch's second half."""

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u, u_null = both(*(torch.cat((x, x)) for x in (z, t, r))).to(z.dtype).chunk(2)
        return u_null + (per_frame(scale(t), z) if callable(scale) else scale) * (u - u_null)

    return from_function(velocity, lambda t, r: guided_halves(at_times(both, t, r), scale))


@dataclass(frozen=True)
class _Checkpointed:
    model: Velocity

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u = checkpoint(self.model, z, t, r, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(u, Tensor)
        return u

    def select(self, index: Tensor) -> Velocity:
        return _Checkpointed(self.model.select(index))

    def concat(self, *others: Velocity) -> Velocity:
        parts = cast("tuple[_Checkpointed, ...]", others)
        return _Checkpointed(self.model.concat(*(part.model for part in parts)))


def checkpointed(model: Velocity) -> Velocity:
    """The same velocity, recomputed in the backward pass instead of keeping its graph until then.

    A chain of jumps then holds the graph of one evaluation at a time. The model must be deterministic.
    """
    return _Checkpointed(model)


@dataclass(frozen=True)
class _InFp32:
    model: Velocity

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self.model(z, t, r)

    def select(self, index: Tensor) -> Velocity:
        return _InFp32(self.model.select(index))

    def concat(self, *others: Velocity) -> Velocity:
        parts = cast("tuple[_InFp32, ...]", others)
        return _InFp32(self.model.concat(*(part.model for part in parts)))


def in_fp32(model: Velocity) -> Velocity:
    """The same velocity outside autocast: in the type of its weights."""
    return _InFp32(model)


def per_frame(t: Tensor, z: Tensor) -> Tensor:
    """Reshape times t (B,) or (B, F) to broadcast over z: (B, 1, 1, 1, 1) or (B, F, 1, 1, 1)."""
    return t.reshape(*t.shape, *(1,) * (z.ndim - t.ndim))


def flow_map(model: Velocity, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Jump along the path from time t to time r (Eq. 2): ``f(z, t, r) = z - (t - r) u(z, t, r)``."""
    return z - per_frame(t - r, z) * model(z, t, r)


def batch_time(t: float, z: Tensor) -> Tensor:
    """Repeat one time for the batch of z (B, ...): (B,)."""
    return z.new_full((z.shape[0],), t)


def jump(model: Velocity, z: Tensor, t: float, r: float) -> Tensor:
    """``flow_map`` of a batch from one time to another."""
    return flow_map(at_times(model, t, r), z, batch_time(t, z), batch_time(r, z))
