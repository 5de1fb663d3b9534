"""``anyflow distill``: stage 2, on-policy distillation, and the consistency baseline."""

from __future__ import annotations

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run
from anyflow_cli.cli.launch import start_processes
from anyflow_cli.cli.train import run_stage, stage_facts
from anyflow_cli.runs.paths import RunPaths


def distill(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    simulation: options.SimulationOption = None,
    model: options.InitFromOption = None,
    steps: options.StepsOption = None,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Stage 2: pull the student's own samples to the teacher's distribution (on-policy distillation).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    overrides = {
        "--simulation": ("distill.simulation", simulation),
        "--model": ("distill.init_from", model),
        "--steps": ("distill.steps", steps),
        "--seed": ("distill.seed", seed),
        "--nproc": ("launch.processes", processes),
    }
    settings = options.load_settings(recipe, assignments, overrides)
    paths = RunPaths(runs, settings.name)
    facts = {"simulation": settings.distill.simulation, "joint stage-1 loss": settings.distill.joint}
    from anyflow_cli.runs.lineage import check_run
    from anyflow_cli.runs.resources import inputs, is_ready
    from anyflow_cli.train.stages import distill_inputs

    needs = inputs(settings, paths, "distill")
    if dry_run and not is_ready(needs):
        return print_dry_run("distill", facts, needs, as_json=as_json)
    run_inputs = distill_inputs(settings, paths)
    check_run(settings, run_inputs)
    if dry_run:
        return print_dry_run("distill", facts | stage_facts(settings, run_inputs), needs, as_json=as_json)
    if not start_processes(settings.launch):
        run_stage(settings, run_inputs, "distill", as_json=as_json)
