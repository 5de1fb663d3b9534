"""Samplers on Gaussian data: exact, or converging at their order, all with one signature."""

from __future__ import annotations

import pytest
import torch

from anyflow_cli.flow.samplers import SAMPLERS, consistency, euler, flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import guided
from tests.flow.gaussian import SHAPE, Bent, Gaussian, Watched, normal

K = 5.0
DATA = Gaussian(normal(0, 2, *SHAPE))
NOISE = normal(1, 2, *SHAPE)
END = DATA.mean + DATA.std * NOISE  # f(z, 1, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("steps", [1, 2, 4, 32])
def test_the_flow_map_is_exact_at_any_number_of_steps(steps: int) -> None:
    torch.testing.assert_close(SAMPLERS["flow-map"](DATA, NOISE, grid(steps, K)), END)


@pytest.mark.parametrize("k", [1.0, 5.0])
def test_euler_converges_at_first_order(k: int) -> None:
    errors = [(euler(DATA, NOISE, grid(steps, k)) - END).abs().max().item() for steps in (64, 128, 256)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_euler_follows_the_instantaneous_velocity_and_the_flow_map_the_average() -> None:
    for sampler, average in ((euler, False), (flow_map_euler, True)):
        watched = Watched(DATA)
        sampler(watched, NOISE, grid(4, K))
        starts, ends = grid(4, K)[:-1].tolist(), grid(4, K)[1:].tolist()
        assert [t[0].item() for _, t, _, _ in watched.calls] == starts
        assert [r[0].item() for _, _, r, _ in watched.calls] == (ends if average else starts)


def test_a_guided_teacher_costs_two_evaluations_per_step_in_one_call() -> None:
    null = Gaussian(normal(2, 2, *SHAPE))
    watched = Watched(DATA)
    x = euler(guided(watched, Watched(null), 5.0), NOISE, grid(50, K))
    assert [batch for batch, *_ in watched.calls] == [4] * 50
    widened = Gaussian(
        null.mean + 5 * (DATA.mean - null.mean)
    )  # guidance of equally wide data moves the mean
    torch.testing.assert_close(x, euler(widened, NOISE, grid(50, K)))


def test_consistency_in_one_step_is_the_flow_map() -> None:
    torch.testing.assert_close(consistency(DATA, NOISE, grid(1, K)), END)


@pytest.mark.parametrize("steps", [2, 4])
def test_consistency_with_the_exact_map_keeps_the_distribution(steps: int) -> None:
    """Noising again draws from the same Gaussian: mean and width stay, the sample changes."""
    data = Gaussian(torch.full((1, 1, 1, 1, 1), 0.7).double())
    noise = normal(3, 20000, 1, 1, 1, 1)
    x = consistency(data, noise, grid(steps, K), generator=generator())
    assert x.mean().item() == pytest.approx(0.7, abs=0.02)
    assert x.std().item() == pytest.approx(data.std, abs=0.02)
    coupling = torch.corrcoef(torch.stack([x.flatten(), noise.flatten()]))[0, 1].item()
    assert coupling < 0.95  # the flow map's is 1


def test_consistency_noise_comes_from_the_generator() -> None:
    first, second, other = (
        consistency(DATA, NOISE, grid(4, K), generator=generator(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_with_a_generator_per_sample_the_batch_does_not_matter() -> None:
    together = consistency(DATA, NOISE, grid(4, K), generator=[generator(5), generator(6)])
    one = Gaussian(DATA.mean[1:])
    alone = consistency(one, NOISE[1:], grid(4, K), generator=[generator(6)])
    torch.testing.assert_close(together[1:], alone)
    with pytest.raises(ValueError, match="shorter"):
        consistency(DATA, NOISE, grid(4, K), generator=[generator(5)])


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_builds_no_graph_and_keeps_its_input(name: str) -> None:
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    noise = NOISE.clone()
    x = SAMPLERS[name](Bent(DATA, lambda u, z, t, r: weight * u(z, t, r)), noise, grid(4, K))
    assert not x.requires_grad
    assert torch.equal(noise, NOISE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_a_grid_in_two_parts_equals_sampling_it_at_once(name: str) -> None:
    """Stopping after two of four steps and continuing gives the same sample."""
    sampler, times, noise = SAMPLERS[name], grid(4, K), generator()
    half = sampler(DATA, NOISE, times[:3], generator=noise)
    rest = sampler(DATA, half, times[2:], generator=noise)
    torch.testing.assert_close(rest, sampler(DATA, NOISE, times, generator=generator()), rtol=0, atol=0)
