"""From a recipe to a run and its finished model: what each training command does.

Each stage first says what it would be made from (``*_inputs``: paths alone, checked, nothing loaded), then
``train`` assembles networks, data and objective, runs the loop and saves the averaged student as a pipeline
folder. A stage finds what the stage before it left in the recipe's runs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import read_manifest
from anyflow_cli.errors import UsageError
from anyflow_cli.model.backbone import Backbone, BackboneSources, Role
from anyflow_cli.model.causal import check_partition
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import parallelize
from anyflow_cli.model.pipeline_io import load_adapter, resolve_pipeline, save_adapter, save_pipeline
from anyflow_cli.model.precision import Precision, resolve_precision
from anyflow_cli.recipe import schema
from anyflow_cli.runs import resources
from anyflow_cli.runs.lineage import RunInputs, begin_run
from anyflow_cli.runs.open import (
    is_checkpoint,
    last_checkpoint,
    locate,
    open_model,
    run_of,
    trained_weights,
)
from anyflow_cli.runs.paths import MODEL, RunPaths
from anyflow_cli.train import objectives
from anyflow_cli.train.preview import PreviewSettings, make_preview
from anyflow_cli.train.trainer import OnStep, Trainer, make_accelerator
from anyflow_cli.train.validation import TrainingPart

log = logging.getLogger(__name__)

ModelRole = dict[str, torch.Tensor]
ON_POLICY_ROLES: tuple[Role, ...] = ("student", "real", "fake")


class Finished(NamedTuple):
    """What a training command leaves."""

    model: Path
    adapter: Path | None
    steps: int


# --- what a stage is made from


def flowmap_inputs(recipe: schema.Recipe, paths: RunPaths) -> RunInputs:
    """Stage 1, its baselines, and the tuning of the teacher (by ``train_flowmap.objective``)."""
    found = resources.require_inputs(resources.inputs(recipe, paths, "train-flowmap"))
    data, teacher = _data(found), resolve_pipeline(found["teacher"])
    directory = paths.stage_1(recipe.train_flowmap.objective)
    return RunInputs(directory, "train_flowmap", data, {"teacher": teacher}, teacher)


def distill_inputs(recipe: schema.Recipe, paths: RunPaths) -> RunInputs:
    """Stage 2: from the stage-1 model, towards the tuned teacher if there is one."""
    found = resources.require_inputs(resources.inputs(recipe, paths, "distill"))
    data, start, teacher = _data(found), locate(found["stage-1 model"]), resolve_pipeline(found["teacher"])
    real = locate(found["tuned teacher"]) if "tuned teacher" in found else teacher
    parents = {"start": start, "real score": real, "teacher": teacher}
    shared = _adapter_of(recipe, start) and (real == teacher or _adapter_of(recipe, real))
    base = teacher if shared else _base_of(recipe, start)
    return RunInputs(paths.stage_2(recipe.distill.simulation), "distill", data, parents, base)


def finetune_inputs(recipe: schema.Recipe, paths: RunPaths, start: str, data: Path) -> RunInputs:
    """Continued flow-map training of any any-step model on other data."""
    read_manifest(data)
    path = locate(start)
    return RunInputs(paths.finetune, "finetune", data, {"start": path}, _base_of(recipe, path))


def _base_of(recipe: schema.Recipe, start: Path) -> Path:
    """The pipeline folder behind a model; adapters need one whose weights are those that they start from."""
    if not is_checkpoint(start):
        return start
    if recipe.model.lora is not None:
        raise UsageError(
            f"Adapters cannot be trained on the checkpoint {start}.",
            f"Make it a model first: `anyflow export --model {start}`.",
        )
    return run_of(start).base


def _data(found: Mapping[str, str]) -> str | Path:
    """The data set, whose manifest is read before a teacher is downloaded."""
    address = found["data set"]
    read_manifest(address)
    return address if "://" in address else Path(address)


# --- networks


def backbone_sources(recipe: schema.Recipe, inputs: RunInputs) -> BackboneSources:
    """Where a stage's weights come from.

    Stage 2 shares one base among all roles where its start and its real score are adapters of the teacher.
    """
    start = inputs.parents.get("start") or inputs.parents["teacher"]
    if inputs.section != "distill":
        tunes_teacher = (inputs.section, recipe.train_flowmap.objective) == ("train_flowmap", "flow-matching")
        return BackboneSources(start, two_time=not tunes_teacher)
    real = inputs.parents["real score"]
    if inputs.base == start or is_checkpoint(start):
        return BackboneSources(start, ON_POLICY_ROLES, scores=real)
    return BackboneSources(
        inputs.base,
        ON_POLICY_ROLES,
        student_adapter=_adapter_of(recipe, start),
        real_adapter=_adapter_of(recipe, real),
    )


def load_backbone(recipe: schema.Recipe, inputs: RunInputs, precision: Precision) -> Backbone:
    """The networks of a stage, from files."""
    sources = backbone_sources(recipe, inputs)
    must_be_any_step = inputs.section == "finetune" or sources.scores is not None

    def load(path: Path, dtype: torch.dtype) -> FlowMapTransformer:
        network = open_model(str(path), recipe, dtype).network
        if path == sources.network and must_be_any_step:
            _check_any_step(network, path, recipe)
        elif path == sources.network and not sources.two_time and network.config.two_time:
            raise UsageError(
                f"{path} is an any-step model, not a teacher.", "Set model.teacher to a plain Wan."
            )
        return network

    seed = _section(recipe, inputs).seed
    return Backbone.build(recipe.model, sources, load, precision=precision, seed=seed)


def _check_any_step(network: FlowMapTransformer, path: Path, recipe: schema.Recipe) -> None:
    """Refuse a model that is not any-step, or not of the recipe's kind."""
    if not network.config.two_time:
        raise UsageError(
            f"{path} is a teacher, not an any-step model.",
            "Give one that `anyflow train-flowmap` or `anyflow distill` made.",
        )
    causal = recipe.model.causal
    if (network.config.causal is None) != (causal is None):
        kinds = ("bidirectional", "causal") if causal is not None else ("causal", "bidirectional")
        raise UsageError(
            f"{path} is a {kinds[0]} model, and recipe {recipe.name} is {kinds[1]}.",
            "Use the recipe that the model was trained with, or one with the same model.causal.",
        )


