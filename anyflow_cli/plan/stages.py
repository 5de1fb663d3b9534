"""What each command trains and holds: memory by part and moment, operations and time, for one process.

Each process holds a copy of weights, gradients and optimizer (DDP), or a part of one copy (FSDP2): ``_held``
is the one place that knows. Of sharded runs only the division has been checked, not a measured peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.precision import Precision, resolve_precision
from anyflow_cli.plan.hardware import Hardware
from anyflow_cli.plan.ledger import Segment
from anyflow_cli.plan.model_sizes import Pipeline, pipeline_of
from anyflow_cli.plan.sampling import decoding, sampling_of
from anyflow_cli.plan.setup import Kind, Setup
from anyflow_cli.plan.steps import RoleSize, Step, gathered_of, roles_of, step_of
from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import is_checkpoint
from anyflow_cli.runs.lineage import run_of
from anyflow_cli.runs.open import locate

Command = Literal["synthesize", "train-flowmap", "distill", "finetune", "sample"]
TUNING: Literal["flow-matching"] = "flow-matching"
FP32 = 4
DIVIDED = ("weights", "gradients", "optimizer", "average")  # by sharding
MACHINE = 8  # GPUs that a machine is taken to have


class Moment(NamedTuple):
    """A time in a stage, and the bytes held then by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


class Work(NamedTuple):
    """Floating-point operations, and the time they take where the devices' speed is known."""

    operations: float  # of an iteration (or a video) on one device
    seconds: float | None
    repeats: int  # iterations (or videos)
    hours: float | None  # of the whole stage on all devices


@dataclass(frozen=True)
class Stage:
    """One command, or one objective of it, on one process."""

    name: str
    command: str
    roles: Mapping[str, RoleSize]
    peak: Moment
    work: Work
    setup: Setup
    rollout: int  # bytes of stage 2's rollout and its graph
    host: int = 0  # bytes that offloading holds in the CPU's memory


@dataclass(frozen=True)
class Target:
    """A recipe on a machine."""

    recipe: schema.Recipe
    pipeline: Pipeline
    cluster: Hardware

    @property
    def precision(self) -> Precision:
        """What ``auto`` will mean there."""
        setting = self.recipe.model.precision
        if self.cluster.is_gpu:
            return "bf16" if setting == "auto" else setting
        return resolve_precision(setting, "cpu")

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """(F, C, H, W)."""
        model = self.recipe.model
        return self.pipeline.latent_shape(model.frames, model.height, model.width)


def target_of(recipe: schema.Recipe, cluster: Hardware) -> Target:
    """Look up the sizes of the recipe's teacher."""
    return Target(recipe, pipeline_of(recipe.model.teacher), cluster)


# --- training


def tuning(target: Target) -> Stage:
    """The teacher's own tuning."""
    settings = target.recipe.train_flowmap.model_copy(update={"objective": TUNING})
    command = f"train-flowmap --objective {TUNING}"
    return _training(target, "teacher tuning", command, TUNING, settings)


def stage_one(target: Target) -> Stage:
    """``train-flowmap`` as the recipe has it."""
    settings = target.recipe.train_flowmap
    return _training(target, "stage 1", "train-flowmap", settings.objective, settings)


def stage_two(target: Target) -> Stage:
    """``distill``."""
    return _training(target, "stage 2", "distill", "on-policy", target.recipe.distill)


def finetuning(target: Target) -> Stage:
    """``finetune``."""
    return _training(target, "fine-tuning", "finetune", "flow-map", target.recipe.finetune)


def _training(target: Target, name: str, command: str, kind: Kind, settings: schema.TrainingSection) -> Stage:
    setup = training_setup(target, kind, settings)
    step = step_of(setup)
    moments = [*_training_moments(setup, step), *_preview_moments(target, setup, step)]
    seconds = target.cluster.seconds(step.operations)
    hours = None if seconds is None else seconds * settings.steps / 3600
    return Stage(
        name, command, step.roles,
        max(moments, key=lambda moment: moment.total),
        Work(step.operations, seconds, settings.steps, hours),
        setup,
        step.rollout,
        _offloaded(setup, step),
    )  # fmt: skip


