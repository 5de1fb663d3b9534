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
    transplant: options.TransplantOption = None,
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
    if base is not None and kind != "adapter" and transplant is None:
        raise UsageError(
            "--base is for --format adapter and --transplant.", "Add one of them, or omit --base."
        )
    if transplant is not None and kind == "adapter":
        raise UsageError("--transplant writes whole models.", "Use another --format.")

    from anyflow_cli import export as job
    from anyflow_cli.runs.paths import RunPaths
    from anyflow_cli.runs.resources import Given, find_model, inputs, is_ready, model_resource, require_inputs

    paths = RunPaths(runs, settings.name)
    choice, needs = find_model(settings, paths, model), inputs(settings, paths, "export", Given(model))
    log.info("Model: %s (%s)", *choice)
    target = job.destination(kind, out)
    onto = None if transplant is None else job.transplant_of(transplant, choice.address, base)
    if onto is not None:
        needs += [model_resource(name, address, settings) for name, address in onto.models.items()]
    if dry_run:
        facts = {"model": choice.address, "because": choice.why, "format": kind, "out": target}
        if onto is not None:
            facts |= {"transplant": f"onto {onto.other} at {onto.strength:g}", "base": onto.base}
            if is_ready(needs):
                job.transplanted(choice.address, onto, settings)
        return print_dry_run("export", facts, needs, as_json=as_json)
    require_inputs(needs)
    if onto is not None:
        log.info("What it was trained to is its difference from %s.", onto.base)
    extraction = None if base is None or onto is not None else job.Extraction(base, rank)
    made = job.export_model(choice.address, settings, kind, out, dtype, extraction, onto)
    print_result({"model": choice.address, "format": kind, "out": made}, as_json=as_json, text=str(made))
