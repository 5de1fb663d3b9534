"""``anyflow plan``: what a recipe will cost in memory, time and disk, before anything is fetched."""

from __future__ import annotations

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.runs.paths import RunPaths


def plan(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    gpus: options.GpusOption = None,
    peak: options.PeakOption = None,
    utilisation: options.MfuOption = 0.4,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Say what a recipe costs in memory, time and disk, and what would make it fit.

    Nothing is fetched: the sizes of Wan's models are known, those of a local folder are read.
    """
    settings = options.load_settings(recipe, assignments)

    from anyflow_cli.plan.estimate import as_values
    from anyflow_cli.plan.estimate import plan as make
    from anyflow_cli.plan.hardware import parse_hardware, this_machine
    from anyflow_cli.plan.report import as_table

    machine = this_machine(peak, utilisation) if gpus is None else parse_hardware(gpus, peak, utilisation)
    made = make(settings, machine, RunPaths(runs, settings.name))
    print_result(as_values(made), as_json=as_json, text=as_table(made))
