"""``anyflow train-flowmap``: stage 1, the baselines it is compared with, and the teacher's own tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run
from anyflow_cli.cli.launch import start_processes
from anyflow_cli.cli.train import run_stage, stage_facts
from anyflow_cli.runs.paths import RunPaths

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe


def train_flowmap(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    objective: options.ObjectiveOption = None,
    steps: options.StepsOption = None,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Stage 1: train the teacher to jump between any two times (forward flow-map training).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    overrides = {
        "--objective": ("train_flowmap.objective", objective),
        "--steps": ("train_flowmap.steps", steps),
        "--seed": ("train_flowmap.seed", seed),
        "--nproc": ("launch.processes", processes),
    }
    settings = options.load_settings(recipe, assignments, overrides)
    paths = RunPaths(runs, settings.name)
    from anyflow_cli.runs.lineage import check_run
    from anyflow_cli.runs.resources import inputs, is_ready
    from anyflow_cli.train.stages import flowmap_inputs

    needs = inputs(settings, paths, "train-flowmap")
    if dry_run and not is_ready(needs):
        return print_dry_run("train-flowmap", _facts(settings), needs, as_json=as_json)
    run_inputs = flowmap_inputs(settings, paths)
    check_run(settings, run_inputs)
    if dry_run:
        return print_dry_run(
            "train-flowmap",
            _facts(settings) | stage_facts(settings, run_inputs),
            needs,
            as_json=as_json,
        )
    if not start_processes(settings.launch):
        run_stage(settings, run_inputs, "train-flowmap", as_json=as_json)


def _facts(recipe: Recipe) -> dict[str, Any]:
    return {"objective": recipe.train_flowmap.objective}
