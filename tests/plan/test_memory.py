"""The planned memory against what real trainings of small models hold, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.plan import stages
from anyflow_cli.plan.ledger import Segment
from anyflow_cli.plan.rehearsal import Rehearsal
from anyflow_cli.plan.setup import Kind, Setup
from anyflow_cli.plan.steps import step_of
from anyflow_cli.recipe import schema
from tests.plan.small import CONFIG, heaviest_of, measured_peak, setup

WITHIN = 0.08  # 0.15 is what a plan promises
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
]


STAGE_2 = setup("on-policy", checkpointing=True, micro_batch=4)


def planned(segments: Sequence[Segment]) -> int:
    return max(segment.peak for segment in segments)


def planned_peak(wanted: Setup) -> int:
    return max(moment.total for moment in stages._training_moments(wanted, step_of(wanted)))


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_planned_peak_is_the_measured_one(kind: Kind, changes: dict[str, Any], tmp_path: Path) -> None:
    wanted = setup(kind, **changes)
    assert planned_peak(wanted) == pytest.approx(measured_peak(wanted, tmp_path), rel=WITHIN)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("on-policy", {"lora": False, "joint": False}),
        ("flow-matching", {}),  # the first block's input needs no gradient
        ("flow-map", {"causal": CAUSAL}),
    ],
)
def test_two_depths_tell_of_any_other(kind: Kind, changes: dict[str, Any]) -> None:
    deep = setup(kind, checkpointing=True, config=replace(CONFIG, layers=6), **changes)
    step = step_of(deep)
    whole = Rehearsal(deep, 6, keeps_gradients=False).step(heaviest_of(deep))
    assert [segment.label for segment in step.segments] == [segment.label for segment in whole]
    assert planned(step.segments) == planned(whole)
    for line, true in zip(step.segments, whole, strict=True):
        assert line.operations == true.operations
        if true.label.role:  # between calls gradients grow as activations shrink
            assert line.peak == pytest.approx(true.peak, rel=0.03)


def test_two_depths_tell_of_a_teacher_of_another_depth() -> None:
    """Both are cut by as many blocks."""
    own = setup("on-policy", joint=False, config=replace(CONFIG, layers=6), scores=replace(LARGER, layers=4))
    step = step_of(own)
    whole = Rehearsal(own, own.depth, keeps_gradients=False).step(heaviest_of(own))
    for line, true in zip(step.segments, whole, strict=True):
        assert line.label == true.label
        assert line.operations == true.operations
        if true.label.role:
            assert line.peak == pytest.approx(true.peak, rel=0.03)


def test_checkpointing_keeps_little_more_than_a_block() -> None:
    """Without it every block's activations stay, with it one hidden state a block."""
    deep = replace(CONFIG, layers=30)
    kept, recomputed = (
        planned_peak(setup("flow-matching", config=deep, checkpointing=on)) for on in (False, True)
    )
    assert kept > 4 * recomputed


def test_a_rollout_holds_three_jumps_and_leaves_its_graph() -> None:
    """What stage 2 holds as the scores are asked is about three times what one call with gradient leaves."""
    wanted = setup("on-policy", lora=False, precision="fp32")
    step = step_of(wanted)
    one = next(s for s in step.segments if s.label.role == "student" and s.label.with_gradient)
    after_one = step.segments[step.segments.index(one) + 1].start
    assert step.rollout == pytest.approx(3 * after_one, rel=0.05)


def test_several_processes_keep_their_gradients() -> None:
    """DDP's buckets live on: gradients of both phases are held throughout; alone they are the step's own."""
    step = step_of(STAGE_2)
    trained = {role: size.trainable_bytes for role, size in step.roles.items()}
    held = stages._held(replace(STAGE_2, ranks=2), step)
    assert held["gradients"] == trained["student"] + trained["fake"]
    assert stages._held(STAGE_2, step)["gradients"] == max(trained.values())
    assert stages._held(STAGE_2, replace(step, keeps_gradients=False))["gradients"] == 0


def test_what_is_held_all_the_time_follows_from_the_weights() -> None:
    step = step_of(STAGE_2)
    held = stages._held(STAGE_2, step)
    trained = step.roles["student"].trainable + step.roles["fake"].trainable
    assert held["optimizer"] == 2 * 4 * trained
    assert held["average"] == 4 * step.roles["student"].trainable
    assert held["weights"] == sum(size.bytes for size in step.roles.values())
    assert step.roles["real"].trainable == 0 < step.roles["real"].parameters


def test_small_tensors_stand_for_latents_and_text() -> None:
    """Two channels of a patch a frame, two numbers a text; times count nothing."""
    rehearsal = Rehearsal(setup("flow-matching"), 1, keeps_gradients=False)
    size = rehearsal._true_size
    latents, text = 4 * 4 * 8 * 8 * 8, 4 * 16 * 32
    assert size(torch.zeros(3, 4, 2, 2, 2)) == ("latents", 3 * latents)
    assert size(torch.zeros(3, 1, 2, 2, 2)) == ("latents", 3 * latents // 4)
    assert size(torch.zeros(3, 4, 2, 2, 2, dtype=torch.float64)) == ("latents", 2 * 3 * latents)
    assert size(torch.zeros(3, 2, 1)) == ("latents", 3 * text)
    assert size(torch.zeros(3, 4, 1, 1, 1)) is size(torch.zeros(3)) is None
    segment = next(s for s in rehearsal.step(heaviest_of(rehearsal.setup)) if s.label.role)
    # the noise and z, and the text after some of it was dropped; the data are the batch's
    assert segment.parts["latents"] == 8 * (2 * latents + text)


def test_rehearsing_leaves_nothing_fake_behind() -> None:
    """Rotations are cached for all networks; a fake one among them would break the next real forward."""
    from anyflow_cli.model.network import FlowMapTransformer
    from tests.plan.small import LATENT, TEXT

    step_of(setup("flow-map", global_batch=16))
    out = FlowMapTransformer(CONFIG)(
        torch.randn(1, *LATENT), torch.ones(1), torch.ones(1), torch.randn(1, *TEXT)
    )
    assert type(out) is torch.Tensor
