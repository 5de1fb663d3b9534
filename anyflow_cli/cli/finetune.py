"""``anyflow finetune``: continue training an any-step model on your own videos; compare before and after."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.progress import Progress
from anyflow_cli.cli.train import TrainingCommand, run_training
from anyflow_cli.errors import UsageError
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.distributed import world_size

if TYPE_CHECKING:
    from anyflow_cli.data.dataset import LatentData
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.runs.lineage import RunInputs
    from anyflow_cli.runs.open import ModelChoice
    from anyflow_cli.train.prepare import TrainingResult

STEPS = (4, 32)  # at which a model is scored, before and after
INSPECTED = 64  # captions that decide whether the built-in suite can score the videos

log = logging.getLogger(__name__)


def finetune(
    data: options.DataOption = None,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    model: options.InitFromOption = None,
    lora: options.LoraOption = None,
    steps: options.StepsOption = None,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Continue training an any-step model on your own videos; it stays any-step.

    Compares 4 and 32 steps before and after: by score if the built-in suite can judge the captions, otherwise
    by the flow-map error on held-out clips. The same command continues a run that was stopped.
    """
    run_training(
        TrainingCommand(
            "finetune", recipe, assignments, runs, steps, seed, processes, dry_run, as_json,
            loras=lora,
            lora_key="finetune.init_from",
            overrides={"--model": ("finetune.init_from", model)},
            data=data,
            encode=partial(_encode_videos, data),
            compare=_compare,
        )
    )  # fmt: skip


def _encode_videos(data: Path | None, recipe: Recipe, paths: RunPaths, dry_run: bool) -> Path | None:
    """Encode videos, by default clips of the recipe's world; in a dry run None unless all are encoded."""
    from anyflow_cli.data.clips import draw_clips
    from anyflow_cli.data.shards import MANIFEST
    from anyflow_cli.synthesize.job import prepare_synthesis
    from anyflow_cli.synthesize.run import run_synthesis

    if data is None:
        data = paths.finetune_clips
        if dry_run and not data.is_dir():
            return None
        if not dry_run and recipe.finetune.world is not None:
            draw_clips(data, recipe.finetune.world, recipe.finetune.clips)
    out = paths.finetune_data
    job = prepare_synthesis(recipe, out, data, dry_run=dry_run, choose_another="--runs")
    left = job.videos_left()
    if not left and (out / MANIFEST).exists():
        return out
    if dry_run:
        return None
    if world_size() > 1:
        raise UsageError(
            "Videos are encoded by a single process, and this is one of several.",
            f"First run `anyflow synthesize --from-videos {data} --out {out}`, then give --data {out}.",
        )
    with Progress("encode videos", left, "videos") as progress:
        report = run_synthesis(job, progress.update)
    log.info("%d of %d videos are in %s.", report.samples, report.wanted, out)
    return out


def _compare(
    recipe: Recipe, paths: RunPaths, inputs: RunInputs, finished: TrainingResult
) -> dict[str, dict[str, Any]]:
    """Score the model before and after training, or measure its error where the suite cannot."""
    from anyflow_cli.data.dataset import LatentData
    from anyflow_cli.runs.latents import open_latents
    from anyflow_cli.runs.open import ModelChoice
    from anyflow_cli.runs.resources import find_model

    before = find_model(recipe, paths, recipe.finetune.init_from)
    models = {"before": before, "after": ModelChoice(str(finished.model), "fine-tuned")}
    clips = open_latents(recipe, inputs.data, inputs.pipeline, inputs.directory, LatentData)
    world = _world_of(recipe, clips)
    if world is None:
        return {name: _error(choice, recipe, clips) for name, choice in models.items()}
    return {name: _scores(choice, recipe, paths, world) for name, choice in models.items()}


def _world_of(settings: Recipe, clips: LatentData) -> str | None:
    """Name of the world that all captions belong to; None where the suite cannot score the videos."""
    from anyflow_cli.data.shapes_world import FRAMES, HEIGHT, WIDTH, WORLDS, parse_caption

    model = settings.model
    if model.needs_pictures:  # the suite's prompts come without pictures
        return None
    if (model.frames, model.height, model.width) != (FRAMES, HEIGHT, WIDTH):
        return None
    captions = clips.batch(clips.buckets[0].positions[:INSPECTED]).captions
    attributes = [parse_caption(caption) for caption in captions]
    for world in WORLDS.values():
        if all("shape" in named and named.get("colour") in world.colors for named in attributes):
            return world.name
    return None


def _scores(choice: ModelChoice, settings: Recipe, paths: RunPaths, world: str) -> dict[str, Any]:
    """Total of the suite at each step count, on the same prompts and seeds for all models."""
    from anyflow_cli.evaluate.registry import protocol_for
    from anyflow_cli.evaluate.run import prepare_evaluation, run_evaluation

    evaluate = settings.evaluate.model_copy(update={"suite": "shapes", "nfe": STEPS, "teacher": False})
    data = settings.data.model_copy(update={"world": world})
    recipe = settings.model_copy(update={"evaluate": evaluate, "data": data})
    job = prepare_evaluation(recipe, protocol_for(recipe), choice, paths.evaluate)
    with Progress("score", job.videos, "videos") as progress:
        result = run_evaluation(job, on_progress=progress.update)
    if missing := result.measured[0].result.missing:
        log.warning("No prompt asks for %s, so there is no Total: set evaluate.prompts higher.", missing[0])
    return {f"total at {one.steps} steps": one.result.total for one in result.measured}


def _error(choice: ModelChoice, settings: Recipe, clips: LatentData) -> dict[str, Any]:
    """Flow-map error on held-out clips, for videos that the suite cannot score."""
    from anyflow_cli.runs.open import open_model
    from anyflow_cli.train.validation import flow_map_error

    found = flow_map_error(open_model(choice.address, settings).network, settings, clips)
    return {"flow-map error": found.error, "clips": found.clips, "held out": found.unseen}
