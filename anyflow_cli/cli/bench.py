"""``anyflow bench``: how fast this machine samples and trains a recipe, and how fast it could."""

from __future__ import annotations

import logging
from dataclasses import asdict

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.runs.paths import RunPaths

log = logging.getLogger(__name__)


def bench(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    only: options.BenchPartOption = None,
    batch: options.BenchBatchOption = None,
    repeats: options.RepeatsOption = 5,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    out: options.BenchOutOption = None,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Measure sampling, training and loading of a recipe on this machine, beside diffusers and the hardware.

    Weights are random: nothing is downloaded. `anyflow plan --calibrate` plans with the speeds found.
    """
    settings = options.load_settings(recipe, assignments)

    from anyflow_cli.bench.record import load_bench, save_bench
    from anyflow_cli.bench.report import bench_table
    from anyflow_cli.bench.run import run_bench

    file = out or RunPaths(runs, settings.name).bench
    if file.exists():
        load_bench(file, "Choose another file with --out.")
    found = run_bench(
        settings,
        (only,) if only else (),
        batch=batch,
        repeats=repeats,
        on_part=lambda part: log.info("Measuring: %s.", part),
    )
    save_bench(file, found)
    log.info("The measurements are in %s.", file)
    values = {**asdict(found), "rates": found.rates, "file": str(file)}
    print_result(values, as_json=as_json, text=bench_table(found))
