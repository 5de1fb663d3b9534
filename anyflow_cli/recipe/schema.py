"""What a recipe may say: one YAML describes one model family through all commands.

The classes hold meaning, defaults, ranges and the rules between keys; reading files, inheritance and messages
live in ``load.py``. No torch here: a recipe is checked on any machine. Defaults are the paper's, its sections
named beside them.

A rule between two keys stands as a validator of the later one, so that every broken rule is found at once and
names its own key. Its message completes "KEY must ...".
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the same rule for every command
Budgets = Annotated[tuple[Count, ...], Field(min_length=1)]  # numbers of network evaluations
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Value = TypeVar("Value")


def require(rule: bool, value: Value, must: str) -> Value:
    """Return ``value`` where the rule holds; ``must`` completes "KEY must ..."."""
    if not rule:
        raise ValueError(must)
    return value


def latent_frames(frames: int) -> int:
    """Latent frames of a video: the VAE encodes the first frame alone, then four at a time."""
    return (frames - 1) // 4 + 1


def whole_latents(frames: int) -> int:
    """Refuse a number of frames that the VAE does not take."""
    return require((frames - 1) % 4 == 0, frames, "be 4 n + 1, as the VAE takes frames (33, 49, 81, ...)")


def _laid_over(default: object, value: object) -> object:
    """Complete a section that is given in part."""
    if isinstance(default, Section) and isinstance(value, dict):
        return {**default.model_dump(), **value}
    return value


WorldName = Literal["shapes", "shapes-shifted"]
Task = Literal["t2v", "i2v"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, types not guessed, values fixed once loaded."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _keep_other_defaults(cls, value: object, info: ValidationInfo) -> object:
        """A section given in part keeps the rest of *this* field's default, not of its class."""
        default = cls.model_fields[info.field_name or ""].default
        return _laid_over(default, value)


class LoraSection(Section):
    """Low-rank adapters on self-attention, feed-forward and, in the student, the timestep embedders."""

    rank: Count = 256
    alpha: Positive = 256


class CausalSection(Section):
    """A causal (FAR) model, sec. 4.3: how frames fall into chunks, and what windows it is trained on."""

    partition: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (1, 3, 3, 3, 3, 3, 3, 2), description="Latent frames of each chunk, which are made together."
    )
    full_chunks: Count = Field(3, description="Last chunks that are seen in full; earlier ones compressed.")
    compressed_patch: tuple[Count, Count] = (4, 4)
    long_context: Fraction = Field(
        0.5, description="Share of the steps on any number of chunks; the others see the first in full alone."
    )
    bidirectional: Fraction = Field(
        0.1, description="Share of stage 1's steps that also take a bidirectional flow-matching loss."
    )


class ModelSection(Section):
    """The pretrained model, the shape of its videos, and what becomes trainable."""

    teacher: str = Field("tiny", description="Pipeline folder, Hub name, or the name of a built-in model.")
    pretrained_any_step: str | None = Field(
        None, description="Any-step model that is used until one is trained: a folder, Hub or built-in name."
    )
    lora: LoraSection | None = Field(
        None, description="Adapters on one frozen base; null trains all weights."
    )
    gate: Fraction = 0.25  # on emb0(r); paper sec. 4.2.1
    conditioning: Literal["interpolate", "zero-init"] = "interpolate"  # zero-init is the ablation of Fig. 11
    shift: Positive = 5.0
    height: Count = 480
    width: Count = 832
    frames: Count = 81
    causal: CausalSection | None = Field(None, description="Makes the model causal; null: bidirectional.")
    fps: Count = 16
    max_text_tokens: Count = 512
    negative_prompt: str = ""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    gradient_checkpointing: bool = False
    checkpoint_every_n_blocks: Count = Field(
        1, description="Of the blocks, with gradient_checkpointing: 2 recomputes every second one."
    )
    compile: bool = Field(
        False, description="torch.compile each block while training; equal to rounding, slow to begin."
    )

    @field_validator("height", "width")
    @classmethod
    def _whole_patches(cls, size: int) -> int:
        return require(size % 16 == 0, size, "be a multiple of 16 (8 of the VAE times 2 of a patch)")

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int) -> int:
        return whole_latents(frames)

    @field_validator("causal")
    @classmethod
    def _whole_chunks(cls, causal: CausalSection | None, info: ValidationInfo) -> CausalSection | None:
        if causal is None or not {"height", "width", "frames"} <= info.data.keys():
            return causal
        latent = latent_frames(info.data["frames"])
        require(
            sum(causal.partition) == latent, causal, f"have a partition that sums to {latent} latent frames"
        )
        sizes = zip((info.data["height"], info.data["width"]), causal.compressed_patch, strict=True)
        return require(
            all(size % (8 * patch) == 0 for size, patch in sizes),
            causal,
            "have a compressed_patch that divides height / 8 and width / 8",
        )


