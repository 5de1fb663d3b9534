"""``anyflow plan``: what a recipe will cost in memory, time and disk, before anything is downloaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.runs.paths import RunPaths


def plan(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    gpus: options.GpusOption = None,
    peak: options.PeakOption = None,
    mfu: options.MfuOption = 0.4,
    calibrate: options.CalibrateOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Estimate the memory, time and disk space of a recipe, and suggest settings where it does not fit.

    Nothing is downloaded: the sizes of Wan's models are known, those of a local folder are read.
    """
    settings = options.load_settings(recipe, assignments)

    from anyflow_cli.bench.record import load_bench
    from anyflow_cli.plan.estimate import as_values, make_plan
    from anyflow_cli.plan.hardware import parse_hardware, this_machine
    from anyflow_cli.plan.report import as_table

    hardware = this_machine(peak, mfu) if gpus is None else parse_hardware(gpus, peak, mfu)
    if calibrate is not None:
        hardware = replace(hardware, rates=load_bench(calibrate).rates)
    with _without_garbage_collection():
        found = make_plan(settings, hardware, RunPaths(runs, settings.name))
        values, table = as_values(found), as_table(found)
    print_result(values, as_json=as_json, text=table)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect no cycles in the block: among a plan's many small objects, it takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
