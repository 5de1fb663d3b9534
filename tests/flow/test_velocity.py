"""The contract: conditions follow their samples, guidance is one call, times broadcast over frames."""

from __future__ import annotations

import pytest
import torch

from anyflow_cli.flow.velocity import (
    VelocityInputs,
    batch_time,
    evaluate_together,
    flow_map,
    from_function,
    guided,
    per_frame,
)
from tests.flow.gaussian import SHAPE, Gaussian, Watched, normal

Z = normal(1, 4, *SHAPE)
T = torch.tensor([1.0, 0.7, 0.4, 0.2], dtype=torch.float64)
R = T / 2
MODEL, NULL = Gaussian(normal(2, 4, *SHAPE)), Gaussian(normal(3, 4, *SHAPE))


def test_the_exact_flow_map_is_the_identity_at_t_and_composes() -> None:
    """The closed form used by all tests: f(z, t, t) = z, and f(f(z, t, r), r, q) = f(z, t, q)."""
    torch.testing.assert_close(flow_map(MODEL, Z, T, T), Z, rtol=0, atol=0)
    q = R / 3
    torch.testing.assert_close(flow_map(MODEL, flow_map(MODEL, Z, T, R), R, q), flow_map(MODEL, Z, T, q))
    torch.testing.assert_close(flow_map(MODEL, Z, T, R), MODEL.flow(Z, T, R))


def test_the_exact_velocity_is_that_of_the_mean_data_and_noise_behind_a_state() -> None:
    """v(z, t) = E[eps - x | z_t = z], and z = (1 - t) E[x] + t E[eps]."""
    x = MODEL.clean(Z, T)
    eps = (Z - per_frame(1 - T, Z) * x) / per_frame(T, Z)
    torch.testing.assert_close(MODEL(Z, T, T), eps - x)
    for got, wanted in zip(MODEL.pair(Z, T), (x, eps), strict=True):
        torch.testing.assert_close(got, wanted)


def test_times_of_frames_go_to_frames() -> None:
    t = normal(4, 4, SHAPE[0])
    assert per_frame(T, Z).shape == (4, 1, 1, 1, 1)
    torch.testing.assert_close((per_frame(t, Z) * torch.ones_like(Z))[:, :, 1, 0, 1], t)


def test_inputs_evaluated_together_equal_separate_calls() -> None:
    watched = Watched(Gaussian(normal(2, 4, *SHAPE)))
    queries = (
        VelocityInputs(watched, Z, T, R),
        VelocityInputs(watched, Z, T, R).select(torch.tensor([2, 0, 2])),
    )
    whole, some = evaluate_together(*queries)
    assert [batch for batch, *_ in watched.calls] == [7]
    torch.testing.assert_close(whole, MODEL(Z, T, R))
    torch.testing.assert_close(some, whole[[2, 0, 2]])


def test_empty_inputs_make_no_call() -> None:
    watched = Watched(MODEL)
    nobody = VelocityInputs(watched, Z, T, R).select(torch.tensor([], dtype=torch.long))
    assert [len(answer) for answer in evaluate_together(nobody, nobody)] == [0, 0]
    assert watched.calls == []


def test_velocities_have_the_type_of_their_states() -> None:
    half = from_function(lambda z, t, r: z.bfloat16())
    (answer,) = evaluate_together(VelocityInputs(half, Z, T, R))
    assert answer.dtype == Z.dtype


def test_guidance_is_an_extrapolation_from_the_null_branch_in_one_call() -> None:
    watched = Watched(MODEL)
    got = guided(watched, Watched(NULL), 4.0)(Z, T, T)
    torch.testing.assert_close(got, NULL(Z, T, T) + 4 * (MODEL(Z, T, T) - NULL(Z, T, T)))
    assert [batch for batch, *_ in watched.calls] == [8]
    torch.testing.assert_close(guided(MODEL, NULL, 1.0)(Z, T, T), MODEL(Z, T, T))


def test_a_guided_model_keeps_the_contract() -> None:
    index = torch.tensor([3, 1])
    model = guided(MODEL, NULL, 4.0)
    some = model.select(index)
    torch.testing.assert_close(some(Z[index], T[index], T[index]), model(Z, T, T)[index])
    got = some.concat(model)(torch.cat([Z[index], Z]), torch.cat([T[index], T]), torch.cat([T[index], T]))
    torch.testing.assert_close(got, torch.cat([model(Z, T, T)[index], model(Z, T, T)]))


def test_models_of_different_guidance_cannot_be_concatenated() -> None:
    with pytest.raises(AssertionError):
        guided(MODEL, NULL, 4.0).concat(guided(MODEL, NULL, 3.0))


def test_a_model_without_condition_serves_any_batch() -> None:
    model = from_function(lambda z, t, r: per_frame(t - r, z) * z)
    joined = model.select(torch.tensor([0])).concat(model)
    torch.testing.assert_close(joined(Z, T, R), per_frame(T - R, Z) * Z)


def test_a_batch_time_is_one_time_per_sample() -> None:
    assert batch_time(0.25, Z).tolist() == [0.25] * 4
