"""Counted calls and operations against those that real objectives and networks make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anyflow_cli.plan.calls import calls_of, calls_of_step
from anyflow_cli.plan.ledger import ATTENTION, ATTENTION_BACKWARD, Label
from anyflow_cli.plan.setup import Kind, Setup
from anyflow_cli.plan.steps import SAMPLED_STEPS, micro_batches, operations, step_of
from anyflow_cli.train.rng import StepRng
from tests.plan.small import CONFIG, LATENT, backbone, batch, objective, setup

TOKENS = LATENT[0] * LATENT[2] * LATENT[3] // 4


def labels_of(wanted: Setup, draws: StepRng) -> list[Label]:
    return [label for term in calls_of(wanted, draws) for label in term]


def shapes(calls: list[Label]) -> list[tuple[str, int, bool]]:
    forward = [call for call in calls if call.direction == "forward"]
    return [(call.role, call.samples, call.with_gradient) for call in forward]


def real_calls(wanted: Setup, draws: StepRng) -> list[tuple[str, int, bool]]:
    """Samples and gradient of each forward that the real networks of a small model run."""
    roles = backbone(wanted)
    heard: list[tuple[int, bool]] = []

    def listen(module: Any, args: Any, out: torch.Tensor) -> None:
        heard.append((len(out), out.requires_grad))

    roles.network_of("student").register_forward_hook(listen)
    for phase in objective(wanted, roles).phases:
        for term in phase.terms:
            term(batch(len(draws.positions)), draws)
    return [("", *call) for call in heard]


@pytest.mark.parametrize("kind", ["flow-map", "flow-matching", "consistency-ode", "on-policy"])
def test_the_calls_are_those_of_the_real_networks(kind: Kind) -> None:
    wanted = setup(kind, micro_batch=4)
    for step in (1, 2, 3):
        for draws in micro_batches(wanted, step):
            counted = [("", *call[1:]) for call in shapes(labels_of(wanted, draws))]
            assert counted == real_calls(wanted, draws)


@pytest.mark.parametrize("changes", [{}, {"joint": False, "reuse_rollout": True}, {"global_batch": 6}])
def test_micro_batches_of_a_step_share_what_does_not_depend_on_them(changes: dict[str, Any]) -> None:
    wanted = setup("on-policy", micro_batch=2 if changes else 4, **changes)
    for step in (1, 2, 3):
        micros = micro_batches(wanted, step)
        assert calls_of_step(wanted, micros) == [calls_of(wanted, draws) for draws in micros]


def test_stage_one_makes_two_calls_and_skips_the_boundary() -> None:
    """Half of the samples have t > r: the null branch of 8 and both sides of 4 in one call, then 8."""
    (draws,) = micro_batches(setup("flow-map"), 1)
    assert shapes(labels_of(setup("flow-map"), draws)) == [("student", 16, False), ("student", 8, True)]


def test_the_last_micro_batch_of_the_last_process_has_most_to_do() -> None:
    """Boundary samples come first: of 8 with 2 processes, the last micro batch has none of them."""
    wanted = setup("flow-map", ranks=2, micro_batch=2)
    first, last = micro_batches(wanted, 1)
    assert (first.positions, last.positions) == ((1, 3), (5, 7))
    assert [labels_of(wanted, draws)[0].samples for draws in (first, last)] == [2, 6]


def counted_by_torch(wanted: Setup, draws: StepRng) -> int:
    """Operations of one real micro batch, forward and backward, attention's by its formula."""
    each = CONFIG.dim * TOKENS**2
    text = CONFIG.dim * TOKENS * 16
    total = 0

    def attention(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        samples = query[0]
        return samples * 4 * (each if key[2] == TOKENS else text)

    def backward(gradient: Any, query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
        return 5 * attention(query, key) // 2

    mapping = {ATTENTION: attention, ATTENTION_BACKWARD: backward}
    roles = backbone(wanted)
    for phase in objective(wanted, roles).phases:
        for term in phase.terms:
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                loss, _ = term(batch(len(draws.positions)), draws)
                loss.backward()  # type: ignore[no-untyped-call]
            total += counter.get_total_flops()
    return total


@pytest.mark.parametrize(
    ("kind", "checkpointing"), [("flow-map", False), ("flow-matching", True), ("on-policy", True)]
)
def test_operations_are_those_that_torch_counts(kind: Kind, checkpointing: bool) -> None:
    wanted = setup(kind, checkpointing=checkpointing, micro_batch=4)
    segments = step_of(wanted).segments
    for step in (1, 2):
        draws = micro_batches(wanted, step)[-1]
        planned = operations(wanted, segments, labels_of(wanted, draws))
        assert planned == pytest.approx(counted_by_torch(wanted, draws), rel=0.02)


def test_recomputation_costs_a_forward_of_the_blocks() -> None:
    with_it, without = (step_of(setup("flow-matching", checkpointing=on)).segments for on in (True, False))
    forward = sum(s.operations for s in without if s.label.direction == "forward")
    more = sum(s.operations for s in with_it) - sum(s.operations for s in without)
    assert 0.9 * forward < more <= forward


@pytest.mark.parametrize(("budgets", "mean"), [((2,), 2.0), ((50,), 2.96)])
def test_rollouts_have_as_many_jumps_as_their_budgets_give(budgets: tuple[int, ...], mean: float) -> None:
    """Of N jumps' places the first and the last save one: 3 - 2 / N on average."""
    wanted = setup("on-policy", step_budgets=budgets, joint=False, lora=False)
    jumps = [
        sum(
            call.role == "student" and call.with_gradient
            for call in labels_of(wanted, draws)
            if call.direction == "forward"
        )
        for step in SAMPLED_STEPS
        for draws in micro_batches(wanted, step)
    ]
    assert sum(jumps) / len(jumps) == pytest.approx(mean, abs=0.06)
