"""``anyflow train-flowmap``: stage 1, the baselines it is compared with, and the teacher's own tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from anyflow_cli.runs.paths import RunPaths

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe

EXAMPLES = examples(
    "anyflow train-flowmap",
    "anyflow train-flowmap --set train_flowmap.steps=1000",
    "anyflow train-flowmap --objective flow-matching   (tunes the teacher)",
    "anyflow train-flowmap -r bidirectional1b --nproc 8",
)

ObjectiveOption = Annotated[
    str | None,
    typer.Option(
        "--objective", metavar="NAME", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="flow-map, flow-matching (the teacher's own tuning) or consistency-ode (a baseline).",
    ),
]  # fmt: skip
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps", metavar="N", rich_help_panel=RECIPE_PANEL, show_default=False,
        help="Optimizer steps in all; a finished run given more goes on.",
    ),
]  # fmt: skip


def train_flowmap(
    recipe: RecipeOption = DEFAULT_RECIPE,
    objective: ObjectiveOption = None,
    steps: StepsOption = None,
    seed: SeedOption = None,
    processes: ProcessesOption = None,
    assignments: SetOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Stage 1: train the teacher to jump between any two times (forward flow-map training).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    options = {
        "--objective": ("train_flowmap.objective", objective),
        "--steps": ("train_flowmap.steps", steps),
        "--seed": ("train_flowmap.seed", seed),
        "--nproc": ("launch.processes", processes),
    }
    settings = load_settings(recipe, assignments, options)
    paths = RunPaths(runs, settings.name)
    from anyflow_cli.plan.requirements import missing_facts

    if dry_run and (missing := missing_facts(settings, paths, "train-flowmap")):
        return print_dry_run("train-flowmap", _facts(settings) | missing, as_json=as_json, recipe=settings)
    from anyflow_cli.runs.lineage import check_run
    from anyflow_cli.train.stages import flowmap_inputs

    inputs = flowmap_inputs(settings, paths)
    check_run(settings, inputs)
    if dry_run:
        return print_dry_run(
            "train-flowmap",
            _facts(settings) | stage_facts(settings, inputs),
            as_json=as_json,
            recipe=settings,
        )
    if not start_processes(settings.launch):
        run_stage(settings, inputs, "train-flowmap", as_json=as_json)


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {"objective": recipe.train_flowmap.objective}
