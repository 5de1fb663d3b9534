"""The plan of a recipe: memory and FLOPs of each stage, settings that would make it fit, and disk space.

Of sharded runs only the division has been checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.base_storage import frozen_matrices
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.pipeline_io import read_config
from anyflow_cli.model.pipeline_sizes import PipelineSizes, pipeline_sizes
from anyflow_cli.model.precision import Precision, resolve_precision
from anyflow_cli.plan.advice import Advice, advise
from anyflow_cli.plan.hardware import PINNED_LINK, Hardware, this_machine
from anyflow_cli.plan.ladder import SampledParts, network_bytes, rung_in_words, rungs, settings_of
from anyflow_cli.plan.networks import Setup, condition_of, decoding_cost, fake_backbone, role_sizes
from anyflow_cli.plan.steps import Moment, keeps_gradients, sampling_cost, step_cost
from anyflow_cli.recipe import schema
from anyflow_cli.recipe.compare import with_values
from anyflow_cli.runs.checkpoint import is_checkpoint
from anyflow_cli.runs.lineage import run_of
from anyflow_cli.runs.open import describe, locate
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.runs.resources import Resource, inputs
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.utils.units import GIB, memory_size

FP32 = 4
MACHINE = 8  # GPUs that a machine is assumed to have
PLANNED_STAGES = {  # name, command, and section of the recipe; a step of finetune is one of stage 1
    "synthesize": ("synthesis", "synthesize", "synthesize"),
    "tune": ("teacher tuning", "train-flowmap --objective flow-matching", "train_flowmap"),
    "train-flowmap": ("stage 1", "train-flowmap", "train_flowmap"),
    "distill": ("stage 2", "distill", "distill"),
    "sample": ("sampling", "sample", "sample"),
    "stream": ("streaming", "sample --stream", "sample"),
}
TRAINING = ("tune", "train-flowmap", "distill")
CHECKPOINTING = {"with checkpointing": True, "without checkpointing": False}


class Target(NamedTuple):
    """A recipe on a machine."""

    recipe: schema.Recipe
    pipeline: PipelineSizes  # of the teacher
    hardware: Hardware

    @property
    def precision(self) -> Precision:
        """What ``auto`` means on the machine."""
        setting = self.recipe.model.precision
        return "bf16" if self.hardware.is_gpu and setting == "auto" else resolve_precision(setting, "cpu")

    @property
    def sampling_budget(self) -> int:
        """Bytes of tensors that sampling may hold on a device: all it can, or the recipe's limit."""
        limit = self.recipe.memory.limit
        if limit == "auto":
            return self.hardware.usable
        return min(self.hardware.usable, replace(self.hardware, memory=int(limit * GIB)).usable)

    def budget(self, key: str) -> int:
        """Bytes of tensors that a stage may hold on a device."""
        return self.hardware.usable if key in TRAINING else self.sampling_budget

    def fits_host(self, stage: StagePlan) -> bool:
        """Whether the machine's own memory takes what its processes keep there."""
        here = self.hardware.count if stage.key in TRAINING else self.recipe.launch.processes or MACHINE
        return stage.host * min(here, self.hardware.count, MACHINE) <= self.hardware.usable_host

    def fits(self, stage: StagePlan) -> bool:
        """Whether a stage fits the device and the machine's own memory."""
        return stage.peak.total <= self.budget(stage.key) and self.fits_host(stage)

    def setup(self, settings: schema.TrainingSection | None, frames: int | None, **other: Any) -> Setup:
        """What one process runs, on videos of so many frames (None: the recipe's)."""
        model, network = self.recipe.model, self.pipeline.network
        latent = self.pipeline.latent_shape(frames or model.frames, model.height, model.width)
        text = (model.max_text_tokens, network.text_dim)
        return Setup(model, settings, network, latent, text, self.precision, self.hardware.is_gpu, **other)


def target_of(recipe: schema.Recipe, hardware: Hardware) -> Target:
    """Look up the sizes of the recipe's teacher."""
    return Target(recipe, pipeline_sizes(recipe.model.teacher, recipe.model.components), hardware)


