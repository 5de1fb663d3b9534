"""Two velocities over one boundary are one velocity: exact parts compose to the exact flow map."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.experts import EXPERTS, ExpertName, ExpertScale, by_time
from anyflow_cli.flow.samplers import flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import (
    Velocity,
    VelocityInputs,
    at_times,
    evaluate_together,
    flow_map,
    from_function,
    guided,
    per_frame,
)
from tests.flow.gaussian import SHAPE, Gaussian, Watched, normal

B = 0.6
Z = normal(1, 6, *SHAPE)
MEANS = normal(2, 6, *SHAPE)
# within high, within low, across, at the boundary from above, from it downwards, and at t = r = b
T = torch.tensor([1.0, 0.5, 0.9, 0.8, B, B], dtype=torch.float64)
R = torch.tensor([0.7, 0.1, 0.2, B, 0.0, B], dtype=torch.float64)


class Expert(Gaussian):
    """The exact flow of Gaussian data on one side of the boundary; useless beyond it."""

    high = False

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        inside = (r >= B) if self.high else (t <= B)
        assert bool(inside.all()), "an expert was evaluated outside of its times"
        return super().__call__(z, t, r)

    def select(self, index: Tensor) -> Expert:
        return type(self)(self.mean[index], self.std)


class HighExpert(Expert):
    high = True


def pair(means: Tensor = MEANS) -> Velocity:
    experts = {"high": HighExpert(means), "low": Expert(means)}
    return by_time(lambda name: experts[name], B)


def test_exact_experts_compose_to_the_exact_flow_map_in_a_batch_of_mixed_times() -> None:
    exact = Gaussian(MEANS)
    torch.testing.assert_close(pair()(Z, T, R), exact(Z, T, R))
    torch.testing.assert_close(flow_map(pair(), Z, T, R), exact.flow(Z, T, R))


@pytest.mark.parametrize("index", range(len(T)))
def test_a_sample_has_the_same_velocity_alone(index: int) -> None:
    one = torch.tensor([index])
    alone = pair().select(one)(Z[one], T[one], R[one])
    torch.testing.assert_close(alone, pair()(Z, T, R)[one])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_any_number_of_steps_ends_at_the_same_sample(steps: int) -> None:
    noise = normal(3, 6, *SHAPE)
    whole = Gaussian(MEANS).flow(noise, torch.ones_like(T), torch.zeros_like(T))
    torch.testing.assert_close(flow_map_euler(pair(), noise, grid(steps, 5.0).double()), whole)


def test_each_expert_is_evaluated_once_and_only_on_its_samples() -> None:
    watched = {name: Watched(Gaussian(MEANS[:1])) for name in EXPERTS}
    by_time(lambda name: watched[name], B)(Z, T, R)
    assert [call[0] for call in watched["high"].calls] == [4]
    assert [call[0] for call in watched["low"].calls] == [3]


@pytest.mark.parametrize("is_guided", [False, True])
@pytest.mark.parametrize("index", range(len(T)))
def test_known_times_choose_the_experts_that_tensors_of_times_choose(index: int, is_guided: bool) -> None:
    t, r = T[index].item(), R[index].item()
    watched = {name: Watched(Gaussian(MEANS[:1])) for name in EXPERTS}
    model: Velocity = by_time(lambda name: watched[name], B)
    if is_guided:
        model = guided(model, model, 2.0)
    velocities, evaluated = [], []
    for velocity in (model, at_times(model, t, r)):
        velocities.append(velocity(Z, torch.full_like(T, t), torch.full_like(R, r)))
        evaluated.append({name: len(one.calls) for name, one in watched.items()})
    assert torch.equal(*velocities)
    assert evaluated[1] == {name: 2 * count for name, count in evaluated[0].items()}


def test_an_expert_that_is_not_evaluated_is_not_asked_for() -> None:
    asked: list[str] = []

    def find(name: ExpertName) -> Velocity:
        asked.append(name)
        return Gaussian(MEANS[:1])

    model = by_time(find, B)
    query = VelocityInputs(model, Z, T.clamp(max=0.5), R.clamp(max=0.5))
    evaluate_together(query, query.select(torch.tensor([1, 0])))
    assert asked == ["low"]


def test_a_clean_first_frame_does_not_take_part_in_the_choice() -> None:
    frames = SHAPE[0]
    t, r = (torch.full((6, frames), time, dtype=torch.float64) for time in (0.9, 0.2))
    t[:, 0] = r[:, 0] = 0
    constant = {
        "high": from_function(lambda z, t, r: torch.ones_like(z)),
        "low": from_function(lambda z, t, r: torch.zeros_like(z)),
    }
    u = by_time(lambda name: constant[name], B)(Z, t, r)
    torch.testing.assert_close(u[:, 1:], torch.full_like(u[:, 1:], (0.9 - B) / 0.7))
    assert u.isfinite().all()


def test_guidance_has_the_scale_of_the_expert() -> None:
    cond, null = Gaussian(MEANS), Gaussian(normal(4, 6, *SHAPE))
    u = guided(cond, null, ExpertScale(4.0, 3.0, B))(Z, T, T)
    scales = torch.tensor([4.0, 3.0, 4.0, 4.0, 4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(u, null(Z, T, T) + per_frame(scales, Z) * (cond(Z, T, T) - null(Z, T, T)))


def _times(weight: Tensor, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return weight * z


def test_gradient_reaches_both_experts_of_a_jump_across() -> None:
    weights = {name: torch.ones((), requires_grad=True) for name in EXPERTS}
    experts = {name: from_function(partial(_times, weight)) for name, weight in weights.items()}
    x = flow_map(by_time(lambda name: experts[name], B), Z[:1], T[2:3], R[2:3])
    for gradient in torch.autograd.grad(x.sum(), list(weights.values())):
        assert gradient.abs() > 0
