"""From a stage's inputs to a trainer that can run, and from a finished run to its model.

Networks, data and objective are put together here, once for all stages; ``stages`` holds what differs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.errors import UsageError
from anyflow_cli.model.backbone import Backbone, BackboneSources, Role
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import apply_attention, parallelize
from anyflow_cli.model.pictures import check_pictures
from anyflow_cli.model.pipeline_io import read_config, save_adapter, save_pipeline
from anyflow_cli.model.precision import Precision, resolve_precision
from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import is_checkpoint, trained_weights
from anyflow_cli.runs.latents import check_sizes, open_latents
from anyflow_cli.runs.lineage import RunInputs, RunLineage, begin_run
from anyflow_cli.runs.open import last_checkpoint, merged_student, open_model
from anyflow_cli.train.objectives import objective_of, roles_of
from anyflow_cli.train.preview import make_preview
from anyflow_cli.train.stages import STAGES, adapter_on_teacher, training_section
from anyflow_cli.train.trainer import OnStep, Trainer, make_accelerator
from anyflow_cli.train.validation import TrainingPart

log = logging.getLogger(__name__)


class TrainingResult(NamedTuple):
    """What a training command leaves."""

    model: Path
    adapter: Path | None
    steps: int


@dataclass(frozen=True)
class PreparedTraining:
    """A trainer, and what its result is saved with."""

    recipe: schema.Recipe
    inputs: RunInputs
    trainer: Trainer
    lineage: RunLineage

    def save_result(self) -> TrainingResult:
        """Save the averaged student as a pipeline folder; every process calls this."""
        trainer, inputs = self.trainer, self.inputs
        lora = trainer.backbone.lora
        if trainer.accelerator.is_main_process:
            # no process has all weights of a sharded run; the last checkpoint does
            sharded = trainer.sharded
            average = trained_weights(last_checkpoint(inputs.directory)) if sharded else trainer.ema.shadow
            if lora is not None:
                save_adapter(inputs.adapter, average, lora, self.lineage.base)
            model, student = self.recipe.model, trainer.backbone.network_of("student")
            network = merged_student(inputs.base, model, average, two_time=student.config.two_time)
            facts, shift = {**self.lineage.as_dict(), "steps": trainer.step}, model.shift
            save_pipeline(inputs.finished, network, inputs.pipeline, facts, shift=shift, replace=True)
            log.info("The averaged model is in %s.", inputs.finished)
        trainer.accelerator.wait_for_everyone()
        return TrainingResult(inputs.finished, inputs.adapter if lora else None, trainer.step)


def prepare_training(
    recipe: schema.Recipe, inputs: RunInputs, on_step: OnStep | None = None
) -> PreparedTraining:
    """Begin or continue a run: create its directory, load networks and data, build the trainer."""
    stage, settings = STAGES[inputs.section], training_section(recipe, inputs.section)
    has_experts = not is_checkpoint(inputs.base) and read_config(inputs.base).boundary is not None
    partly = recipe.model.causal is not None or has_experts
    accelerator = make_accelerator(recipe.launch, partly=partly)
    kind = TrainingPart if inputs.section == "finetune" else LatentData
    with accelerator.main_process_first():
        data = open_latents(recipe, inputs.data, inputs.pipeline, inputs.directory, kind)
    check_sizes(
        recipe.model, data.storage, [shape for shape, _ in data.buckets]
    )  # before there is a run that another size would not fit
    lineage, precision = _begin(recipe, inputs, accelerator)
    # FSDP2 moves its shards itself; a base is stored in less before it takes room on the device
    waits = recipe.launch.sharding != "none" or recipe.launch.offload or recipe.model.base_weights != "full"
    place = "cpu" if waits else accelerator.device
    backbone = load_backbone(recipe, inputs, precision, place)
    _check_data(recipe, backbone, data)
    networks = backbone.networks()
    parallelize(networks, recipe.model, recipe.launch, accelerator.device)
    apply_attention(
        networks, recipe.model.attention, data.latent_shape, precision, accelerator.device, trains=True
    )
    preview, writes = None, accelerator.is_main_process
    together = recipe.launch.sharding != "none" or (recipe.launch.context_parallel or 1) > 1
    samples = writes or together  # all processes call a sharded network, or one that shares videos
    if samples and settings.preview_every and settings.preview_prompts:
        how = stage.preview(recipe)
        preview = make_preview(inputs.directory, backbone, data, inputs.pipeline, how, recipe.model, writes)
    trainer = Trainer(
        inputs.directory,
        objective_of(recipe.model, settings, backbone, data.negative),
        Batches(data, settings.global_batch, settings.seed, recipe.data.max_corrupt),
        settings,
        accelerator=accelerator,
        launch=recipe.launch,
        precision=precision,
        workers=recipe.data.workers,
        on_step=on_step,
        preview=preview,
    )
    return PreparedTraining(recipe, inputs, trainer, lineage)


def _begin(recipe: schema.Recipe, inputs: RunInputs, accelerator: Any) -> tuple[RunLineage, Precision]:
    """Create the run's directory, on the main process first. A run keeps the precision it began with."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = resolve_precision(recipe.model.precision, device)
    with accelerator.main_process_first():
        lineage = begin_run(recipe, inputs, precision, accelerator.num_processes)
    if recipe.model.precision == "auto" and lineage.precision != precision:
        raise UsageError(
            f"This run began in {lineage.precision}, and `auto` means {precision} on this machine.",
            f"Choose with --set model.precision={lineage.precision}.",
        )
    return lineage, precision