class StagePlan(NamedTuple):
    """One command, or one objective of it, on one process."""

    key: str  # in PLANNED_STAGES
    setup: Setup
    peak: Moment
    flops: float  # of an iteration, or of a video
    repeats: int  # iterations, or videos
    processes: int = 1  # that share the repeats
    rollout: int = 0  # bytes of stage 2's rollout and its graph
    host: int = 0  # bytes in the host's memory
    copies: float = 0.0  # seconds per repeat in which weights are copied between host and device
    rung: schema.MemorySection | None = None  # of sampling
    moments: tuple[Moment, ...] = ()  # of sampling

    def seconds(self, hardware: Hardware) -> float | None:
        """Time of one repeat; None where the speed of the hardware is unknown."""
        computed = hardware.seconds(self.flops, self.key)
        if computed is None:
            return None
        overlap = self.rung is not None and self.rung.network == "streamed"
        return max(computed, self.copies) if overlap else computed + self.copies

    @property
    def name(self) -> str:
        """Its name for people."""
        return PLANNED_STAGES[self.key][0]

    @property
    def command(self) -> str:
        """The command that runs it."""
        return PLANNED_STAGES[self.key][1]

    def hours(self, hardware: Hardware) -> float | None:
        """Time of all repeats; None where the speed of the hardware is unknown."""
        seconds = self.seconds(hardware)
        return None if seconds is None else seconds * self.repeats / self.processes / 3600

    @property
    def tokens(self) -> int:
        """Tokens of a video in one process."""
        return self.setup.layout_of(NetworkCall("student", 1, gradient=False)).tokens

    @property
    def activations(self) -> dict[str, int]:
        """Bytes of activations at the peak of a training step, with checkpointing and without."""
        steps = {name: step_cost(self.setup.with_checkpointing(on)) for name, on in CHECKPOINTING.items()
                 if self.setup.settings}  # fmt: skip
        peaks = {name: max(step.moments, key=lambda one: one.total) for name, step in steps.items()}
        return {name: peak.parts["activations"] for name, peak in peaks.items()}


class Plan(NamedTuple):
    """A recipe on a machine."""

    target: Target
    stages: Mapping[str, StagePlan]
    advice: Mapping[str, Advice]  # for the stages that do not fit
    disk: Mapping[str, int]  # bytes
    needs: Mapping[str, Sequence[Resource]]  # of each command


def make_plan(recipe: schema.Recipe, hardware: Hardware, paths: RunPaths) -> Plan:
    """Plan all stages of a recipe, whose runs are in ``paths``."""
    target = target_of(recipe, hardware)
    stages = {
        key: plan_stage(target, key) for key in PLANNED_STAGES if key != "stream" or recipe.model.causal
    }
    too_large = [key for key, stage in stages.items() if stage.peak.total > target.budget(key)]
    advice = {key: advise_stage(target, key) for key in too_large}
    commands = dict.fromkeys(command.split()[0] for _, command, _ in PLANNED_STAGES.values())
    needs = {name: inputs(recipe, paths, name) for name in commands}
    disk = {f"data: {part}": size for part, size in data_usage(target).items()}
    for stage in (stages[key] for key in TRAINING):
        disk[f"{stage.name}: checkpoints"] = checkpoint_usage(stage.setup)
        disk[f"{stage.name}: model"] = model_usage(stage.setup)
    return Plan(target, stages, advice, disk, needs)


def plan_stage(target: Target, key: str) -> StagePlan:
    """Plan one of ``PLANNED_STAGES``."""
    return _training(target, key) if key in TRAINING else _sampling(target, key)


