"""Table 5: what an iteration costs relative to flow matching, in passes, in FLOPs and, where run, in seconds.

Passes are counted from the network calls that the objectives declare: forward passes without a backward pass,
and pairs of both, per sample of the batch and averaged over steps. The floor of an objective is the smallest
number of passes that its equations need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from reproduction.cells import setup_of
from reproduction.rows import PAPER, Cell, Kind, Row

from anyflow_cli.plan.networks import DEPTHS, Setup, fake_backbone
from anyflow_cli.plan.steps import SAMPLED_STEPS, step_cost
from anyflow_cli.train.objectives import objective_of
from anyflow_cli.train.rng import StepRng

STAGE_2 = {"distill.joint": False}
ITERATIONS: Mapping[str, tuple[Row, str, tuple[float, float] | None]] = {
    # iteration: its recipe, the floor, seconds of Table 5 (causal, bidirectional)
    "flow matching": (
        Row("", changes={"train_flowmap.objective": "flow-matching"}), "1 F+B", (5.8, 9.7)),
    "+ guidance fused": (
        Row("", changes={"train_flowmap.flow_map": {"boundary": 1.0, "to_zero": 0.0, "guidance": 1.5}}),
        "1 F, 1 F+B", (7.8, 12.3)),
    "+ difference quotient": (Row(""), "2 F, 1 F+B", (10.4, 16.8)),
    "consistency simulation, 4 steps": (
        Row("", "distill", changes={**STAGE_2, "distill.simulation": "consistency"}),
        "N + 3 F, 2 F+B", (45.9, 41.8)),
    "flow-map simulation, 4 steps": (
        Row("", "distill", changes={**STAGE_2, "distill.step_budgets": [4]}),
        "6 - 2/N F, 4 - 2/N F+B", (53.1, 51.2)),
    "consistency simulation, 16 steps": (
        Row("", "distill", changes={**STAGE_2, "distill.simulation": "consistency",
                                    "distill.consistency_steps": 16}),
        "N + 3 F, 2 F+B", (93.8, 96.6)),
    "flow-map simulation, 16 steps": (
        Row("", "distill", changes={**STAGE_2, "distill.step_budgets": [16]}),
        "6 - 2/N F, 4 - 2/N F+B", (53.1, 51.2)),
}  # fmt: skip


def passes(setup: Setup) -> tuple[float, float]:
    """Forward passes alone, and forward passes with a backward pass, per sample of an average step."""
    assert setup.settings is not None
    backbone, negative = fake_backbone(setup, DEPTHS[0]), torch.empty(*setup.text, device="meta")
    count = setup.settings.global_batch
    totals = {False: 0, True: 0}
    phases = objective_of(setup.model, setup.settings, backbone, negative).phases
    for step in SAMPLED_STEPS:
        rng = StepRng(setup.settings.seed, step, count, tuple(range(count)))
        for phase in phases:
            for term in phase.terms:
                for call in term.network_calls(setup.latent, rng):
                    totals[call.gradient] += call.samples
    share = count * len(SAMPLED_STEPS)
    return totals[False] / share, totals[True] / share


def cost_table(records: Mapping[tuple[str, Kind], Sequence[Mapping[str, Any]]]) -> str:
    """The section of the report, bidirectional; seconds per step of the cells that have run are beside it."""
    from reproduction.report import markdown

    base: float | None = None
    lines = []
    for name, (row, floor, seconds) in ITERATIONS.items():
        setup = setup_of(Cell("", "bidirectional", 0), PAPER, row)
        alone, both = passes(setup)
        flops = step_cost(setup).flops / setup.settings.global_batch if setup.settings else 0.0
        base = flops if base is None else base
        paper = f"{seconds[1] / 9.7:.2f}" if seconds else ""
        lines.append([name, f"{alone:.2f}", f"{both:.2f}", floor, f"{flops / base:.2f}", paper])
    head = ["iteration", "F", "F+B", "floor", "FLOPs / flow matching", "paper, seconds / flow matching"]
    ran = [
        [record["row"], kind, f"{record['processor_seconds'] / record['steps']:.2f}", str(record["steps"])]
        for (_, kind), own in records.items()
        for record in own[:1]
        if record["steps"]
    ]
    text = (
        "## Cost of an iteration (Table 5)\n\n"
        "Forward passes alone (F) and with a backward pass (F+B) per sample, bidirectional, stage 2 without\n"
        "the joint loss. The floor is what the equations need on average, N the steps of the rollout.\n\n"
        + markdown([head, *lines])
    )
    if ran:
        text += "\n\nProcessor seconds per step of the cells (seed 0, start of the command included):\n\n"
        text += markdown([["row", "kind", "seconds", "steps"], *ran])
    return text