def _lora(recipe: schema.Recipe) -> LoraSize | None:
    lora = recipe.model.lora
    return LoraSize(lora.rank, lora.alpha) if lora else None


def _adapter_of(recipe: schema.Recipe, model: Path) -> ModelRole | None:
    """The adapter on the teacher that a run left beside its finished model, if sizes agree."""
    folder = model.parent / "adapter"
    if recipe.model.lora is None or model.name != MODEL or not folder.is_dir():
        return None
    adapter = load_adapter(folder)
    belongs = adapter.size == _lora(recipe) and adapter.base == str(resolve_pipeline(recipe.model.teacher))
    return adapter.weights if belongs else None


# --- running


def train(recipe: schema.Recipe, inputs: RunInputs, on_step: OnStep | None = None) -> Finished:
    """Run a stage to its end, or continue it, and save the averaged student."""
    settings = _section(recipe, inputs)
    accelerator, lineage, precision = _begin(recipe, inputs)
    tokens = recipe.model.max_text_tokens
    part = TrainingPart if inputs.section == "finetune" else LatentData
    data = part(inputs.data, tokens)
    backbone = load_backbone(recipe, inputs, precision)
    _check_fit(recipe, backbone, data)
    parallelize(backbone.networks(), recipe.model, recipe.launch, accelerator.device)
    preview, main = None, accelerator.is_main_process
    if (main or recipe.launch.sharding != "none") and settings.preview_every and settings.preview_prompts:
        how = _preview_settings(recipe, inputs)
        preview = make_preview(inputs.directory, backbone, data, inputs.base, how, recipe.model, main)
    trainer = Trainer(
        inputs.directory,
        _objective(recipe, inputs, backbone, data),
        Batches(data, settings.global_batch, settings.seed, recipe.data.max_corrupt),
        settings,
        accelerator=accelerator,
        launch=recipe.launch,
        precision=precision,
        workers=recipe.data.workers,
        on_step=on_step,
        preview=preview,
    )
    trainer.run()
    if accelerator.is_main_process:
        _save(recipe, inputs, trainer, lineage)
    accelerator.wait_for_everyone()
    return Finished(inputs.finished, inputs.adapter if backbone.lora else None, trainer.step)