def place(recipe: schema.Recipe, key: str, model: str | None = None) -> tuple[schema.Recipe, str]:
    """The recipe with the rung on which this machine samples, and that choice in words.

    Args:
        recipe: The recipe.
        key: A stage of ``PLANNED_STAGES`` that samples, "teacher" or "evaluate".
        model: Address of the model, if it is not the recipe's teacher.

    Raises:
        UsageError: No rung fits.
    """
    hardware = this_machine()
    sizes = pipeline_sizes(recipe.model.teacher) if model is None else _sizes_of(model, recipe)
    target = Target(recipe, sizes, hardware)
    plan = plan_stage(target, key)
    assert plan.rung is not None
    held, budget = memory_size(plan.peak.total), memory_size(target.sampling_budget)
    if plan.peak.total <= target.sampling_budget and not target.fits_host(plan):
        raise UsageError(
            f"Sampling keeps {memory_size(plan.host)} per process in the host's memory, and this machine has "
            f"{memory_size(hardware.host or 0)}.",
            "Raise --memory, or start fewer processes.",
        )
    if plan.peak.total > target.sampling_budget:
        gpu = f"1x{max(round(target.sampling_budget / 2**30), 1)}GB"
        raise UsageError(
            f"Sampling needs {held} at {plan.peak.name}, and may use {budget}.",
            "Raise --memory, or sample fewer videos at once or smaller ones."
            if hardware.is_gpu
            else "Raise --memory. A GPU could take parts from the host's memory when they work: "
            f"`anyflow plan -r {recipe.name} --gpus {gpu}`.",
        )
    parts = ", ".join(f"{part} {memory_size(size)}" for part, size in plan.peak.parts.items() if size)
    said = f"Memory: {rung_in_words(plan.rung)}. Peak {held} of {budget}, at {plan.peak.name} ({parts})."
    said += f" In the host's memory: {memory_size(plan.host)}." if plan.host else ""
    values: dict[str, Any] = dict(settings_of(plan.rung))
    return with_values(recipe, values), said


def _sizes_of(model: str, recipe: schema.Recipe) -> PipelineSizes:
    """Sizes of the model at an address; of a published one, which may not be here, from the table."""
    try:
        return pipeline_sizes(model)
    except UsageError:
        info = describe(model, recipe)
        return pipeline_sizes(str(info.pipeline))._replace(network=read_config(info.path))


def advise_stage(target: Target, key: str) -> Advice:
    """Look for settings that make a stage fit."""

    def peak_of(recipe: schema.Recipe) -> int:
        return plan_stage(target._replace(recipe=recipe), key).peak.total

    return advise(peak_of, PLANNED_STAGES[key][2], target.recipe, target.hardware, target.budget(key))


def training_setup(target: Target, key: str) -> Setup:
    """What one process of a training stage runs."""
    count, launch = target.hardware.count, target.recipe.launch
    settings = getattr(target.recipe, PLANNED_STAGES[key][2])
    if key == "tune":
        settings = settings.model_copy(update={"objective": "flow-matching"})
    context = launch.context_parallel or 1
    if count % context:
        raise UsageError(
            f"{count} GPUs do not form groups of {context}, which share a video (launch.context_parallel).",
            f"Plan for a multiple of {context} GPUs, or set launch.context_parallel=null.",
        )
    ranks = count // context
    if settings.global_batch % ranks:
        raise UsageError(
            f"A global batch of {settings.global_batch} does not divide among {ranks} "
            + ("processes." if context == 1 else f"groups of {context} processes."),
            f"Set global_batch to a multiple of {ranks}, or plan for another number of GPUs.",
        )
    two_time = getattr(settings, "objective", None) != "flow-matching"
    scores = _own_scores(target, settings) if key == "distill" else None
    shards = {"none": None, "full": count, "hybrid": min(count, MACHINE)}[launch.sharding]
    own = {"scores": scores, "ranks": ranks, "context": context, "shards": shards, "two_time": two_time}
    return target.setup(settings, None, offload=launch.offload and target.hardware.is_gpu, **own)


def _own_scores(target: Target, settings: schema.DistillSection) -> NetworkConfig | None:
    """Sizes of the scores' base; None where start and real score are adapters of the same teacher."""
    teacher = scores = target.pipeline.network
    if settings.real_score is not None:
        place = Path(settings.real_score)
        found = locate(settings.real_score) if place.is_dir() else place
        scores = pipeline_sizes(str(run_of(found).base if is_checkpoint(found) else found)).network
    given = [Path(address) for address in (settings.init_from, settings.real_score) if address is not None]
    are_adapters = target.recipe.model.lora and all((one.parent / "adapter").is_dir() for one in given)
    sizes = [(network.dim, network.layers, network.ffn_dim) for network in (teacher, scores)]
    return None if are_adapters and sizes[0] == sizes[1] else scores


