"""``anyflow distill``: stage 2, on-policy distillation, and the consistency baseline."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow_cli.cli.launch import ProcessesOption, start_processes
from anyflow_cli.cli.options import (
    DEFAULT_RECIPE,
    DEFAULT_RUNS,
    RECIPE_PANEL,
    DebugOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RunsOption,
    SeedOption,
    SetOption,
    examples,
    load_settings,
    print_dry_run,
)
from anyflow_cli.cli.train import run_stage, stage_facts
from anyflow_cli.cli.train_flowmap import StepsOption
from anyflow_cli.runs.paths import RunPaths

EXAMPLES = examples(
    "anyflow distill",
    "anyflow distill --simulation consistency",
    "anyflow distill --set distill.step_budgets=[2,4,8] --set distill.joint=false",
    "anyflow distill -r bidirectional1b --nproc 8",
)

SimulationOption = Annotated[
    str | None,
    typer.Option(
        "--simulation", metavar="NAME", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="How the student's samples are simulated: flow-map, or consistency (a baseline).",
    ),
]  # fmt: skip
StartOption = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="ADDRESS", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="Any-step model to start from; without it, what train-flowmap left.",
    ),
]  # fmt: skip


def distill(
    recipe: RecipeOption = DEFAULT_RECIPE,
    simulation: SimulationOption = None,
    model: StartOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    processes: ProcessesOption = None,
    assignments: SetOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Stage 2: pull the student's own samples to the teacher's distribution (on-policy distillation).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    options = {
        "--simulation": ("distill.simulation", simulation),
        "--model": ("distill.init_from", model),
        "--steps": ("distill.steps", steps),
        "--seed": ("distill.seed", seed),
        "--nproc": ("launch.processes", processes),
    }
    settings = load_settings(recipe, assignments, options)
    paths = RunPaths(runs, settings.name)
    facts = {"simulation": settings.distill.simulation, "joint stage-1 loss": settings.distill.joint}
    from anyflow_cli.plan.requirements import missing_facts

    if dry_run and (missing := missing_facts(settings, paths, "distill")):
        return print_dry_run("distill", facts | missing, as_json=as_json, recipe=settings)
    from anyflow_cli.runs.lineage import check_run
    from anyflow_cli.train.stages import distill_inputs

    inputs = distill_inputs(settings, paths)
    check_run(settings, inputs)
    if dry_run:
        return print_dry_run(
            "distill", facts | stage_facts(settings, inputs), as_json=as_json, recipe=settings
        )
    if not start_processes(settings.launch):
        run_stage(settings, inputs, "distill", as_json=as_json)
