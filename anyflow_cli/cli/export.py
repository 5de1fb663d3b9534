"""``anyflow export``: a model in the format of another tool."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

from anyflow_cli.cli.options import (
    DEFAULT_RECIPE,
    DEFAULT_RUNS,
    OUTPUT_PANEL,
    DebugOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RunsOption,
    SetOption,
    examples,
    load_settings,
    print_dry_run,
    print_result,
)

EXAMPLES = examples(
    "anyflow export --out my-model",
    "anyflow export --model runs/tiny/distill/checkpoints/step-000040 --format merged --out s40",
    "anyflow export --model runs/mine/distill --format comfyui --dtype bf16 --out mine.safetensors",
)

log = logging.getLogger(__name__)


def export(
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            rich_help_panel=OUTPUT_PANEL,
            help="What to make: a directory, or a .safetensors file for merged and comfyui.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="A training run, a checkpoint, or a model folder; else as `anyflow sample` chooses.",
        ),
    ] = None,
    kind: Annotated[
        Literal["diffusers", "merged", "comfyui", "adapter"],
        typer.Option(
            "--format",
            help="A pipeline folder; the network in one file; that with ComfyUI's names; the LoRA (PEFT).",
        ),
    ] = "diffusers",
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"] | None,
        typer.Option(show_default=False, help="Type of the stored weights, instead of what they have."),
    ] = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    assignments: SetOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a trained model for other tools: diffusers, PEFT, a single file, ComfyUI.

    Works on a checkpoint of a run that is still training.

    An adapter belongs on the model its run started from; a plain Wan first gets its second time embedder,
    a copy of the first.
    """
    settings = load_settings(recipe, assignments)

    from anyflow_cli import export as job
    from anyflow_cli.runs.open import check_address, find_model
    from anyflow_cli.runs.paths import RunPaths

    choice = find_model(settings, RunPaths(runs, settings.name), model)
    log.info("Model: %s (%s)", *choice)
    target = job.destination(kind, out)
    if dry_run:
        check_address(choice.address)
        facts = {"model": choice.address, "because": choice.why, "format": kind, "out": target}
        return print_dry_run("export", facts, as_json=as_json)
    made = job.export_model(choice.address, settings, kind, out, dtype)
    if kind == "comfyui":
        log.info("ComfyUI's own Wan nodes know no second time; this file needs a node that gives one.")
    print_result({"model": choice.address, "format": kind, "out": made}, as_json=as_json, text=str(made))