CHECKPOINTED = [{"gradient_checkpointing": False, "checkpoint_every_n_blocks": 1}] + [
    {"gradient_checkpointing": True, "checkpoint_every_n_blocks": every} for every in (4, 3, 2, 1)
]  # of "auto", mildest first


def choose_checkpointing(recipe: schema.Recipe, key: str, hardware: Hardware) -> schema.Recipe:
    """The recipe with as few recomputed blocks as fit a stage on a machine, or with all."""
    for values in CHECKPOINTED:
        chosen = with_values(recipe, {f"model.{name}": value for name, value in values.items()})
        if plan_stage(target_of(chosen, hardware), key).peak.total <= hardware.usable:
            break
    return chosen


def _training(target: Target, key: str) -> StagePlan:
    if target.recipe.model.gradient_checkpointing == "auto":
        chosen = choose_checkpointing(target.recipe, key, target.hardware)
        return _training(target._replace(recipe=chosen), key)
    setup = training_setup(target, key)
    step, settings = step_cost(setup), setup.settings
    assert settings is not None
    moments = [*step_moments(setup), *_preview_moments(target, setup, settings)]
    host, copies = 0, 0.0
    if setup.offload:
        base = base_bytes(setup).whole if setup.shards is None else 0
        host = base or sum(_unsharded(setup).values()) // (setup.shards or 1)
        copies = base * step.reads / PINNED_LINK
    peak = max(moments, key=lambda one: one.total)
    return StagePlan(
        key, setup, peak, step.flops, settings.steps, rollout=step.rollout, host=host, copies=copies
    )


def _unsharded(setup: Setup) -> dict[str, int]:
    """Bytes of weights and what goes with them, that a process without sharding holds all the time."""
    sizes = role_sizes(setup)
    trained = [size["trainable_bytes"] for size in sizes.values()]
    # DDP's buckets outlive the step; otherwise the gradients of a phase are freed before the next one
    gradients = sum(trained) if setup.ranks * setup.context > 1 and setup.shards is None else max(trained)
    return {
        "weights": sum(size["bytes"] for size in sizes.values()),
        "gradients": gradients * keeps_gradients(setup),
        "optimizer": int(optimizer_bytes(setup) * sum(trained) / FP32),
        "ema": sizes["student"]["trainable_bytes"],
    }


def optimizer_bytes(setup: Setup) -> float:
    """Bytes of both moments per trained value; 8-bit ones have a scale for each 256 values."""
    eight = setup.settings is not None and setup.settings.optimizer.states == "8bit"
    return 2 * (1 + FP32 / 256) if eight else 2 * FP32


class BaseBytes(NamedTuple):
    """Bytes of the frozen matrices under adapters: all, and those of one block of each network."""

    whole: int
    block: int


def base_bytes(setup: Setup) -> BaseBytes:
    """Sizes of what ``launch.offload`` without sharding keeps in the host's memory."""
    backbone, whole, blocks = fake_backbone(setup, 1), 0, 0
    for network in backbone.networks():
        layers = [p for layer in frozen_matrices(network) for p in layer.parameters() if p.dim() == 2]
        block = sum(p.nbytes for p in layers) // setup.unit
        own = setup.network if network is backbone.network_of("student") else setup.scores or setup.network
        whole, blocks = whole + own.layers * block, blocks + block
    return BaseBytes(whole, blocks)