class DataSection(Section):
    """Where captions and latents come from."""

    prompts: str | None = Field(None, description="File of prompts; null: captions of the world below.")
    world: WorldName = "shapes"
    path: str | None = Field(
        None,
        description="Data set of latents: a directory, or any address that fsspec reads (s3://, hf://, ...);"
        " null: what `synthesize` left in the run directory.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(0, description="Threads a process that read batches ahead.")
    max_corrupt: Annotated[int, Field(ge=0)] = Field(
        16, description="Corrupt samples, over all processes, that are replaced before a run is stopped."
    )


class SynthesizeSection(Section):
    """Teacher videos as shards of latents."""

    teacher: str | None = Field(
        None, description="Makes the videos; of the same VAE and text encoder. Null: the model's teacher."
    )
    count: Count | None = Field(None, description="Videos to make; null: one a prompt.")
    steps: Count = 50
    guidance: Positive = 5.0
    batch_size: Count = 1
    shard_size: Count = 256
    previews: bool = False
    seed: Seed = 0


class EmaSection(Section):
    """Exponential moving average; before ``start`` it equals the weights."""

    decay: Fraction = 0.999
    start: Annotated[int, Field(ge=0)] = 1000


class OptimizerSection(Section):
    """AdamW with a linear warm-up, then constant."""

    lr: Positive = 5e-5
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    grad_clip: Positive = 1.0


class AlarmsSection(Section):
    """When a run is told to be going wrong, and what happens then; all our own."""

    action: Literal["warn", "stop", "roll-back"] = Field(
        "warn", description="roll-back: to the last good checkpoint, and on with other random numbers."
    )
    patience: Count = Field(3, description="Bad rows of the metrics in a row.")
    rollbacks: Count = Field(3, description="After so many the run stops.")
    embedding_norm: Positive = Field(2.0, description="Of the two times' embedding, to that at the start.")
    saturation: Positive = Field(2.0, description="Power of the student's samples to the data's, above.")
    static: Positive = Field(0.25, description="Motion of the student's samples to the data's, below.")
    fake_divergence: Positive = Field(4.0, description="Loss of the fake score to its average so far.")


class TrainingSection(Section):
    """What every training command shares."""

    steps: Count = 6000
    global_batch: Count = Field(32, description="Global batch: over all processes and accumulation steps.")
    micro_batch: Count | None = Field(
        None, description="Samples a forward pass and process; null: all of its share."
    )
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection = EmaSection()
    seed: Seed = 0
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    log_every: Count = 10
    preview_every: Annotated[int, Field(ge=0)] = 500
    preview_prompts: Annotated[int, Field(ge=0, le=16)] = 4
    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "trackio"], ...] = Field(
        (), description="Where else the metrics go; each has to be installed."
    )
    alarms: AlarmsSection = AlarmsSection()

    @field_validator("micro_batch")
    @classmethod
    def _divides_batch(cls, micro: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("global_batch")
        return require(
            not micro or not batch or batch % micro == 0, micro, f"divide the global_batch of {batch}"
        )


class FlowMapSection(Section):
    """Alg. 1: the forward flow-map loss, alone in stage 1 and beside the matching loss in stage 2."""

    guidance: Positive = 3.0  # g of Eq. 6
    delta: Positive = 0.005  # of Eq. 4
    weight: Literal["beta", "uniform", "normal"] = "beta"  # w(t), Fig. 10
    guidance_path: Literal["data", "guided"] = Field(
        "data",
        description="Path of du/dt under guidance: the data's, as in Alg. 1, or that of the guided velocity,"
        " on which jumps compose for any guidance.",
    )
    adaptive: bool = True  # Eq. 7
    loss_scale: Literal["raw", "weighted"] = Field(
        "raw",
        description="Loss that Eq. 7 levels: the raw error, or (the published code) the error times w(t).",
    )
    boundary: Fraction = 0.5  # share of the global batch with r = t
    to_zero: Fraction = 0.25  # share of the global batch with r = 0
    text_dropout: Fraction = 0.1
    conditioning_prob: Fraction = Field(
        0.0,
        description="Share of the steps that learn to continue a clean image or video (causal models).",
    )

    @field_validator("to_zero")
    @classmethod
    def _leave_the_whole(cls, to_zero: float, info: ValidationInfo) -> float:
        boundary = info.data.get("boundary", 0)
        return require(boundary + to_zero <= 1, to_zero, f"be at most 1 - boundary ({1 - boundary:g})")


class TrainFlowMapSection(TrainingSection):
    """Stage 1, its baselines, and the teacher's own tuning."""

    objective: Literal["flow-map", "flow-matching", "consistency-ode"] = "flow-map"
    flow_map: FlowMapSection = FlowMapSection()


class DistillSection(TrainingSection):
    """Stage 2: on-policy distillation (Alg. 2)."""

    steps: Count = 800
    optimizer: OptimizerSection = OptimizerSection(lr=2e-6, betas=(0.0, 0.999), warmup_steps=0)
    fake_optimizer: OptimizerSection | None = Field(
        None, description="Of the fake score; what it leaves out, or null: the student's."
    )
    ema: EmaSection = EmaSection(decay=0.99, start=200)
    simulation: Literal["flow-map", "consistency"] = "flow-map"
    step_budgets: Budgets = (2, 4, 8, 16, 50)  # N of Alg. 2
    consistency_steps: Count = 4
    reuse_rollout: bool = Field(
        False, description="The fake score learns from the step's own rollout, not a fresh one."
    )
    real_guidance: Annotated[float, Field(ge=1)] = 4.0  # usual convention: x_null + 4 (x_c - x_null)
    t_min: Fraction = 0.02
    t_max: Fraction = 0.98
    score_shift: Positive | None = Field(
        None,
        description="Shift of the times at which scores are compared and the fake one learns; null: the"
        " model's. A lower one attends to finer details.",
    )
    recompute_rollout: bool = Field(
        False,
        description="Evaluate a jump (of a causal model a chunk) again in the backward pass: less memory.",
    )
    joint: bool = Field(True, description="Add the stage-1 loss on data to each student update.")
    joint_weight: Annotated[float, Field(ge=0)] = 1.0
    flow_map: FlowMapSection = FlowMapSection()
    init_from: str | None = Field(
        None, description="Any-step model to start from; null: what `train-flowmap` left."
    )
    real_score: str | None = Field(
        None, description="Tuned teacher; null: the run's `teacher` if it exists, else the teacher."
    )

    @field_validator("fake_optimizer", mode="before")
    @classmethod
    def _as_the_student(cls, value: object, info: ValidationInfo) -> object:
        return _laid_over(info.data.get("optimizer"), value)

    @field_validator("t_max")
    @classmethod
    def _leave_a_range(cls, t_max: float, info: ValidationInfo) -> float:
        t_min = info.data.get("t_min", -1)
        return require(t_max > t_min, t_max, f"be above t_min ({t_min:g})")


class FinetuneSection(TrainingSection):
    """Continued flow-map training of an any-step model on the user's own videos."""

    steps: Count = 1000
    flow_map: FlowMapSection = FlowMapSection()
    init_from: str | None = Field(
        None,
        description="Any-step model to start from; null: the furthest trained, else the pretrained one.",
    )
    world: WorldName | None = Field(None, description="Draw clips of this world when no --data is given.")
    clips: Count = Field(256, description="Clips to draw of that world.")


Continuing = TypeVar("Continuing", TrainFlowMapSection, DistillSection, FinetuneSection)


class SampleSection(Section):
    """Defaults of `sample`."""

    nfe: Budgets = (4,)
    frames: Count | None = Field(None, description="Frames of a video; null: as many as the model's.")
    seed: Seed = 0
    batch_size: Count = 1
    teacher_steps: Count = 50
    teacher_guidance: Positive = 5.0

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int | None) -> int | None:
        return frames and whole_latents(frames)


