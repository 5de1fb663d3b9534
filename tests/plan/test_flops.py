"""Planned FLOPs against those that torch counts while real objectives run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch.utils.flop_counter import FlopCounterMode

from anyflow_cli.plan.networks import Setup, call_cost
from anyflow_cli.plan.steps import SAMPLED_STEPS, CallCosts
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.rng import StepRng, micro_positions
from anyflow_cli.utils.memory_tracker import ATTENTION, ATTENTION_BACKWARD
from tests.plan.small import CONFIG, Kind, backbone, batch, objective, setup

DEEP = replace(CONFIG, layers=4)
CAUSAL = schema.CausalSection(partition=(1, 2, 2, 2), full_chunks=2, bidirectional=0.5)


def draws_of(wanted: Setup, step: int, ranks: int = 1) -> list[StepRng]:
    """The micro batches of the last process, which has most to do."""
    own = wanted.settings
    assert own is not None
    micros = micro_positions(own.global_batch, own.micro_batch, ranks - 1, ranks)
    return [StepRng(own.seed, step, own.global_batch, positions) for positions in micros]


def calls_of(wanted: Setup, draws: StepRng) -> list[NetworkCall]:
    roles = backbone(wanted)
    terms = [term for phase in objective(wanted, roles).phases for term in phase.terms]
    return [call for term in terms for call in term.network_calls(wanted.latent, draws)]


def shapes(calls: list[NetworkCall]) -> list[tuple[str, int, bool]]:
    return [(call.role, call.samples, call.gradient) for call in calls]


def test_stage_one_makes_two_calls_and_skips_the_boundary() -> None:
    """Half of the samples have t > r: the null branch of 8 and both sides of 4 in one call, then 8."""
    wanted = setup("flow-map")
    (draws,) = draws_of(wanted, 1)
    assert shapes(calls_of(wanted, draws)) == [("student", 16, False), ("student", 8, True)]


def test_the_last_micro_batch_of_the_last_process_has_most_to_do() -> None:
    """Boundary samples come first: of 8 with 2 processes, the last micro batch has none of them."""
    wanted = setup("flow-map", micro_batch=2)
    first, last = draws_of(wanted, 1, ranks=2)
    assert (first.positions, last.positions) == ((1, 3), (5, 7))
    assert [calls_of(wanted, draws)[0].samples for draws in (first, last)] == [2, 6]


def counted_by_torch(wanted: Setup, draws: StepRng) -> int:
    """FLOPs of one real micro batch, forward and backward, attention's by its formula."""

    def attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        samples, heads, queries, width = query
        return 4 * samples * heads * queries * key[2] * width

    def backward(gradient: Any, query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 5 * attention(query, key) // 2

    mapping = {ATTENTION: attention, ATTENTION_BACKWARD: backward}
    total = 0
    for phase in objective(wanted, backbone(wanted)).phases:
        for term in phase.terms:
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                loss, _ = term(batch(len(draws.positions), wanted.latent), draws)
                if loss.requires_grad:
                    loss.backward()  # type: ignore[no-untyped-call]
            total += counter.get_total_flops()
    return total


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("flow-map", {}),
        ("flow-matching", {"checkpointing": True}),
        ("on-policy", {"checkpointing": True}),
        ("on-policy", {"recompute_rollout": True}),
        ("on-policy", {"matching": "fake-free"}),
        ("flow-map", {"causal": CAUSAL}),
        ("on-policy", {"causal": CAUSAL, "replay_rollout": True}),
        ("on-policy", {"causal": CAUSAL, "checkpointing": True, "recompute_rollout": True}),
    ],
)
def test_flops_are_those_that_torch_counts(kind: Kind, changes: dict[str, Any]) -> None:
    wanted = setup(kind, micro_batch=4, config=DEEP, **changes)
    for step in (1, 2):
        draws = draws_of(wanted, step)[-1]
        calls = calls_of(wanted, draws)
        planned = sum(map(CallCosts(wanted, calls).flops, calls))
        assert planned == pytest.approx(counted_by_torch(wanted, draws), rel=0.04)


def test_recomputation_costs_a_forward_pass_of_the_blocks() -> None:
    call = NetworkCall("student", 8, gradient=True)
    with_it, without = (call_cost(setup("flow-matching", checkpointing=on), call) for on in (True, False))
    more = with_it.linear_backward - without.linear_backward
    assert 0.85 * without.linear < more <= without.linear
    assert with_it.attention_backward - without.attention_backward == without.attention


@pytest.mark.parametrize(("budgets", "mean"), [((2,), 2.0), ((50,), 2.96)])
def test_rollouts_have_as_many_jumps_as_their_budgets_give(budgets: tuple[int, ...], mean: float) -> None:
    """Of N jumps' places the first and the last save one: 3 - 2 / N on average."""
    wanted = setup("on-policy", step_budgets=budgets, joint=False, lora=False)
    terms = objective(wanted, backbone(wanted)).phases[0].terms
    jumps = [
        sum(call.gradient for term in terms for call in term.network_calls(wanted.latent, draws))
        for step in SAMPLED_STEPS
        for draws in draws_of(wanted, step)
    ]
    assert sum(jumps) / len(jumps) == pytest.approx(mean, abs=0.06)
