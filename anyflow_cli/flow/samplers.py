"""Samplers: from noise to data along a grid of times, all with the signature of ``Sampler``.

``flow_map_euler`` is the paper's sampler: the same student at any number of steps. ``euler`` solves a
teacher's ODE; with ``velocity.guided`` each step costs two evaluations. ``consistency`` predicts the clean
sample and adds fresh noise. Grids come from ``times.grid``.

Shapes: B batch, F latent frames, C channels, H W latent height and width, N steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from anyflow_cli.flow.losses import interpolate
from anyflow_cli.flow.noise import Generators, noise_like
from anyflow_cli.flow.velocity import Velocity, at_times, batch_time, jump, per_frame


class Sampler(Protocol):
    """Move z (B, F, C, H, W) from the first time of the grid (N + 1,) to its last."""

    def __call__(self, model: Velocity, z: Tensor, grid: Tensor, generator: Generators = None) -> Tensor:
        """Sample without gradient; the generator supplies fresh noise where a sampler adds it."""


@torch.no_grad()
def flow_map_euler(model: Velocity, z: Tensor, grid: Tensor, generator: Generators = None) -> Tensor:
    """Jump from time to time with the flow map (Eq. 2): ``z_r = z_t - (t - r) u(z_t, t, r)``."""
    for t, r in pairwise(grid.tolist()):
        z = jump(model, z, t, r)
    return z


@torch.no_grad()
def euler(model: Velocity, z: Tensor, grid: Tensor, generator: Generators = None) -> Tensor:
    """Integrate the ODE with the instantaneous velocity: ``z_r = z_t - (t - r) u(z_t, t, t)``."""
    for time, (t, r) in zip(grid.tolist(), _steps(z, grid), strict=False):
        z = z - per_frame(t - r, z) * at_times(model, time, time)(z, t, t)
    return z


@torch.no_grad()
def consistency(
    model: Velocity,
    z: Tensor,
    grid: Tensor,
    generator: Generators = None,
    network_times: Mapping[float, float] = MappingProxyType({}),
) -> Tensor:
    """Predict ``x = f(z_t, t, 0)``, then noise x to the next time with fresh noise from the generator.

    Args:
        model: The velocity.
        z: State (B, F, C, H, W) at the first time of the grid.
        grid: Times (N + 1,).
        generator: Fresh noise.
        network_times: What the network is given as a time of the grid, where the two differ.
    """
    for time, (t, r) in zip(grid.tolist(), _steps(z, grid), strict=False):
        at = network_times.get(time, time)
        x = z - per_frame(t, z) * at_times(model, at, 0.0)(z, batch_time(at, z), torch.zeros_like(t))
        z = interpolate(x, noise_like(z, generator), r)
    return z


@torch.no_grad()
def expert_consistency(
    model: Velocity,
    z: Tensor,
    grid: Tensor,
    generator: Generators = None,
    boundary: float = 0.0,
    network_times: Mapping[float, float] = MappingProxyType({}),
) -> Tensor:
    """Few steps of two experts (FastVideo): above the boundary b the prediction is the state at b, not x.

    A prediction at level e, which is b or 0, is noised to the next time r by ``alpha = (1 - r) / (1 - e)``
    and ``beta^2 = r^2 - (alpha e)^2``. The last one above the boundary is not noised: the low-noise expert
    starts from it.

    Args:
        model: The velocity of both experts.
        z: State (B, F, C, H, W) at the first time of the grid.
        grid: Times (N + 1,).
        generator: Fresh noise.
        boundary: Time b down to which the high-noise expert predicts.
        network_times: What the network is given as a time of the grid, where the two differ.
    """
    for t, r in pairwise(grid.tolist()):
        end = boundary if t >= boundary else 0.0
        at = network_times.get(t, t)
        u = at_times(model, at, at)(z, batch_time(at, z), batch_time(at, z))
        z, noise = z - (t - end) * u, noise_like(z, generator)
        if r >= end:
            alpha = (1 - r) / (1 - end)
            z = alpha * z + max(r**2 - (alpha * end) ** 2, 0) ** 0.5 * noise
    return z


SAMPLERS: dict[str, Sampler] = {"flow-map": flow_map_euler, "euler": euler, "consistency": consistency}


def _steps(z: Tensor, grid: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Start and end time of each step, (B,) each."""
    for t, r in pairwise(grid.tolist()):
        yield batch_time(t, z), batch_time(r, z)
