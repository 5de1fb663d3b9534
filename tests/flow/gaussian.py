"""Closed forms for Gaussian data, x ~ N(mean, std^2 I), of everything that a network approximates.

    z_t ~ N((1 - t) mean, s_t^2),  s_t^2 = (1 - t)^2 std^2 + t^2
    f(z, t, r) = (1 - r) mean + s_r / s_t (z - (1 - t) mean)

Shapes: B batch, F latent frames, C channels, H W height and width; F = C, so that a swapped axis is not
caught by its size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from anyflow_cli.flow.velocity import Velocity, per_frame

SHAPE = (3, 3, 2, 2)  # F, C, H, W


def normal(seed: int, *shape: int) -> Tensor:
    """Draw N(0, I) in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Gaussian:
    """Exact velocity of Gaussian data; the condition of a sample is its mean, (B or 1, F, C, H, W)."""

    mean: Tensor
    std: float = 0.6

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u = (z_t - z_r) / (t - r), in a form that is also valid at t = r, where it is v."""
        t, r = per_frame(t, z), per_frame(r, z)
        slope = ((t + r) * (1 + self.std**2) - 2 * self.std**2) / (self.scale(t) + self.scale(r))
        return slope / self.scale(t) * (z - (1 - t) * self.mean) - self.mean

    def select(self, index: Tensor) -> Gaussian:
        return self if len(self.mean) == 1 else type(self)(self.mean[index], self.std)

    def concat(self, *others: Velocity) -> Gaussian:
        parts = [self.mean, *(cast("Gaussian", other).mean for other in others)]
        return self if len(self.mean) == 1 else type(self)(torch.cat(parts), self.std)

    def scale(self, t: Tensor) -> Tensor:
        """s_t."""
        return ((1 - t).square() * self.std**2 + t.square()).sqrt()

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Flow map f(z, t, r), by the formula in the module docstring."""
        t, r = per_frame(t, z), per_frame(r, z)
        return (1 - r) * self.mean + self.scale(r) / self.scale(t) * (z - (1 - t) * self.mean)

    def clean(self, z: Tensor, t: Tensor) -> Tensor:
        """E[x | z_t = z]."""
        t = per_frame(t, z)
        return self.mean + (1 - t) * (self.std / self.scale(t)) ** 2 * (z - (1 - t) * self.mean)

    def pair(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x and eps whose straight path passes through z at t with velocity v(z, t)."""
        v = self(z, t, t)
        return z - per_frame(t, z) * v, z + per_frame(1 - t, z) * v


class Chords(Gaussian):
    """Exact velocity of the straight lines between noise and what the flow makes of it."""

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The same all along a line."""
        time = per_frame(t, z)
        start = (z - (1 - time) * self.mean) / ((1 - time) * self.std + time)
        return (1 - self.std) * start - self.mean


@dataclass(frozen=True)
class Fused:
    """The exact student of Alg. 1 under guidance g, and its null branch, as conditions of one model.

    The null branch is ``u(z, t, r) = t drift``. A student that fuses it with a flow of velocity v has to
    satisfy ``d/dt [(t - r) u_c] = g v + (1 - g) t drift`` along that flow, so ``u_c = g u + (1 - g) (t + r) /
    2 drift``.
    """

    data: Gaussian
    is_null: Tensor  # (B,)
    guidance: float
    drift: Tensor  # (1, F, C, H, W)

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t_null, t_mean = per_frame(t, z), per_frame((t + r) / 2, z)
        u_c = self.guidance * self.data(z, t, r) + (1 - self.guidance) * t_mean * self.drift
        return torch.where(per_frame(self.is_null, z), t_null * self.drift, u_c)

    def select(self, index: Tensor) -> Fused:
        return Fused(self.data.select(index), self.is_null[index], self.guidance, self.drift)

    def concat(self, *others: Velocity) -> Fused:
        parts = cast("tuple[Fused, ...]", others)
        is_null = torch.cat([self.is_null, *(part.is_null for part in parts)])
        return Fused(self.data.concat(*(part.data for part in parts)), is_null, self.guidance, self.drift)


@dataclass(frozen=True)
class GuidedFlow:
    """The exact flow map of a guided ODE, ``dz/dt = w = g v + (1 - g) v_null``, and its null branch.

    The flow map is integrated by Runge-Kutta steps.
    """

    data: Gaussian
    null: Gaussian
    is_null: Tensor  # (B,)
    guidance: float
    steps: int = 64

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """w(z, t)."""
        return self.guidance * self.data(z, t, t) + (1 - self.guidance) * self.null(z, t, t)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """f(z, t, r)."""
        h = (r - t) / self.steps
        step = per_frame(h, z)
        for number in range(self.steps):
            at = t + number * h
            k1 = self.velocity(z, at)
            k2 = self.velocity(z + step / 2 * k1, at + h / 2)
            k3 = self.velocity(z + step / 2 * k2, at + h / 2)
            k4 = self.velocity(z + step * k3, at + h)
            z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return z

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        span = per_frame(t - r, z)
        mean = (z - self.flow(z, t, r)) / torch.where(span == 0, 1, span)
        u_c = torch.where(span == 0, self.velocity(z, t), mean)
        return torch.where(per_frame(self.is_null, z), self.null(z, t, r), u_c)

    def select(self, index: Tensor) -> GuidedFlow:
        return replace(
            self,
            data=self.data.select(index),
            null=self.null.select(index),
            is_null=self.is_null[index],
        )

    def concat(self, *others: Velocity) -> GuidedFlow:
        parts = cast("tuple[GuidedFlow, ...]", others)
        return replace(
            self,
            data=self.data.concat(*(part.data for part in parts)),
            null=self.null.concat(*(part.null for part in parts)),
            is_null=torch.cat([self.is_null, *(part.is_null for part in parts)]),
        )


@dataclass(frozen=True)
class Watched:
    """Velocity model that records the batch, times and gradient mode of each call."""

    model: Velocity
    calls: list[tuple[int, Tensor, Tensor, bool]] = field(default_factory=list)

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        self.calls.append((len(z), t, r, torch.is_grad_enabled()))
        return self.model(z, t, r)

    def select(self, index: Tensor) -> Watched:
        return Watched(self.model.select(index), self.calls)

    def concat(self, *others: Velocity) -> Watched:
        return Watched(self.model.concat(*(cast("Watched", other).model for other in others)), self.calls)


@dataclass(frozen=True)
class Bent:
    """Velocity model derived from another: ``u = bend(model, z, t, r)``."""

    model: Velocity
    bend: Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.bend(self.model, z, t, r)

    def select(self, index: Tensor) -> Bent:
        return Bent(self.model.select(index), self.bend)

    def concat(self, *others: Velocity) -> Bent:
        return Bent(self.model.concat(*(cast("Bent", other).model for other in others)), self.bend)