class VBenchSection(Section):
    """How VBench is driven, in its own environment."""

    environment: str | None = Field(
        None, description="Its Python environment; null: ANYFLOW_VBENCH, else ~/.cache/anyflow/vbench."
    )
    weights: str | None = Field(
        None, description="Its weights; null: VBENCH_CACHE_DIR, else ~/.cache/vbench."
    )
    full_info: str | None = Field(None, description="Its prompts; null: those in the installed package.")
    augmented: str | None = Field(
        None, description="File or address of longer prompts to sample with, one a line of full_info."
    )
    images: str | None = Field(None, description="Pictures of VBench-I2V, cropped.")
    dimensions: tuple[str, ...] | None = Field(None, description="Those to run; null: all.")
    flickering: Literal[5, 25] = Field(
        25, description="Videos a prompt of temporal flickering; of 25 a filter keeps 5 static ones."
    )
    seconds: Positive = Field(120, description="A dimension may take 10 minutes and this a video.")


class EvaluateSection(Section):
    """Defaults of `evaluate`."""

    suite: Literal["shapes", "vbench", "vbench-i2v"] = "shapes"
    task: Task = Field("t2v", description="Videos from text, or from text and a first frame (causal models).")
    nfe: Budgets = (4, 32)
    prompts: Count = Field(64, description="Prompts of the suite shapes; VBench has its own.")
    samples: Count | None = Field(None, description="Videos a prompt; null: the suite's own number.")
    sampler: Literal["flow-map", "euler", "consistency"] | None = Field(
        None, description="Of the model in question; null: by its kind."
    )
    vbench: VBenchSection = VBenchSection()
    seed: Seed = 1000
    batch_size: Count = 8
    teacher: bool = Field(True, description="Score the teacher at its own step count beside the model.")