def load_backbone(
    recipe: schema.Recipe, inputs: RunInputs, precision: Precision, device: torch.device | str = "cpu"
) -> Backbone:
    """Load the networks of a stage straight onto a device."""
    sources = _backbone_sources(recipe, inputs)
    must_be_any_step = sources.network == inputs.parents.get("start")

    def load(path: Path, dtype: torch.dtype) -> FlowMapTransformer:
        network = open_model(str(path), recipe, dtype, device).network
        if path == sources.network and must_be_any_step:
            _check_any_step(network, path, recipe)
        elif path == sources.network and not sources.two_time and network.config.two_time:
            raise UsageError(
                f"{path} is an any-step model, not a teacher.", "Set model.teacher to a plain Wan model."
            )
        return network

    seed = training_section(recipe, inputs.section).seed
    return Backbone.build(recipe.model, sources, load, precision=precision, seed=seed)


def _backbone_sources(recipe: schema.Recipe, inputs: RunInputs) -> BackboneSources:
    start = inputs.parents.get("start") or inputs.parents["teacher"]
    roles = roles_of(training_section(recipe, inputs.section))
    if inputs.section != "distill":
        tunes_teacher = (inputs.section, recipe.train_flowmap.objective) == ("train_flowmap", "flow-matching")
        return BackboneSources(start, roles, two_time=not tunes_teacher)
    real = inputs.parents["real score"]
    if inputs.base == start or is_checkpoint(start):
        return BackboneSources(start, roles, scores=real if "real" in roles else None)
    return BackboneSources(
        inputs.base,
        roles,
        student_adapter=adapter_on_teacher(recipe, start),
        real_adapter=adapter_on_teacher(recipe, real),
    )


def _check_any_step(network: FlowMapTransformer, path: Path, recipe: schema.Recipe) -> None:
    """Refuse a model that is not any-step, or is causal where the recipe is not, or the other way round."""
    if not network.config.two_time:
        raise UsageError(
            f"{path} is a teacher, not an any-step model.",
            "Name a model that `anyflow train-flowmap` or `anyflow distill` trained.",
        )
    causal = recipe.model.causal
    if (network.config.causal is None) != (causal is None):
        kinds = ("bidirectional", "causal") if causal is not None else ("causal", "bidirectional")
        raise UsageError(
            f"{path} is a {kinds[0]} model, and recipe {recipe.name} is {kinds[1]}.",
            "Use the recipe that the model was trained with, or one with the same model.causal.",
        )


def _check_data(recipe: schema.Recipe, backbone: Backbone, data: LatentData) -> None:
    """Refuse data of another model than those of the roles, before the first step."""
    networks: dict[str, tuple[Role, str]] = {
        "model": ("student", "Encode a data set with this recipe's teacher: `anyflow synthesize`.")
    }
    if "real" in backbone.roles:
        hint = "Name a distill.real_score with the teacher's own text encoder and VAE."
        networks["real score"] = ("real", hint)
    for name, (role, hint) in networks.items():
        config = backbone.network_of(role).config
        check_pictures(config, recipe.model, f"The {name}")
        for what, found, wanted in (
            ("latents of {} channels", data.latent_shape[1], config.out_channels),
            ("text of width {}", data.text_dim, config.text_dim),
        ):
            if found != wanted:
                message = f"{data.storage} holds {what.format(found)}; the {name} takes {wanted}."
                raise UsageError(message, hint, everywhere=True)
    first = data.batch(data.buckets[0].positions[:1]).condition if recipe.model.needs_pictures else None
    if first is not None and first.channels is None:
        raise UsageError(
            f"{data.storage} has no pictures, which the model needs.",
            "Encode a data set with this recipe: `anyflow synthesize`.",
            everywhere=True,
        )
