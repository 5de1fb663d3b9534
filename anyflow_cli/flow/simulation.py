"""Algorithm 2: backward simulation, how the student makes the samples it is trained on.

``flow_map_rollout`` is the algorithm: any budget of N steps costs three jumps, and gradient runs through all
of them. ``consistency_rollout`` is the baseline of Table 2. What becomes of a sample is in ``matching``.

Shapes: B batch, F latent frames, C channels, H W latent height and width, N steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_cli.flow.samplers import consistency
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Generators, Velocity, batch_time, flow_map

BUDGETS = (2, 4, 8, 16, 50)  # N of Alg. 2


class SimulationSegment(NamedTuple):
    """Step k of a sampling in N steps: the one whose transition is simulated as it is."""

    steps: int  # N
    k: int  # 0 .. N - 1


def draw_segment(budgets: Sequence[int], generator: torch.Generator) -> SimulationSegment:
    """Draw N from the budgets, then k from 0 .. N - 1: the same on all ranks if their generators are."""
    steps = budgets[_below(len(budgets), generator)]
    return SimulationSegment(steps, _below(steps, generator))


def flow_map_rollout(model: Velocity, noise: Tensor, steps: int, k: int, shift: float) -> Tensor:
    """Algorithm 2: roll noise (B, F, C, H, W) out over 1 -> s_k -> s_{k+1} -> 0 of the shifted N-step grid.

    All jumps carry gradient; one of zero length (first at k = 0, last at k = N - 1) is skipped. Returns x at
    time 0.
    """
    times = grid(steps, shift).tolist()
    z = noise
    for t, r in ((1.0, times[k]), (times[k], times[k + 1]), (times[k + 1], 0.0)):
        if t > r:
            z = flow_map(model, z, batch_time(t, z), batch_time(r, z))
    return z


def draw_exit_step(steps: int, generator: torch.Generator) -> int:
    """Draw the step from 0 .. N - 1 at which a consistency rollout ends, the only one with gradient."""
    return _below(steps, generator)


def consistency_rollout(
    model: Velocity, noise: Tensor, times: Tensor, exit_step: int, generator: Generators
) -> Tensor:
    """Consistency backward simulation: predict x at time 0, noise it to the next time, until the exit step.

    noise (B, F, C, H, W), times (N + 1,) a grid. Steps before ``exit_step`` run without gradient. Returns the
    prediction ``f(z, s_exit, 0)``.
    """
    before = times[: exit_step + 1]
    z = consistency(model, noise, before, generator=generator)
    t = float(times[exit_step])
    return flow_map(model, z, batch_time(t, z), batch_time(0.0, z))


def _below(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator, device=generator.device))