class LaunchSection(Section):
    """How training is spread over processes and devices; nothing here bears on what is learnt."""

    processes: Count | None = Field(
        1, description="On this machine, where torchrun or accelerate has started none; null: one a GPU."
    )
    sharding: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="FSDP2: weights, gradients and optimizer divided among all processes (full), or among "
        "those of a machine, with replicas across machines (hybrid); none: each has a copy.",
    )
    offload: bool = Field(
        False, description="Hold what is sharded in the CPU's memory, and update there; on the GPU as needed."
    )
    async_checkpoint: bool = Field(
        False, description="Train on while a sharded checkpoint is written in the background."
    )

    @field_validator("offload", "async_checkpoint")
    @classmethod
    def _needs_sharding(cls, value: bool, info: ValidationInfo) -> bool:
        changed = value is not cls.model_fields[info.field_name or ""].default
        sharded = info.data.get("sharding") != "none"
        return require(sharded or not changed, value, f"be {not value} without sharding".lower())


class Recipe(Section):
    """One model family through all commands."""

    name: Name = Field(description="Names the run directory; where a file says nothing, the file's own name.")
    description: str = ""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    synthesize: SynthesizeSection = SynthesizeSection()
    train_flowmap: TrainFlowMapSection = TrainFlowMapSection()
    distill: DistillSection = DistillSection()
    finetune: FinetuneSection = FinetuneSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    launch: LaunchSection = LaunchSection()

    @field_validator("train_flowmap", "distill", "finetune")
    @classmethod
    def _only_causal_models_continue(cls, section: Continuing, info: ValidationInfo) -> Continuing:
        model = info.data.get("model")
        return require(
            model is None or model.causal is not None or not section.flow_map.conditioning_prob,
            section,
            "leave flow_map.conditioning_prob at 0, as model.causal is null: only a causal model "
            "continues frames",
        )

    @field_validator("launch")
    @classmethod
    def _call_alike(cls, launch: LaunchSection, info: ValidationInfo) -> LaunchSection:
        stages = [info.data[name] for name in ("train_flowmap", "distill", "finetune") if name in info.data]
        alike = all(stage.flow_map.guidance != 1 for stage in stages)
        must = "have sharding none where a flow_map.guidance is 1: processes would not call the network alike"
        return require(launch.sharding == "none" or alike, launch, must)