def held(setup: Setup) -> dict[str, int]:
    """Bytes that a process holds all the time."""
    parts = _unsharded(setup)
    if setup.shards is not None:
        parts = {part: 0 if setup.offload else size // setup.shards for part, size in parts.items()}
        gathered = fake_backbone(setup.with_checkpointing(False), 2)  # two blocks, and what is outside
        parts["weights"] += sum(weight.nbytes for weight in gathered.parameters())
    elif setup.offload:  # the frozen base of adapters waits in the host's memory
        base = base_bytes(setup)
        parts["weights"] -= base.whole - base.block
    samples = setup.settings.global_batch // setup.ranks if setup.settings else 0
    return {**parts, "data": FP32 * samples * (math.prod(setup.latent) + math.prod(setup.text))}


def step_moments(setup: Setup) -> Iterator[Moment]:
    """The moments of a training step: network calls, then updates."""
    base = held(setup)
    for name, parts, _ in step_cost(setup).moments:
        yield Moment(name, {**base, **parts, "gradients": base["gradients"] + parts["gradients"]})
    for role, size in role_sizes(setup).items():
        if own := size["trainable_bytes"]:  # AdamW on a GPU makes the roots of all second moments at once
            passing = own // (setup.shards or 1) if setup.gpu else 0
            gradients = base["gradients"] or (0 if setup.offload else own)
            yield Moment(f"{role}: update", {**base, "gradients": gradients, "activations": passing})


def _preview_moments(target: Target, setup: Setup, settings: schema.TrainingSection) -> Iterator[Moment]:
    """The main process samples with the student, then loads the VAE and decodes."""
    if settings.preview_every and settings.preview_prompts:
        base, keeps_casts = held(setup), replace(setup, shards=None)
        cost = sampling_cost(keeps_casts, settings.preview_prompts, is_guided=not setup.two_time)
        yield Moment("preview: sampling", {**base, "cache": cost.cache, "activations": cost.activations})
        vae, decoding = decoding_cost(target.pipeline.vae, setup.latent)
        yield Moment("preview: decoding", {**base, "weights": base["weights"] + vae, "activations": decoding})


class SamplingJob(NamedTuple):
    """What a command samples: videos at once, steps, videos in all, and whether guided or streamed."""

    batch: int
    steps: int
    videos: int = 1
    is_guided: bool = False
    streams: bool = False
    processes: int = 1


def _job(target: Target, key: str) -> SamplingJob:
    """Sampling guided by a teacher, or with the any-step model at the largest of its step counts."""
    recipe = target.recipe
    context = recipe.launch.context_parallel or 1
    if key == "synthesize":
        made = recipe.synthesize
        return SamplingJob(made.batch_size, made.steps, made.count or 1, is_guided=True,
                           processes=target.hardware.count // context)  # fmt: skip
    if key == "evaluate":  # the teacher beside the model takes most
        teacher, batch = recipe.evaluate.teacher, recipe.evaluate.batch_size
        steps = recipe.sample.teacher_steps if teacher else max(recipe.evaluate.nfe)
        return SamplingJob(batch, steps, is_guided=teacher)
    if key == "teacher":
        return SamplingJob(recipe.sample.batch_size, recipe.sample.teacher_steps, is_guided=True)
    streams, steps = key == "stream", max(recipe.sample.nfe)
    return SamplingJob(1 if streams else recipe.sample.batch_size, steps, streams=streams)


def _sampling(target: Target, key: str) -> StagePlan:
    """Sampling on the mildest rung of the ladder that fits, or else on the one that takes least."""
    recipe, hardware, job = target.recipe, target.hardware, _job(target, key)
    if key == "synthesize":
        address = recipe.synthesize.teacher or recipe.model.teacher
        target = target._replace(pipeline=pipeline_sizes(address))
    every = list(rungs(recipe.memory, is_gpu=hardware.is_gpu, streams=job.streams))
    setup, budget = target.setup(None, None), target.sampling_budget
    # the size of a network is known long before the costs of its calls
    small = [one for one in every if network_bytes(setup, one.weights).on_device(one) <= budget]
    least: StagePlan | None = None
    for rung in small or every:
        plan = _on_rung(target, key, job, rung)
        if target.fits(plan):
            return plan
        least = plan if least is None or plan.peak.total < least.peak.total else least
    assert least is not None
    return least


def _on_rung(target: Target, key: str, job: SamplingJob, rung: schema.MemorySection) -> StagePlan:
    recipe, hardware = target.recipe, target.hardware
    frames = recipe.sample.frames if key in ("sample", "teacher", "stream") else None
    context = recipe.launch.context_parallel or 1
    setup = target.setup(
        None, frames, two_time=not job.is_guided, streamed=rung.streams_network, context=context
    )
    cost = sampling_cost(setup, job.batch, is_guided=job.is_guided)
    # a stream decodes chunk after chunk, beside the cache
    chunks = recipe.model.causal.partition if job.streams and recipe.model.causal else (setup.latent[0],)
    decoded = 2 * max(chunks) if job.streams else setup.latent[0]
    parts = SampledParts(setup, target.pipeline, cost, decoded, job.streams)
    moments = list(parts.moments(rung))
    return StagePlan(
        key, setup, max(moments, key=lambda one: one.total),
        job.steps * cost.step_flops + cost.cache_flops, job.videos, job.processes, host=parts.host(rung),
        copies=parts.moved(rung, job.steps, hardware), rung=rung, moments=tuple(moments),
    )  # fmt: skip


def data_usage(target: Target) -> dict[str, int]:
    """Bytes of the synthetic data set. Text is stored without padding: its size is the most it can take."""
    setup, element = target.setup(None, None), 2 if target.precision == "bf16" else FP32
    each = element * (target.recipe.synthesize.count or 0)
    usage = {"latents": each * math.prod(setup.latent), "text, at most": each * math.prod(setup.text)}
    pictures = condition_of(setup, 0, torch.device("meta"))
    parts = [getattr(pictures, name) for name in pictures.present if name != "text"]
    return usage | ({"pictures": each * sum(math.prod(part.shape[1:]) for part in parts)} if parts else {})


def checkpoint_usage(setup: Setup) -> int:
    """Bytes of a run's checkpoints: what trains, both moments of its optimizer, and the student's EMA."""
    sizes, kept = role_sizes(setup), setup.settings.keep_checkpoints if setup.settings else 0
    trained = sum(size["trainable_bytes"] for size in sizes.values())
    return (kept + 1) * (3 * trained + sizes["student"]["trainable_bytes"])  # one is being written


def model_usage(setup: Setup) -> int:
    """Bytes of the finished network, always fp32, and of its adapter where one was trained."""
    network = role_sizes(replace(setup, settings=None, scores=None))["student"]["parameters"]
    return FP32 * network + (role_sizes(setup)["student"]["bytes"] if setup.model.lora else 0)


def as_values(plan: Plan) -> dict[str, Any]:
    """Everything as plain values, for ``--json``: bytes, FLOPs, seconds, hours."""
    recipe, hardware = plan.target.recipe, plan.target.hardware
    return {
        "recipe": recipe.name,
        "teacher": recipe.model.teacher,
        "precision": plan.target.precision,
        "hardware": {**asdict(hardware), "usable": hardware.usable},
        "roles": {name: dict(size) for name, size in role_sizes(plan.stages["distill"].setup).items()},
        "stages": {key: _stage_values(plan, key, stage) for key, stage in plan.stages.items()},
        "disk": dict(plan.disk),
        "needs": {name: [need._asdict() for need in needs] for name, needs in plan.needs.items()},
    }


def _stage_values(plan: Plan, key: str, stage: StagePlan) -> dict[str, Any]:
    hardware, advice = plan.target.hardware, plan.advice.get(key)
    values = {
        "command": f"anyflow {stage.command}", "memory": dict(stage.peak.parts), "peak": stage.peak.total,
        "at": stage.peak.name, "fits": plan.target.fits(stage), "activations": stage.activations,
        "rollout": stage.rollout, "host": stage.host, "flops": stage.flops, "repeats": stage.repeats,
        "tokens": stage.tokens, "seconds": stage.seconds(hardware), "hours": stage.hours(hardware),
    }  # fmt: skip
    if stage.rung is not None:
        values["memory_settings"] = dict(settings_of(stage.rung))
        values["moments"] = {one.name: dict(one.parts) for one in stage.moments}
    if advice is None:
        return values
    settings = [f"{name}={value}" for change in advice.changes for name, value in change.values.items()]
    return {**values, "advice": {"set": settings, "fits": advice.fits, "peak": advice.peak}}
