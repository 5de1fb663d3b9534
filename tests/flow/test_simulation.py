"""Alg. 2 on Gaussian data: three jumps equal N steps, and each gets the gradient of its closed form."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.losses import interpolate
from anyflow_cli.flow.noise import noise_like
from anyflow_cli.flow.samplers import flow_map_euler
from anyflow_cli.flow.simulation import (
    BUDGETS,
    SimulationSegment,
    consistency_rollout,
    draw_segment,
    fixed_steps_rollout,
    flow_map_rollout,
)
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, flow_map
from tests.flow.gaussian import SHAPE, Bent, Gaussian, Watched, normal

K = 5.0
DATA = Gaussian(normal(0, 2, *SHAPE))
NOISE = normal(1, 2, *SHAPE)


class Pushed:
    """The exact model plus a separate parameter in each call, in the order of the calls."""

    def __init__(self, count: int) -> None:
        self.pushes = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(count)]
        self.calls = 0
        self.model: Velocity = Bent(DATA, self.bend)

    def bend(self, u: Velocity, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        self.calls += 1
        return u(z, t, r) + self.pushes[self.calls - 1]


def jumps(watched: Watched) -> list[tuple[float, float]]:
    return [(t[0].item(), r[0].item()) for _, t, r, _ in watched.calls]


@pytest.mark.parametrize("steps", BUDGETS)
def test_three_jumps_equal_all_steps(steps: int) -> None:
    all_steps = flow_map_euler(DATA, NOISE, grid(steps, K))
    for k in {0, 1, steps // 2, steps - 1}:
        torch.testing.assert_close(flow_map_rollout(DATA, NOISE, steps, k, K), all_steps)


def test_a_rollout_jumps_along_its_segment_of_the_shifted_grid() -> None:
    watched = Watched(DATA)
    flow_map_rollout(watched, NOISE, 4, 2, 5.0)
    wanted = [(1, 5 / 6), (5 / 6, 5 / 8), (5 / 8, 0)]
    for got, want in zip(jumps(watched), wanted, strict=True):
        assert got == pytest.approx(want, abs=1e-6)
    assert all(gradient for *_, gradient in watched.calls)


@pytest.mark.parametrize(("k", "wanted"), [(0, [(1, 0.75), (0.75, 0)]), (3, [(1, 0.25), (0.25, 0)])])
def test_jumps_of_zero_length_are_skipped(k: int, wanted: list[tuple[float, float]]) -> None:
    watched = Watched(DATA)
    flow_map_rollout(watched, NOISE, 4, k, 1.0)
    assert jumps(watched) == wanted


def test_one_step_is_one_jump() -> None:
    watched = Watched(DATA)
    flow_map_rollout(watched, NOISE, 1, 0, K)
    assert jumps(watched) == [(1, 0)]


@pytest.mark.parametrize(("steps", "k"), [(4, 0), (4, 1), (4, 3), (16, 7), (50, 30)])
def test_gradient_reaches_all_segments(steps: int, k: int) -> None:
    """A push in the jump from t to r moves z_r by -(t - r), and x by s_0 / s_r times that."""
    times = [1.0, *grid(steps, K)[k : k + 2].tolist(), 0.0]
    segments = [(t, r) for t, r in pairwise(times) if t > r]
    student = Pushed(len(segments))
    x = flow_map_rollout(student.model, NOISE, steps, k, K)
    gradients = torch.autograd.grad(x.mean(), student.pushes)
    for (t, r), gradient in zip(segments, gradients, strict=True):
        wanted = -(t - r) * DATA.std / DATA.scale(torch.tensor(r)).item()
        assert gradient.item() == pytest.approx(wanted, rel=1e-6)


def test_draws_cover_each_budget_and_each_step_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(draw_segment((2, 4), generator) for _ in range(4000))
    wanted = {SimulationSegment(2, k): 1000 for k in range(2)} | {
        SimulationSegment(4, k): 500 for k in range(4)
    }
    assert counts.keys() == wanted.keys()
    assert all(abs(counts[segment] - count) < 150 for segment, count in wanted.items())


def test_ranks_of_one_seed_draw_the_same() -> None:
    ranks = [torch.Generator().manual_seed(7) for _ in range(4)]
    for _ in range(5):
        assert len({draw_segment(BUDGETS, rank) for rank in ranks}) == 1


def test_a_consistency_rollout_samples_up_to_its_exit_step() -> None:
    times, zero = grid(4, K).double(), torch.zeros(2).double()
    noise = torch.Generator().manual_seed(3)
    z = NOISE
    for i in range(2):
        x = flow_map(DATA, z, times[i].expand(2), zero)
        z = interpolate(x, noise_like(z, noise), times[i + 1].expand(2))
    wanted = flow_map(DATA, z, times[2].expand(2), zero)
    got = consistency_rollout(DATA, NOISE, grid(4, K), 2, torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_a_consistency_rollout_has_gradient_in_its_last_step_only(exit_step: int) -> None:
    student = Pushed(exit_step + 1)
    x = consistency_rollout(student.model, NOISE, grid(4, K), exit_step, torch.Generator().manual_seed(3))
    *before, last = torch.autograd.grad(x.mean(), student.pushes, allow_unused=True)
    assert before == [None] * exit_step
    assert last.item() == pytest.approx(-grid(4, K)[exit_step].item())
    assert student.calls == exit_step + 1


@pytest.mark.parametrize("step", [0, 1, 3])
def test_fixed_steps_end_after_their_one_jump_with_gradient(step: int) -> None:
    calls: list[tuple[int, Tensor, Tensor, bool]] = []
    times = grid(4, K).double()
    x = fixed_steps_rollout(Watched(DATA, calls), NOISE, times, step)
    assert [gradient for *_, gradient in calls] == [False] * step + [True]
    one, end = torch.ones(2).double(), times[step + 1].expand(2)
    torch.testing.assert_close(x, DATA.flow(NOISE, one, end))
