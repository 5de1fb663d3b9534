"""Samplers: from noise to data over a grid of times, one signature for all.

``flow_map_euler`` is the paper's sampler: the same student at any number of steps. ``euler`` solves a
teacher's ODE; wrapped in ``velocity.guided`` each step costs two evaluations ("50x2"). ``consistency``
projects and re-noises. Grids come from ``times.grid``.

Shapes: B batch, F latent frames, C channels, H W latent height and width, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from anyflow_cli.flow.losses import interpolate
from anyflow_cli.flow.velocity import Generators, Velocity, batch_time, flow_map, noise_like, per_frame

OnStep = Callable[[int, Tensor], None]


class Sampler(Protocol):
    """Take z (B, F, C, H, W) along grid (N + 1,) to its last time; ``on_step(i, z)`` sees z after step i."""

    def __call__(
        self,
        model: Velocity,
        z: Tensor,
        grid: Tensor,
        *,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample."""


@torch.no_grad()
def flow_map_euler(
    model: Velocity,
    z: Tensor,
    grid: Tensor,
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Jump from time to time with the flow map: ``z_r = z_t - (t - r) u(z_t, t, r)``."""
    for i, t, r in _steps(z, grid):
        z = flow_map(model, z, t, r)
        _report(on_step, i, z)
    return z


@torch.no_grad()
def euler(
    model: Velocity,
    z: Tensor,
    grid: Tensor,
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate the ODE with the instantaneous velocity: ``z_r = z_t - (t - r) u(z_t, t, t)``."""
    for i, t, r in _steps(z, grid):
        z = z - per_frame(t - r, z) * model(z, t, t)
        _report(on_step, i, z)
    return z


@torch.no_grad()
def consistency(
    model: Velocity,
    z: Tensor,
    grid: Tensor,
    *,
    generator: Generators = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Predict x = f(z, t, 0) and noise it to the next time with fresh noise, until the time is 0."""
    for i, t, r in _steps(z, grid):
        z = flow_map(model, z, t, torch.zeros_like(t))
        z = interpolate(z, noise_like(z, generator), r)
        _report(on_step, i, z)
    return z


SAMPLERS: dict[str, Sampler] = {"flow-map": flow_map_euler, "euler": euler, "consistency": consistency}


def _steps(z: Tensor, grid: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Give the number and both times (B,) of each step."""
    for i, (t, r) in enumerate(pairwise(grid.tolist())):
        yield i, batch_time(t, z), batch_time(r, z)


def _report(on_step: OnStep | None, i: int, z: Tensor) -> None:
    if on_step is not None:
        on_step(i, z)