def training_setup(target: Target, kind: Kind, settings: schema.TrainingSection) -> Setup:
    """One process of a training stage."""
    cluster, pipeline, model = target.cluster, target.pipeline, target.recipe.model
    if settings.global_batch % cluster.count:
        raise UsageError(
            f"A global batch of {settings.global_batch} cannot be divided among {cluster.count} processes.",
            f"Set batch to a multiple of {cluster.count}, or plan for another number of GPUs.",
        )
    scores, separate = None, False
    if isinstance(settings, schema.DistillSection):
        scores = _other_scores(settings, pipeline.network)
        separate = scores is not None or _starts_elsewhere(settings)
    return Setup(
        kind, pipeline.network, model, settings, target.latent,
        (model.max_text_tokens, pipeline.network.text_dim), target.precision, cluster.count, cluster.is_gpu,
        separate=separate,
        shards=_shards(target),
        offload=target.recipe.launch.offload and cluster.is_gpu,
        scores=scores,
    )  # fmt: skip


def _shards(target: Target) -> int | None:
    """How many processes share a copy."""
    count, sharding = target.cluster.count, target.recipe.launch.sharding
    return {"none": None, "full": count, "hybrid": min(count, MACHINE)}[sharding]


def _starts_elsewhere(settings: schema.DistillSection) -> bool:
    """Whether start or real score have no adapter of the teacher beside them, as ``train.stages`` looks."""
    given = [address for address in (settings.init_from, settings.real_score) if address is not None]
    return any(not (Path(address).parent / "adapter").is_dir() for address in given)


def _other_scores(settings: schema.DistillSection, teacher: NetworkConfig) -> NetworkConfig | None:
    """Sizes of a real score whose network is not of the teacher's size."""
    if settings.real_score is None:
        return None
    scores = pipeline_of(_pipeline_behind(settings.real_score)).network
    same = (scores.dim, scores.layers, scores.ffn_dim) == (teacher.dim, teacher.layers, teacher.ffn_dim)
    return None if same else scores


def _pipeline_behind(address: str) -> str:
    """The folder that has all parts of a model, where the address is one of a training run."""
    if not Path(address).is_dir():
        return address
    place = locate(address)
    return str(run_of(place).base if is_checkpoint(place) else place)


def activations(stage: Stage) -> dict[str, int]:
    """Bytes of activations at the peak of a training step, with checkpointing and without."""
    if not stage.setup.trains:
        return {}
    found = {}
    for name, on in (("with checkpointing", True), ("without checkpointing", False)):
        model = stage.setup.model.model_copy(update={"gradient_checkpointing": on})
        step = step_of(replace(stage.setup, model=model))
        segment = max(step.segments, key=lambda segment: segment.peak)
        found[name] = segment.parts["activations"] + segment.parts["latents"]
    return found


