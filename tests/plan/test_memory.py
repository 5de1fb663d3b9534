"""The planned memory against what real trainings of small models hold, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.plan.estimate import held, step_moments
from anyflow_cli.plan.networks import Setup, _measure, call_cost, fake_backbone, role_sizes
from anyflow_cli.plan.steps import keeps_gradients, step_cost
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import NetworkCall
from tests.plan.small import CONFIG, LATENT, TEXT, Kind, measured_peak, setup

WITHIN = 0.12  # 0.15 is what a plan promises
LARGER = replace(CONFIG, layers=3, heads=3, ffn_dim=320)  # a real score of another width and depth

CASES: list[tuple[Kind, dict[str, Any]]] = [
    ("flow-map", {"lora": False}),
    ("flow-map", {"checkpointing": True, "precision": "bf16", "micro_batch": 4}),
    ("flow-map", {"config": replace(CONFIG, layers=5, ffn_dim=64), "lora": False, "precision": "bf16"}),
    ("flow-matching", {}),
    ("consistency-ode", {"lora": False, "micro_batch": 2}),
    ("on-policy", {"checkpointing": True, "micro_batch": 4}),
    ("on-policy", {"lora": False}),
    ("on-policy", {"scores": LARGER, "micro_batch": 4}),
    ("on-policy", {"scores": LARGER, "lora": False, "checkpointing": True}),
    ("on-policy", {"simulation": "consistency", "joint": False, "reuse_rollout": True}),
]

CAUSAL = schema.CausalSection(partition=(1, 2, 2, 2), full_chunks=2)
CASES += [
    ("flow-map", {"causal": CAUSAL, "lora": False}),
    ("flow-map", {"causal": CAUSAL, "checkpointing": True, "precision": "bf16", "global_batch": 4}),
    ("consistency-ode", {"causal": CAUSAL, "global_batch": 4}),
    ("on-policy", {"causal": CAUSAL, "lora": False, "global_batch": 2}),
    ("on-policy", {"causal": CAUSAL, "checkpointing": True, "joint": False, "global_batch": 2}),
    ("on-policy", {"causal": CAUSAL, "lora": False, "global_batch": 2, "recompute_rollout": True}),
    ("on-policy", {"causal": CAUSAL, "checkpointing": True, "global_batch": 2, "recompute_rollout": True}),
    ("on-policy", {"lora": False, "joint": False, "global_batch": 4, "recompute_rollout": True}),
    ("on-policy", {"matching": "fake-free", "global_batch": 4}),
    ("on-policy", {"causal": CAUSAL, "lora": False, "global_batch": 2, "replay_rollout": True}),
]


STAGE_2 = setup("on-policy", checkpointing=True, micro_batch=4)


def planned_peak(wanted: Setup) -> int:
    return max(moment.total for moment in step_moments(wanted))


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_planned_peak_is_the_measured_one(kind: Kind, changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = setup(kind, **changes)
    assert planned_peak(wanted) == pytest.approx(measured_peak(wanted, tmp_path), rel=WITHIN)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("role", ["student", "fake", "real"])
def test_two_depths_extend_to_any_other(role: Any, lora: bool, checkpointing: bool) -> None:
    deep = setup("on-policy", config=replace(CONFIG, layers=6), lora=lora, checkpointing=checkpointing)
    call = NetworkCall(role, 3, gradient=role != "real")
    extended, whole = call_cost(deep, call), _measure(deep, fake_backbone(deep, 6), call)
    for name, value in whole._asdict().items():
        assert getattr(extended, name) == pytest.approx(value, rel=0.02, abs=2048), name


def test_every_second_block_may_be_recomputed() -> None:
    one = setup("flow-matching", config=replace(CONFIG, layers=8), checkpointing=True)
    two = replace(one, model=one.model.model_copy(update={"checkpoint_every_n_blocks": 2}))
    none = one.with_checkpointing(False)
    call = NetworkCall("student", 2, gradient=True)
    graphs = [call_cost(wanted, call).graph for wanted in (one, two, none)]
    assert graphs[0] < graphs[1] < graphs[2]
    assert graphs[1] == pytest.approx((graphs[0] + graphs[2]) / 2, rel=0.05)


def test_a_teacher_of_another_depth_extends_by_its_own() -> None:
    own = setup("on-policy", config=replace(CONFIG, layers=6), scores=replace(CONFIG, layers=4))
    student, real = (call_cost(own, NetworkCall(role, 2, gradient=False)) for role in ("student", "real"))
    assert real.linear / student.linear == pytest.approx(4 / 6, rel=0.2)  # and it takes one time
    sizes = role_sizes(own)
    assert sizes["fake"]["parameters"] < sizes["student"]["parameters"]


def test_checkpointing_keeps_little_more_than_a_block() -> None:
    """Without it every block's activations stay, with it one hidden state per block."""
    deep = replace(CONFIG, layers=30)
    kept, recomputed = (
        planned_peak(setup("flow-matching", config=deep, checkpointing=on)) for on in (False, True)
    )
    assert kept > 4 * recomputed


def test_a_rollout_holds_three_jumps_and_leaves_its_graph() -> None:
    """When the scores are evaluated, stage 2 holds three times what one call with gradient leaves."""
    wanted = setup("on-policy", lora=False, precision="fp32")
    one = call_cost(wanted, NetworkCall("student", 8, gradient=True))
    assert step_cost(wanted).rollout == pytest.approx(3 * one.graph, rel=0.05)


def test_several_processes_keep_their_gradients() -> None:
    """DDP's buckets hold the gradients of both phases; alone they are those of one phase, or of a step."""
    trained = {role: size["trainable_bytes"] for role, size in role_sizes(STAGE_2).items()}
    assert held(replace(STAGE_2, ranks=2))["gradients"] == trained["student"] + trained["fake"]
    assert held(STAGE_2)["gradients"] == max(trained.values())
    whole = setup("on-policy", checkpointing=True)
    assert not keeps_gradients(whole)
    assert held(whole)["gradients"] == 0
    made = [moment.parts["gradients"] for moment in step_cost(whole).moments]
    assert set(made) <= {0, trained["student"], trained["fake"]}
    assert made[0] == 0 < max(made)


def test_what_is_held_all_the_time_follows_from_the_weights() -> None:
    sizes, parts = role_sizes(STAGE_2), held(STAGE_2)
    trained = sizes["student"]["trainable"] + sizes["fake"]["trainable"]
    assert parts["optimizer"] == 2 * 4 * trained
    assert parts["ema"] == 4 * sizes["student"]["trainable"]
    assert parts["weights"] == sum(size["bytes"] for size in sizes.values())
    assert sizes["real"]["trainable"] == 0 < sizes["real"]["parameters"]


def test_a_plan_leaves_nothing_fake_behind() -> None:
    """Rotations are cached for all networks; a fake one among them would break the next real forward."""
    step_cost(setup("flow-map", global_batch=16))
    out = FlowMapTransformer(CONFIG)(
        torch.randn(1, *LATENT), torch.ones(1), torch.ones(1), torch.randn(1, *TEXT)
    )
    assert type(out) is torch.Tensor
