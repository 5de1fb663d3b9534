"""Draws depend on (seed, step, stream, position) alone; Eq. 7's mean is that of the whole batch."""

from __future__ import annotations

import pytest
import torch

from anyflow_cli.train.rng import BoundaryMean, StepRng

SHAPE = (2, 3)


def rng(positions: tuple[int, ...], seed: int = 0, step: int = 1) -> StepRng:
    return StepRng(seed, step, 8, positions)


def test_a_sample_draws_the_same_noise_in_any_micro_batch() -> None:
    whole = rng(tuple(range(8))).noise("noise", SHAPE)
    assert torch.equal(rng((5, 2)).noise("noise", SHAPE), whole[[5, 2]])


def test_a_shared_draw_is_indexed_by_position() -> None:
    values = torch.rand(8, generator=rng((0,)).generator("times"))
    again = torch.rand(8, generator=rng((3,)).generator("times"))
    assert torch.equal(rng((3, 6)).local(again), values[[3, 6]])


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 2}])
def test_noise_changes_with_seed_and_step(other: dict[str, int]) -> None:
    first, second = rng((0,)), rng((0,), **other)
    assert not torch.equal(first.noise("a", SHAPE), second.noise("a", SHAPE))


def test_noise_changes_with_stream_and_position() -> None:
    noise = rng((0, 1)).noise("a", SHAPE)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, rng((0, 1)).noise("b", SHAPE))


def test_streams_of_generators_differ_by_sample() -> None:
    first, second = (torch.rand(4, generator=generator) for generator in rng((0, 1)).generators("a"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("boundary", [1, 4, 7])
def test_mean_is_complete_when_the_first_other_sample_needs_it(micro: int, boundary: int) -> None:
    losses = torch.rand(8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < boundary
    mean = BoundaryMean(lambda values: values)
    for start in range(0, 8, micro):
        part = slice(start, start + micro)
        value = mean(losses[part], mask[part])
        if not mask[part].all():
            assert value == pytest.approx(losses[mask].mean().item(), rel=1e-6)


def test_the_mean_over_nothing_is_nan() -> None:
    assert BoundaryMean(lambda values: values)(torch.ones(2), torch.zeros(2, dtype=torch.bool)).isnan()


def test_the_mean_is_over_all_processes() -> None:
    others = torch.tensor([9.0, 3.0])  # sum and count elsewhere
    mean = BoundaryMean(lambda values: values + others)
    assert mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False])) == pytest.approx(10 / 4)
