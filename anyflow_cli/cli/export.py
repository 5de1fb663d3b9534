"""``anyflow export``: a model in the format of another tool."""

from __future__ import annotations

import logging

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run, print_result
from anyflow_cli.errors import UsageError

log = logging.getLogger(__name__)


def export(
    out: options.ExportPathOption,
    model: options.ModelOption = None,
    lora: options.LoraOption = None,
    kind: options.FormatOption = "diffusers",
    dtype: options.DtypeOption = None,
    base: options.BaseOption = None,
    rank: options.RankOption = 64,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Write a trained model for other tools: diffusers, PEFT, a single file, ComfyUI.

    Also exports a checkpoint of a run that is still training.

    An adapter fits the model that its run started from. A plain Wan first needs the second time embedder, a
    copy of its first.
    """
    settings = options.load_settings(recipe, assignments)
    model = options.with_lora_files(model, lora)
    if base is not None and kind != "adapter":
        raise UsageError("--base is for --format adapter.", "Add --format adapter, or omit --base.")

    from anyflow_cli import export as job
    from anyflow_cli.runs.paths import RunPaths
    from anyflow_cli.runs.resources import Given, find_model, inputs, require_inputs

    paths = RunPaths(runs, settings.name)
    choice, needs = find_model(settings, paths, model), inputs(settings, paths, "export", Given(model))
    log.info("Model: %s (%s)", *choice)
    target = job.destination(kind, out)
    if dry_run:
        facts = {"model": choice.address, "because": choice.why, "format": kind, "out": target}
        return print_dry_run("export", facts, needs, as_json=as_json)
    require_inputs(needs)
    extraction = None if base is None else job.Extraction(base, rank)
    made = job.export_model(choice.address, settings, kind, out, dtype, extraction)
    if kind == "comfyui":
        log.info("ComfyUI's own Wan nodes pass one time; this file needs a node that passes two.")
    print_result({"model": choice.address, "format": kind, "out": made}, as_json=as_json, text=str(made))
