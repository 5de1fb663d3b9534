"""The network calls that an objective declares, against a recording of those that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.layout import Layout
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.rng import StepRng
from tests.plan.small import CONFIG, Kind, backbone, batch, objective, setup

STEPS = range(1, 7)  # enough that each kind of window, rollout and share occurs
CAUSAL = schema.CausalSection(partition=(1, 2, 2, 2), full_chunks=2, bidirectional=0.5)
SHORT = schema.CausalSection(partition=(1, 1, 2), full_chunks=3)
MOSTLY_EMPTY = schema.FlowMapSection(
    text_dropout=0.8, boundary=1.0, to_zero=0.0
)  # often no sample for the call without gradient
PLAIN = schema.FlowMapSection()
TEACHER = schema.FlowMapSection(target="teacher", adaptive="off")
GIVEN = {"flow_map": schema.FlowMapSection(conditioning_prob=0.5)}

Recorded = tuple[Role, int, bool, Layout | None]


def changed(section: schema.FlowMapSection, **values: Any) -> schema.FlowMapSection:
    return section.model_copy(update=values)


CASES: list[tuple[Kind, dict[str, Any]]] = [
    ("flow-map", {}),
    ("flow-map", {"lora": False, "flow_map": MOSTLY_EMPTY}),
    ("flow-map", {"flow_map": schema.FlowMapSection(guidance=1.0, boundary=0.75)}),
    ("flow-map", {"flow_map": changed(PLAIN, guidance_path="guided")}),
    ("flow-map", {"flow_map": changed(MOSTLY_EMPTY, guidance_path="guided")}),
    ("flow-map", {"flow_map": TEACHER}),
    ("flow-map", {"lora": False, "flow_map": changed(TEACHER, guidance=1.0, boundary=1.0, to_zero=0.0)}),
    ("flow-map", {"flow_map": changed(TEACHER, objective="composition")}),
    ("flow-map", {"flow_map": changed(TEACHER, objective="composition", guidance=1.0)}),
    ("flow-map", {"flow_map": changed(PLAIN, objective="composition")}),
    ("flow-map", {"flow_map": changed(MOSTLY_EMPTY, objective="composition")}),
    ("flow-map", {"flow_map": changed(PLAIN, objective="composition", guidance=1.0)}),
    ("flow-map", {"causal": CAUSAL, "flow_map": changed(PLAIN, objective="composition")}),
    ("flow-map", {"causal": CAUSAL}),
    ("flow-map", {"causal": SHORT, "lora": False, "checkpointing": True, **GIVEN}),
    ("flow-map", {"flow_map": changed(TEACHER, states="own")}),
    ("flow-map", {"lora": False, "flow_map": changed(TEACHER, states="own", objective="composition")}),
    ("flow-map", {"boundary": 0.875, "flow_map": changed(TEACHER, states="own")}),
    ("on-policy", {"flow_map": changed(TEACHER, states="own", objective="composition")}),
    ("flow-matching", {"checkpointing": True}),
    ("consistency-ode", {"lora": False}),
    ("consistency-ode", {"causal": CAUSAL}),
    ("on-policy", {}),
    ("on-policy", {"lora": False, "joint": False, "reuse_rollout": True}),
    ("on-policy", {"recompute_rollout": True, "checkpointing": True}),
    ("on-policy", {"simulation": "consistency", "recompute_rollout": True}),
    ("on-policy", {"simulation": "fixed-steps", "recompute_rollout": True}),
    ("on-policy", {"step_budgets": (1, 2), "lora": False}),
    ("on-policy", {"fake_updates": 3}),
    ("on-policy", {"fake_updates": 2, "reuse_rollout": True, "lora": False}),
    ("on-policy", {"matching": "none"}),
    ("on-policy", {"matching": "fake-free"}),
    ("on-policy", {"matching": "fake-free", "lora": False, "joint": False}),
    ("on-policy", {"guidance_times": "own", "matching_gradient": "orthogonal"}),
    ("on-policy", {"guidance_times": "own", "simulation": "consistency", "lora": False}),
    ("on-policy", {"matching": "none", "flow_map": TEACHER}),
    ("on-policy", {"flow_map": changed(TEACHER, objective="composition")}),
    ("flow-map", {"boundary": 0.875}),
    ("flow-map", {"boundary": 0.875, "flow_map": TEACHER}),
    ("flow-map", {"boundary": 0.875, "flow_map": changed(TEACHER, objective="composition")}),
    ("flow-map", {"boundary": 0.875, "lora": False, "flow_map": MOSTLY_EMPTY}),
    ("flow-matching", {"boundary": 0.875}),
    ("consistency-ode", {"boundary": 0.875}),
    ("on-policy", {"boundary": 0.875}),
    ("on-policy", {"boundary": 0.875, "matching": "fake-free"}),
    ("on-policy", {"boundary": 0.875, "guidance_times": "own"}),
    ("on-policy", {"boundary": 0.6, "recompute_rollout": True, "checkpointing": True}),
    ("on-policy", {"boundary": 0.875, "simulation": "consistency", "recompute_rollout": True}),
    ("on-policy", {"causal": CAUSAL, "matching": "none", "lora": False}),
    ("on-policy", {"causal": CAUSAL, **GIVEN}),
    ("on-policy", {"causal": CAUSAL, "guidance_times": "own", **GIVEN}),
    ("on-policy", {"causal": CAUSAL, "checkpointing": True, "lora": False}),
    ("on-policy", {"causal": CAUSAL, "recompute_rollout": True, **GIVEN}),
    ("on-policy", {"causal": SHORT, "simulation": "consistency", "recompute_rollout": True}),
    ("on-policy", {"causal": SHORT, "simulation": "consistency", "reuse_rollout": True}),
    ("on-policy", {"causal": CAUSAL, "replay_rollout": True, **GIVEN}),
    ("on-policy", {"causal": SHORT, "replay_rollout": True, "recompute_rollout": True, "lora": False}),
    ("on-policy", {"causal": CAUSAL, "replay_rollout": True, "checkpointing": True, "reuse_rollout": True}),
    ("on-policy", {"causal": CAUSAL, "first_chunk_budgets": (1, 4), **GIVEN}),
    ("on-policy", {"causal": SHORT, "first_chunk_budgets": (1,), "rollout_frames": 37}),
    ("on-policy", {"causal": SHORT, "rollout_frames": 37, "lora": False}),
    ("on-policy", {"causal": CAUSAL, "rollout_frames": 49, "checkpointing": True, **GIVEN}),
    ("on-policy", {"causal": SHORT, "rollout_frames": 37, "recompute_rollout": True, **GIVEN}),
]  # fmt: skip


class NotedScope:
    """The scope of a role, which also notes that the role is active."""

    def __init__(self, roles: Backbone, name: Role, active: list[Role]) -> None:
        self.scope, self.name, self.active = roles.role(name), name, active

    def __enter__(self) -> None:
        self.active.append(self.name)
        self.scope.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.active.pop()
        self.scope.__exit__(*error)


def record(roles: Backbone) -> list[Recorded]:
    """Role, samples, gradient and layout of each forward pass from now on."""
    made: list[Recorded] = []
    active: list[Role] = []

    def note(network: Any, inputs: Any) -> None:  # before it runs: a recomputation ends early
        z, layout = inputs[0], inputs[4]
        made.append((active[-1], len(z), torch.is_grad_enabled(), layout))

    for name in roles.roles:
        roles._scopes[name] = partial(NotedScope, roles, name, active)  # type: ignore[assignment]
    for network in roles.networks():
        network.register_forward_pre_hook(note)
    return made


def forward(calls: Sequence[NetworkCall]) -> list[Recorded]:
    return [(call.role, call.samples, call.gradient, call.layout) for call in calls]


def recomputed(calls: Sequence[NetworkCall]) -> list[Recorded]:
    """The calls that run again, the last group first."""
    groups = dict.fromkeys(call.group for call in reversed(calls) if call.group is not None)
    return [call for group in groups for call in forward([one for one in calls if one.group == group])]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_the_declared_calls_are_those_that_run(kind: Kind, changes: dict[str, Any]) -> None:
    config = replace(CONFIG, layers=1, boundary=changes.get("boundary"))
    others = {key: value for key, value in changes.items() if key != "boundary"}
    wanted = setup(kind, global_batch=4, config=config, **others)
    roles = backbone(wanted)
    terms = [term for phase in objective(wanted, roles).phases for term in phase.terms]
    made = record(roles)
    for step in STEPS:
        rng = StepRng(0, step, 4, (1, 3))
        for term in terms:
            declared = term.network_calls(wanted.latent, rng)
            made.clear()
            loss, _ = term(batch(2, wanted.latent), rng)
            assert made == forward(declared)
            made.clear()
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            assert made == recomputed(declared)
