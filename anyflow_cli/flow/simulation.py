"""Algorithm 2: backward simulation, which draws the student's own samples for on-policy distillation.

``flow_map_rollout`` is the algorithm: three jumps simulate one transition of any N-step sampler, and gradient
flows through all of them. ``consistency_rollout`` is the baseline of Table 2, ``fixed_steps_rollout`` another
project's reading of Alg. 2. The loss on the sample is in
``matching``.

Shapes: B batch, F latent frames, C channels, H W latent height and width, N steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_cli.flow.noise import Generators
from anyflow_cli.flow.samplers import consistency, flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, jump

BUDGETS = (2, 4, 8, 16, 50)  # N of Alg. 2


class SimulationSegment(NamedTuple):
    """Step k of an N-step sampler: the transition that a rollout takes at its true length."""

    steps: int  # N
    k: int  # 0 .. N - 1


def draw_segment(budgets: Sequence[int], generator: torch.Generator) -> SimulationSegment:
    """Draw N from the budgets, then k from 0 .. N - 1; equally seeded ranks draw the same."""
    steps = budgets[_below(len(budgets), generator)]
    return SimulationSegment(steps, _below(steps, generator))


def flow_map_rollout(model: Velocity, noise: Tensor, steps: int, k: int, shift: float) -> Tensor:
    """Roll noise (B, F, C, H, W) out over 1 -> s_k -> s_{k+1} -> 0 of the shifted N-step grid (Alg. 2).

    All jumps carry gradient; a jump of zero length (the first at k = 0, the last at k = N - 1) is skipped.

    Returns:
        The sample x at time 0, (B, F, C, H, W).
    """
    z = noise
    for t, r in rollout_jumps(steps, k, shift):
        z = jump(model, z, t, r)
    return z


def rollout_jumps(steps: int, k: int, shift: float) -> list[tuple[float, float]]:
    """Start and end times of the jumps of ``flow_map_rollout``."""
    times = grid(steps, shift).tolist()
    jumps = ((1.0, times[k]), (times[k], times[k + 1]), (times[k + 1], 0.0))
    return [(t, r) for t, r in jumps if t > r]


def consistency_rollout(
    model: Velocity, noise: Tensor, times: Tensor, exit_step: int, generator: Generators
) -> Tensor:
    """Consistency backward simulation: sample up to step ``exit_step``, then predict x with gradient.

    Args:
        model: The student.
        noise: Initial noise (B, F, C, H, W).
        times: Grid (N + 1,).
        exit_step: Step 0 .. N - 1 that ends the rollout, the only one with gradient.
        generator: Source of the fresh noise of the steps before it.

    Returns:
        The prediction ``f(z, s_exit, 0)``, (B, F, C, H, W).
    """
    z = consistency(model, noise, times[: exit_step + 1], generator)
    return jump(model, z, float(times[exit_step]), 0.0)


def fixed_steps_rollout(model: Velocity, noise: Tensor, times: Tensor, step: int) -> Tensor:
    """Jump along a fixed grid with gradient in one jump alone, whose end is taken for the sample.

    FastVideo's port of Alg. 2 rolls out like this. In all but the last step the end is not at time 0.

    Args:
        model: The student.
        noise: Initial noise (B, F, C, H, W).
        times: Grid (N + 1,).
        step: Step 0 .. N - 1 that has gradient, and ends the rollout.

    Returns:
        The state at ``times[step + 1]``, (B, F, C, H, W).
    """
    z = flow_map_euler(model, noise, times[: step + 1])
    return jump(model, z, *times[step : step + 2].tolist())


def _below(bound: int, generator: torch.Generator) -> int:
    """Uniform integer from 0 .. bound - 1."""
    return int(torch.randint(bound, (), generator=generator, device=generator.device))
