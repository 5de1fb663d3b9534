"""``anyflow plan``: what a recipe will cost in memory, time and disk, before anything is fetched."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow_cli.cli.options import (
    DEFAULT_RECIPE,
    DEFAULT_RUNS,
    DebugOption,
    JsonOption,
    RecipeOption,
    RunsOption,
    SetOption,
    examples,
    load_settings,
    print_result,
)
from anyflow_cli.runs.paths import RunPaths

EXAMPLES = examples(
    "anyflow plan --recipe bidirectional1b --gpus 8x80GB",
    "anyflow plan -r bidirectional14b --gpus 8xH200 --set distill.micro_batch=1",
    "anyflow plan -r bidirectional1b --gpus 64xH100 --mfu 0.3 --json",
    "anyflow plan   (tiny, on this machine)",
)
MACHINE_PANEL = "Machine"

GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus", metavar="NxSIZE", rich_help_panel=MACHINE_PANEL, show_default=False,
        help="GPUs to plan for, e.g. 8x80GB or 8xH100; without it, this machine.",
    ),
]  # fmt: skip
PeakOption = Annotated[
    float | None,
    typer.Option(
        "--peak", metavar="TFLOPS", min=0.001, rich_help_panel=MACHINE_PANEL, show_default=False,
        help="Dense bf16 speed of a GPU; without it, that of the GPU named, else of an H100.",
    ),
]  # fmt: skip
UtilisationOption = Annotated[
    float,
    typer.Option(
        "--mfu", metavar="SHARE", min=0.01, max=1, rich_help_panel=MACHINE_PANEL,
        help="Share of the peak that is reached.",
    ),
]  # fmt: skip


def plan(
    recipe: RecipeOption = DEFAULT_RECIPE,
    assignments: SetOption = None,
    gpus: GpusOption = None,
    peak: PeakOption = None,
    utilisation: UtilisationOption = 0.4,
    runs: RunsOption = DEFAULT_RUNS,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a recipe costs in memory, time and disk, and what would make it fit.

    Nothing is fetched: the sizes of Wan's models are known, those of a local folder are read.
    """
    settings = load_settings(recipe, assignments)

    from anyflow_cli.plan.estimate import as_values
    from anyflow_cli.plan.estimate import plan as make
    from anyflow_cli.plan.hardware import parse_hardware, this_machine
    from anyflow_cli.plan.report import as_table

    machine = this_machine(peak, utilisation) if gpus is None else parse_hardware(gpus, peak, utilisation)
    made = make(settings, machine, RunPaths(runs, settings.name))
    print_result(as_values(made), as_json=as_json, text=as_table(made))