def _begin(recipe: schema.Recipe, inputs: RunInputs) -> tuple[Any, dict[str, Any], Precision]:
    """Claim the directory, on the main process first. A run keeps the precision it began with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(recipe.model.precision, device)
    accelerator = make_accelerator(recipe.launch, causal=recipe.model.causal is not None)
    facts = {"precision": precision, "processes": accelerator.num_processes}
    with accelerator.main_process_first():
        lineage = begin_run(recipe, inputs, facts)
    if recipe.model.precision == "auto" and lineage["precision"] != precision:
        raise UsageError(
            f"This run began in {lineage['precision']}, and `auto` means {precision} on this machine.",
            f"Say which with --set model.precision={lineage['precision']}.",
        )
    return accelerator, lineage, precision


def _section(recipe: schema.Recipe, inputs: RunInputs) -> schema.TrainingSection:
    return cast("schema.TrainingSection", getattr(recipe, inputs.section))


def _objective(
    recipe: schema.Recipe, inputs: RunInputs, backbone: Backbone, data: LatentData
) -> objectives.Objective:
    shift = recipe.model.shift
    causal = recipe.model.causal
    if inputs.section == "distill":
        return objectives.on_policy(backbone, data.negative, recipe.distill, shift, causal)
    if inputs.section == "finetune":
        settings = recipe.finetune
        return objectives.stage_one(
            "flow-map", backbone, data.negative, settings.flow_map, settings.optimizer, shift, causal
        )
    first = recipe.train_flowmap
    return objectives.stage_one(
        first.objective, backbone, data.negative, first.flow_map, first.optimizer, shift, causal
    )


def _check_fit(recipe: schema.Recipe, backbone: Backbone, data: LatentData) -> None:
    """Refuse data made for another model than any of the roles' before a step is taken."""
    causal, frames = recipe.model.causal, data.latent_shape[0]
    if causal is not None:
        check_partition(causal.partition, frames)
    make = "Make a data set with this recipe's teacher: `anyflow synthesize`."
    _check_sizes(backbone.network_of("student"), "model", data, make)
    if "real" in backbone.roles:
        name = "Name a distill.real_score with the teacher's own text encoder and VAE."
        _check_sizes(backbone.network_of("real"), "real score", data, name)


def _check_sizes(network: FlowMapTransformer, name: str, data: LatentData, hint: str) -> None:
    for what, has, wants in (
        ("latents of {} channels", data.latent_shape[1], network.config.in_channels),
        ("text of width {}", data.text_dim, network.config.text_dim),
    ):
        if has != wants:
            message = f"{data.place} holds {what.format(has)}; the {name} takes {wants}."
            raise UsageError(message, hint, everywhere=True)


def _preview_settings(recipe: schema.Recipe, inputs: RunInputs) -> PreviewSettings:
    student = PreviewSettings("flow-map", recipe.sample.nfe, _section(recipe, inputs).preview_prompts)
    if inputs.section == "train_flowmap" and recipe.train_flowmap.objective == "flow-matching":
        nfe, scale = (recipe.sample.teacher_steps,), recipe.sample.teacher_guidance
        return replace(student, method="euler", nfe=nfe, guidance=scale if scale != 1 else None)
    ode = inputs.section == "train_flowmap" and recipe.train_flowmap.objective == "consistency-ode"
    simulated = inputs.section == "distill" and recipe.distill.simulation == "consistency"
    return replace(student, method="consistency") if ode or simulated else student


def _save(recipe: schema.Recipe, inputs: RunInputs, trainer: Trainer, lineage: dict[str, Any]) -> None:
    lora = trainer.backbone.lora
    if trainer.divided:  # no process has all of it; the last checkpoint does
        last = last_checkpoint(inputs.directory)
        network, adapter = open_model(str(last), recipe).network, trained_weights(last)
    else:
        adapter = trainer.ema.shadow
        with trainer.ema.swapped():
            network = trainer.backbone.merged("student")
    if lora is not None:
        save_adapter(inputs.adapter, adapter, lora, lineage["base"])
    facts = {**lineage, "steps": trainer.step}
    save_pipeline(inputs.finished, network, inputs.base, facts, shift=recipe.model.shift, replace=True)
    log.info("The averaged model is in %s.", inputs.finished)