def _held(setup: Setup, step: Step) -> dict[str, int]:
    """Bytes a process holds all the time."""
    whole = _whole(setup, step)
    if setup.shards is None:
        return whole
    own = {part: 0 if setup.offload else whole[part] // setup.shards for part in DIVIDED}
    return whole | own | {"weights": own["weights"] + gathered_of(setup)}


def _offloaded(setup: Setup, step: Step) -> int:
    """Bytes that a process holds in the CPU's memory instead."""
    whole = _whole(setup, step)
    return sum(whole[part] for part in DIVIDED) // (setup.shards or 1) if setup.offload else 0


def _whole(setup: Setup, step: Step) -> dict[str, int]:
    """Bytes a process holds all the time if it holds everything."""
    trained = {role: size.trainable_bytes for role, size in step.roles.items()}
    # DDP's buckets outlive the step; a process alone frees a phase's gradients before the next begins
    buckets = setup.ranks > 1 and setup.shards is None
    gradients = sum(trained.values()) if buckets else max(trained.values())
    sample = math.prod(setup.latent) + math.prod(setup.text)
    return {
        "weights": sum(size.bytes for size in step.roles.values()),
        "gradients": gradients if step.keeps_gradients else 0,
        "optimizer": 2 * sum(trained.values()),
        "average": trained["student"],
        "data": FP32 * setup.share * sample,
    }


def _training_moments(setup: Setup, step: Step) -> Iterator[Moment]:
    held = _held(setup, step)
    for segment in step.segments:
        parts = {
            "cache": segment.parts["cache"],
            "activations": segment.parts["activations"] + segment.parts["latents"],
        }
        gradients = held["gradients"] + segment.parts["gradients"]
        yield Moment(_name(segment), held | {"gradients": gradients} | parts)
    for role, size in step.roles.items():
        if size.trainable:
            # AdamW makes the roots of the second moments, on a GPU of all tensors at once
            own = size.trainable_bytes // (setup.shards or 1)
            passing = own if setup.gpu else 2 * size.largest
            gradients = held["gradients"] or (0 if setup.offload else size.trainable_bytes)
            yield Moment(f"{role}: update", held | {"gradients": gradients, "activations": passing})


def _name(segment: Segment) -> str:
    label = segment.label
    if not label.role:
        return "between network calls"
    count = f"{label.samples} sample{'s' * (label.samples > 1)}"
    return f"{label.role}: {'keeping a chunk' if label.fills else label.direction}, {count}"


def _preview_moments(target: Target, setup: Setup, step: Step) -> Iterator[Moment]:
    """The main process samples as it trains, then loads the VAE and decodes."""
    settings = setup.settings
    assert settings is not None
    if not settings.preview_every or not settings.preview_prompts:
        return
    held = _held(setup, step)
    call = sampling_of(setup, settings.preview_prompts, setup.kind == TUNING)
    yield Moment("preview: sampling", held | call.parts)
    vae = decoding(target.pipeline.vae, setup.latent)
    weights = held["weights"] + vae.weights
    yield Moment("preview: decoding", held | {"weights": weights, "activations": vae.peak})


# --- sampling


def sampling(target: Target) -> Stage:
    """``sample`` with the any-step model, at the largest of the recipe's step counts."""
    settings = target.recipe.sample
    return _sampling(
        _as_long(target), "sampling", "sample", "sampling", settings.batch_size, max(settings.nfe), 1
    )


def streaming(target: Target) -> Stage:
    """``sample --stream`` with a causal model: each chunk is decoded while the cache is there."""
    steps = max(target.recipe.sample.nfe)
    return _sampling(_as_long(target), "streaming", "sample --stream", "sampling", 1, steps, 1)


def evaluation(target: Target, steps: int, *, is_guided: bool) -> Stage:
    """One video of ``evaluate``."""
    kind: Kind = "synthesis" if is_guided else "sampling"
    return _sampling(target, "evaluation", "evaluate", kind, target.recipe.evaluate.batch_size, steps, 1)


def _as_long(target: Target) -> Target:
    """With the videos that ``sample`` makes."""
    model = target.recipe.model
    longer = model.model_copy(update={"frames": target.recipe.sample.frames or model.frames})
    return replace(target, recipe=target.recipe.model_copy(update={"model": longer}))


def synthesis(target: Target) -> Stage:
    """``synthesize``: guided, two evaluations a step, on all devices."""
    settings = target.recipe.synthesize
    teacher = target
    if settings.teacher is not None:
        teacher = replace(target, pipeline=pipeline_of(settings.teacher))
    return _sampling(
        teacher,
        "synthesis",
        "synthesize",
        "synthesis",
        settings.batch_size,
        settings.steps,
        settings.count or 1,
    )


def _sampling(
    target: Target, name: str, command: str, kind: Kind, batch: int, steps: int, videos: int
) -> Stage:
    model, cluster = target.recipe.model, target.cluster
    text = (model.max_text_tokens, target.pipeline.network.text_dim)
    setup = Setup(
        kind, target.pipeline.network, model, None, target.latent, text, target.precision, 1, cluster.is_gpu
    )
    roles = {"network": roles_of(setup)["student"]}
    call = sampling_of(setup, batch, kind == "synthesis")
    streams = name == "streaming"
    part = target.latent[0] if not streams else 2 * max(model.causal.partition if model.causal else (1,))
    vae = decoding(target.pipeline.vae, (part, *target.latent[1:]))
    encoder = target.pipeline.text.parameters * (2 if cluster.is_gpu else FP32)
    weights = {"weights": roles["network"].bytes + encoder + vae.weights}
    moments = [
        Moment("network", weights | call.parts),
        Moment("decoding", weights | {"cache": call.cache * streams, "activations": vae.peak}),
    ]
    operations = call.work(steps)
    seconds = cluster.seconds(operations)
    processes = cluster.count if kind == "synthesis" else 1
    hours = None if seconds is None else seconds * videos / processes / 3600
    peak = max(moments, key=lambda moment: moment.total)
    return Stage(name, command, roles, peak, Work(operations, seconds, videos, hours), setup, 0)
