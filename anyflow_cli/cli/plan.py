"""``anyflow plan``: what a recipe will cost in memory, time and disk, before anything is downloaded."""

from __future__ import annotations

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.runs.paths import RunPaths


def plan(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    gpus: options.GpusOption = None,
    peak: options.PeakOption = None,
    mfu: options.MfuOption = 0.4,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Estimate the memory, time and disk space of a recipe, and suggest settings where it does not fit.

    Nothing is downloaded: the sizes of Wan's models are known, those of a local folder are read.
    """
    settings = options.load_settings(recipe, assignments)

    from anyflow_cli.plan.estimate import as_values, make_plan
    from anyflow_cli.plan.hardware import parse_hardware, this_machine
    from anyflow_cli.plan.report import as_table

    hardware = this_machine(peak, mfu) if gpus is None else parse_hardware(gpus, peak, mfu)
    found = make_plan(settings, hardware, RunPaths(runs, settings.name))
    print_result(as_values(found), as_json=as_json, text=as_table(found))
