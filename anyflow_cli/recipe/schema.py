"""What a recipe may contain: one YAML file describes one model family through all commands.

The classes define meaning, defaults, ranges and rules between keys; files, inheritance and messages are in
``load.py``. No torch here: a recipe is checked on any machine. Defaults are the paper's, with a section named
beside each. Upper bounds are far beyond what any run uses: they stop a typing error, or a hostile file, from
filling the memory.

A rule between two keys is a validator of the later one, so that every broken rule is found at once and names
its own key. Its message completes "KEY must ...".
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from anyflow_cli.utils.user_text import path_problem, text_problem

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the same rule for every command
StepCount = Annotated[int, Field(ge=1, le=10**8)]  # of an optimizer
EvaluationCount = Annotated[int, Field(ge=1, le=10**4)]  # of a network, for one video
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
VideoCount = Annotated[int, Field(ge=1, le=10**6)]
PixelCount = Annotated[int, Field(ge=1, le=8192)]
FrameCount = Annotated[int, Field(ge=1, le=10**5)]
ChunkCount = Annotated[int, Field(ge=1, le=10**4)]
Budgets = Annotated[tuple[EvaluationCount, ...], Field(min_length=1, max_length=100)]
BucketShape = tuple[PixelCount, PixelCount, FrameCount]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
Value = TypeVar("Value")


def require(rule: bool, value: Value, must: str) -> Value:
    """Return ``value`` where the rule holds; ``must`` completes "KEY must ..."."""
    if not rule:
        raise ValueError(must)
    return value


def _path(text: str) -> str:
    problem = path_problem(text)
    return require(problem is None, text, problem or "")


Address = Annotated[str, AfterValidator(_path)]  # of a file, a directory or a model


def latent_frames(frames: int) -> int:
    """Number of latent frames of a video: the VAE encodes the first frame alone, then four at a time."""
    return (frames - 1) // 4 + 1


def whole_latents(frames: int) -> int:
    """Refuse a number of frames that the VAE cannot encode."""
    return require((frames - 1) % 4 == 0, frames, "be 4 n + 1, as the VAE encodes frames (33, 49, 81, ...)")


def _laid_over(default: object, value: object) -> object:
    """Fill a partial section with the values of its default."""
    if isinstance(default, Section) and isinstance(value, dict):
        return {**default.model_dump(), **value}
    return value


Pictures = Literal["none", "optional-first", "first", "first-last"]
BaseWeights = Literal["full", "fp8", "int8", "nf4"]
WorldName = Literal["shapes", "shapes-shifted"]
Task = Literal["t2v", "i2v"]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, types are strict, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _keep_other_defaults(cls, value: object, info: ValidationInfo) -> object:
        """Fill a partial section from the default of *this* field, not of its class."""
        default = cls.model_fields[info.field_name or ""].default
        return _laid_over(default, value)

    @field_validator("*")
    @classmethod
    def _printable(cls, value: object) -> object:
        problem = text_problem(value) if isinstance(value, str) else None
        return require(problem is None, value, problem or "")


class LoraSection(Section):
    """Low-rank adapters on self-attention, feed-forward and, in the student, the timestep embedders."""

    rank: Annotated[int, Field(ge=1, le=8192)] = 256
    alpha: PositiveNumber = 256


class ExpertGuidance(Section):
    """A scale of guidance for each expert of a model that has two."""

    high: PositiveNumber
    low: PositiveNumber


GuidanceSetting = PositiveNumber | ExpertGuidance


def scales_of(guidance: float | ExpertGuidance) -> tuple[float, float]:
    """The scales of guidance of the high-noise and the low-noise expert; both alike for one network."""
    return (guidance.high, guidance.low) if isinstance(guidance, ExpertGuidance) else (guidance, guidance)


def guidance_record(guidance: float | ExpertGuidance | None) -> float | dict[str, float] | None:
    """A scale of guidance as a plain value, for records."""
    return guidance.model_dump() if isinstance(guidance, ExpertGuidance) else guidance


class CausalSection(Section):
    """A causal (FAR) model, sec. 4.3: how frames are divided into chunks, and the windows of its training."""

    partition: Annotated[tuple[ChunkCount, ...], Field(min_length=1, max_length=10**4)] = Field(
        (1, 3, 3, 3, 3, 3, 3, 2), description="Latent frames of each chunk; a chunk is sampled as a whole."
    )
    full_chunks: ChunkCount = Field(
        3, description="Number of last chunks kept at full resolution; earlier ones are compressed."
    )
    compressed_patch: tuple[PixelCount, PixelCount] = (4, 4)
    remember: Annotated[int, Field(ge=0, le=10**4)] | None = Field(
        None,
        description="Most compressed chunks in the cache of a longer video; null: as many as the partition "
        "has.",
    )
    sink_chunks: Annotated[int, Field(ge=0, le=10**4)] = Field(
        0, description="First chunks that stay in the cache at full resolution (an attention sink)."
    )
    long_context: Fraction = Field(
        0.5,
        description="Share of the steps with compressed chunks; the others train on the first full_chunks.",
    )
    bidirectional: Fraction = Field(
        0.1, description="Share of stage 1's steps that add a bidirectional flow-matching loss."
    )


class ModelSection(Section):
    """The pretrained model, the shape of its videos, and what is trained."""

    teacher: Address = Field(
        "tiny", description="Pipeline folder, Hub name, or the name of a built-in model."
    )
    components: Address | None = Field(
        None,
        description="Folder or Hub name with the VAE, text encoder and tokenizer of models that lack them, "
        "such as single files; null: the teacher's.",
    )
    pretrained_any_step: Address | None = Field(
        None, description="Any-step model that is used until one is trained: a folder, Hub or built-in name."
    )
    lora: LoraSection | None = Field(
        None, description="Adapters on one frozen base; null trains all weights."
    )
    gate: Fraction = 0.25  # on emb0(r); paper sec. 4.2.1
    conditioning: Literal["interpolate", "zero-init"] = "interpolate"  # zero-init is the ablation of Fig. 11
    shift: PositiveNumber = 5.0
    vae_scale: Literal[8, 16] = Field(
        8, description="Pixels per latent, down and across: 8 for Wan 2.1's VAE, 16 for Wan 2.2 TI2V-5B's."
    )
    height: PixelCount = 480
    width: PixelCount = 832
    frames: FrameCount = 81
    expert: Literal["both", "high", "low"] = Field(
        "both",
        description="Which expert of a model with two (Wan 2.2 A14B) is trained, on its own times; both: one "
        "is drawn in each step.",
    )
    causal: CausalSection | None = Field(None, description="Makes the model causal; null: bidirectional.")
    pictures: Pictures = Field(
        "none",
        description="Pictures of a bidirectional model. optional-first: a video may start with a given frame"
        " (Wan 2.2 TI2V-5B); first, first-last: every video has that picture, or both (Wan I2V, FLF2V).",
    )
    fps: Annotated[int, Field(ge=1, le=240)] = 16
    max_text_tokens: Annotated[int, Field(ge=1, le=4096)] = 512
    negative_prompt: Annotated[str, Field(max_length=20_000)] = ""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    attention: Literal["auto", "sdpa", "flash", "efficient", "cudnn", "flash3", "sage"] = Field(
        "auto",
        description="Kernel; auto: the fastest exact one, measured at the start (on a CPU sdpa, torch's).",
    )
    base_weights: BaseWeights = Field(
        "full",
        description="Type that the frozen base under adapters is stored in; int8 needs torchao, nf4 "
        "bitsandbytes. Products stay in the precision.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        False, description="auto: as few recomputed blocks as fit, by the plan of this machine."
    )
    checkpoint_every_n_blocks: ChunkCount = Field(
        1, description="With gradient_checkpointing: 2 recomputes every second block."
    )
    compile: bool = Field(
        False,
        description="torch.compile every block in training; same results up to rounding, slow first step.",
    )

    @property
    def needs_pictures(self) -> bool:
        """Whether every video has given pictures."""
        return self.pictures in ("first", "first-last")

    @field_validator("height", "width")
    @classmethod
    def _whole_patches(cls, size: int, info: ValidationInfo) -> int:
        scale = info.data.get("vae_scale", 1)
        must = f"be a multiple of {2 * scale} ({scale} of the VAE times 2 of a patch)"
        return require(size % (2 * scale) == 0, size, must)

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int) -> int:
        return whole_latents(frames)

    @field_validator("causal")
    @classmethod
    def _whole_chunks(cls, causal: CausalSection | None, info: ValidationInfo) -> CausalSection | None:
        if causal is None or not {"vae_scale", "height", "width", "frames"} <= info.data.keys():
            return causal
        latent = latent_frames(info.data["frames"])
        require(
            sum(causal.partition) == latent, causal, f"have a partition that sums to {latent} latent frames"
        )
        scale = info.data["vae_scale"]
        sizes = zip((info.data["height"], info.data["width"]), causal.compressed_patch, strict=True)
        return require(
            all(size % (scale * patch) == 0 for size, patch in sizes),
            causal,
            f"have a compressed_patch that divides height / {scale} and width / {scale}",
        )

    @field_validator("pictures")
    @classmethod
    def _of_bidirectional_models(cls, pictures: Pictures, info: ValidationInfo) -> Pictures:
        causal = info.data.get("causal")
        must = "be none where model.causal is set: a causal model continues frames without it"
        return require(causal is None or pictures == "none", pictures, must)


class DataSection(Section):
    """Where captions and latents come from."""

    prompts: Address | None = Field(None, description="File of prompts; null: captions of `world`.")
    world: WorldName = "shapes"
    path: Address | None = Field(
        None,
        description="Data set of latents: a directory, or any address that fsspec reads (s3://, hf://, ...);"
        " null: the one that `synthesize` makes.",
    )
    truncate: bool = Field(
        False,
        description="Cut clips of more than model.frames to their first frames, instead of refusing them.",
    )
    workers: Annotated[int, Field(ge=0, le=256)] = Field(
        0, description="Threads per process that read batches ahead."
    )
    max_corrupt: Annotated[int, Field(ge=0, le=10**6)] = Field(
        16, description="Corrupt samples, over all processes, that are replaced before a run stops."
    )


class SynthesizeSection(Section):
    """Teacher videos as shards of latents."""

    teacher: Address | None = Field(
        None, description="Samples the videos; has the same VAE and text encoder. Null: the model's teacher."
    )
    count: VideoCount | None = Field(None, description="Number of videos; null: one per prompt.")
    steps: EvaluationCount = 50
    guidance: GuidanceSetting = Field(5.0, description="One scale, or {high: ..., low: ...} for two experts.")
    batch_size: BatchSize = 1
    shard_size: Annotated[int, Field(ge=1, le=10**6)] = 256
    previews: bool = False
    seed: Seed = 0
    clips: Literal["head", "uniform", "slide", "scenes"] = Field(
        "head",
        description="Parts of real videos to encode: the start, or segments spread evenly, at a stride, or "
        "at a stride within scenes.",
    )
    segments: Annotated[int, Field(ge=1, le=10**4)] = Field(
        4, description="Segments per video with clips: uniform."
    )
    stride: FrameCount | None = Field(
        None,
        description="Frames from one segment to the next, with clips: slide or scenes; null: their length.",
    )
    buckets: Annotated[tuple[BucketShape, ...], Field(max_length=100)] = Field(
        (),
        description="Further (height, width, frames) of real clips beside the model's, which is the largest; "
        "each clip has the nearest. 1 frame: pictures.",
    )


class EmaSection(Section):
    """Exponential moving average; before ``start`` it equals the weights."""

    decay: Fraction = 0.999
    start: Annotated[int, Field(ge=0, le=10**8)] = 1000


class OptimizerSection(Section):
    """AdamW with a linear warm-up of the learning rate, constant afterwards."""

    lr: Annotated[float, Field(gt=0, le=10)] = 5e-5
    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0, le=10**8)] = 1000
    grad_clip: PositiveNumber = 1.0
    states: Literal["fp32", "8bit"] = Field(
        "fp32", description="Type of both moments; 8bit is torchao's, which has to be installed."
    )


class AlarmsSection(Section):
    """When a run counts as failing, and what happens then; all values are ours."""

    action: Literal["warn", "stop", "roll-back"] = Field(
        "warn",
        description="roll-back: return to the last good checkpoint and continue with other random numbers.",
    )
    patience: StepCount = Field(3, description="Consecutive bad rows of the metrics.")
    rollbacks: StepCount = Field(3, description="Number of roll-backs before the run stops.")
    embedding_norm: PositiveNumber = Field(
        2.0, description="Upper limit of the time embedding's norm, relative to the start."
    )
    saturation: PositiveNumber = Field(
        2.0, description="Upper limit of the power of the student's samples, relative to the data."
    )
    static: PositiveNumber = Field(
        0.25, description="Lower limit of the motion of the student's samples, relative to the data."
    )
    fake_divergence: PositiveNumber = Field(
        4.0, description="Upper limit of the fake score's loss, relative to its average so far."
    )


class TrainingSection(Section):
    """Settings that all training commands share."""

    steps: StepCount = 6000
    global_batch: BatchSize = Field(
        32, description="Samples per optimizer step, over all processes and accumulation steps."
    )
    micro_batch: BatchSize | None = Field(
        None, description="Samples per forward pass and process; null: all of the process's share."
    )
    optimizer: OptimizerSection = OptimizerSection()
    ema: EmaSection = EmaSection()
    seed: Seed = 0
    checkpoint_every: StepCount = 500
    keep_checkpoints: StepCount = 2
    log_every: StepCount = 10
    preview_every: Annotated[int, Field(ge=0, le=10**8)] = 500
    preview_prompts: Annotated[int, Field(ge=0, le=16)] = 4
    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "trackio"], ...] = Field(
        (), description="Further destinations of the metrics; each has to be installed."
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

    guidance: GuidanceSetting = Field(
        3.0, description="g of Eq. 6: one scale, or {high: ..., low: ...} for two experts."
    )
    delta: Annotated[float, Field(gt=0, le=1)] = 0.005  # of Eq. 4
    weight: Literal["beta", "uniform", "normal"] = "beta"  # w(t), Fig. 10
    guidance_path: Literal["data", "guided"] = Field(
        "data",
        description="Path of du/dt under guidance: the data's, as in Alg. 1, or that of the guided velocity,"
        " on which jumps compose for any guidance.",
    )
    objective: Literal["quotient", "composition"] = Field(
        "quotient",
        description="Target for t > r: Eq. 3's, with a difference quotient, or two jumps of the network"
        " itself over a time between (PSD), without a derivative.",
    )
    target: Literal["data", "teacher"] = Field(
        "data",
        description="Velocity of the target: eps - x, or the frozen teacher's own prediction, guided by"
        " `guidance` (1 for a teacher that is distilled from guidance).",
    )
    noise: Literal["fresh", "paired"] = Field(
        "fresh",
        description="Noise of each video: drawn anew, or the noise that the teacher sampled the video from; "
        "the paths of such pairs are nearly straight (rectified flow).",
    )
    states: Literal["data", "own"] = Field(
        "data",
        description="Noisy states that the loss is taken at: noised data, or the network's own jumps from "
        "noise, which need a teacher and no data but its prompts.",
    )
    derivative_precision: Literal["same", "fp32"] = Field(
        "same", description="Precision of the calls that make the target; fp32 needs weights in fp32."
    )
    adaptive: Literal["off", "group", "sample"] = Field(
        "sample",
        description="Eq. 7: scale each loss at t > r to the boundary's, all of them by one factor, or none.",
    )
    loss_scale: Literal["raw", "weighted"] = Field(
        "raw",
        description="Loss that Eq. 7 levels: the raw error, or (the published code) the error times w(t).",
    )
    boundary: Fraction = 0.5  # share of the global batch with r = t
    to_zero: Fraction = 0.25  # share of the global batch with r = 0
    text_dropout: Fraction = 0.1
    conditioning_prob: Fraction = Field(
        0.0,
        description="Share of the steps that train continuing a clean image or video (causal models), or a "
        "clean first frame (model.pictures: optional-first).",
    )

    @field_validator("adaptive", mode="before")
    @classmethod
    def _was_a_switch(cls, value: object) -> object:
        """Read what earlier recipes have; `off` is also how YAML spells false."""
        return {True: "sample", False: "off"}[value] if isinstance(value, bool) else value

    @field_validator("adaptive")
    @classmethod
    def _has_noise_to_match(cls, value: str, info: ValidationInfo) -> str:
        must = (
            "be off where target is teacher: at the start a student predicts what the teacher does, so the "
            "boundary's loss and with it every weight is 0"
        )
        return require(value == "off" or info.data.get("target") != "teacher", value, must)

    @field_validator("states")
    @classmethod
    def _have_a_target(cls, states: str, info: ValidationInfo) -> str:
        must = "be data where target is data: a state of the network's own has no clean video"
        states = require(states == "data" or info.data.get("target") == "teacher", states, must)
        must = "be data where noise is paired: a state of the network's own has no video behind it"
        return require(states == "data" or info.data.get("noise") == "fresh", states, must)

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

    steps: StepCount = 800
    optimizer: OptimizerSection = OptimizerSection(lr=2e-6, betas=(0.0, 0.999), warmup_steps=0)
    fake_optimizer: OptimizerSection | None = Field(
        None, description="Optimizer of the fake score; missing keys, or null: as the student's."
    )
    ema: EmaSection = EmaSection(decay=0.99, start=200)
    matching: Literal["distribution", "fake-free", "none"] = Field(
        "distribution",
        description="fake-free: the student's own jumps in place of the fake score (bidirectional models); "
        "none: the joint loss alone, without scores, the control for what matching adds.",
    )
    matching_gradient: Literal["full", "orthogonal"] = Field(
        "full",
        description="orthogonal: without its part along the fake score's residual x0_fake - x (PDMD).",
    )
    simulation: Literal["flow-map", "consistency", "fixed-steps"] = Field(
        "flow-map",
        description="fixed-steps: gradient in one of consistency_steps jumps, as in FastVideo's port of"
        " Alg. 2 (a baseline).",
    )
    step_budgets: Budgets = (2, 4, 8, 16, 50)  # N of Alg. 2
    first_chunk_budgets: Budgets | None = Field(
        None,
        description="N of Alg. 2 for the first chunk of a causal student's rollout, which has no past; null: "
        "as the other chunks.",
    )
    consistency_steps: EvaluationCount = 4
    reuse_rollout: bool = Field(
        False, description="Train the fake score on the student's rollout instead of a fresh one."
    )
    fake_updates: Annotated[int, Field(ge=1, le=100)] = Field(
        1, description="Updates of the fake score per update of the student, all on the same samples."
    )
    real_guidance: Annotated[float, Field(ge=1, le=1000)] | ExpertGuidance = Field(
        4.0,
        description="Usual convention, x_null + 4 (x_c - x_null): one scale, or {high: ..., low: ...} for "
        "two experts.",
    )
    real_guidance_until: Fraction = Field(
        1.0, description="Largest time at which the real score is guided; above it the scale is 1."
    )
    guidance_times: Literal["shared", "own"] = Field(
        "shared",
        description="own: the real score is guided at times and noise of its own, below the start of the "
        "rollout's drawn jump, while both scores are compared at any time (decoupled DMD).",
    )
    t_min: Fraction = 0.02
    t_max: Fraction = 0.98
    score_shift: PositiveNumber | None = Field(
        None,
        description="Shift of the times at which scores are compared and the fake score is trained; null: the"
        " model's. A lower one weights finer details.",
    )
    rollout_frames: FrameCount | None = Field(
        None,
        description="Longest rollout of a causal student. The last model.frames of it are matched and have a "
        "gradient; null: rollouts of model.frames.",
    )
    replay_rollout: bool = Field(
        False,
        description="Roll a causal student out without gradient, then once more with it, all chunks in one "
        "pass, so that gradient reaches how earlier chunks are encoded (self gradient forcing).",
    )
    recompute_rollout: bool = Field(
        False,
        description="Recompute a jump (for a causal model, a chunk) in the backward pass to save memory.",
    )
    joint: bool = Field(True, description="Add the stage-1 loss on data to each student update.")
    joint_weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    flow_map: FlowMapSection = FlowMapSection()
    init_from: Address | None = Field(
        None, description="Any-step model to start from; null: the one that `train-flowmap` makes."
    )
    real_score: Address | None = Field(
        None,
        description="Tuned teacher; null: the one trained with flow-matching if it exists, else the teacher.",
    )

    @field_validator("first_chunk_budgets")
    @classmethod
    def _starts_otherwise(cls, budgets: Budgets | None, info: ValidationInfo) -> Budgets | None:
        flow_map = info.data.get("simulation") == "flow-map"
        return require(flow_map or budgets is None, budgets, "be null where simulation is not flow-map")

    @field_validator("replay_rollout")
    @classmethod
    def _replays_alike(cls, replays: bool, info: ValidationInfo) -> bool:
        others = {"simulation": "flow-map", "first_chunk_budgets": None, "rollout_frames": None}
        for key, plain in others.items():
            value = info.data.get(key, plain)
            must = f"be false where {key} is {value}: one pass replays the video by equal jumps"
            require(value == plain or not replays, replays, must)
        return replays

    @field_validator("matching_gradient")
    @classmethod
    def _changes_a_gradient(cls, gradient: str, info: ValidationInfo) -> str:
        return require(
            gradient == "full" or info.data.get("matching") != "none",
            gradient,
            "be full where matching is none",
        )

    @field_validator("fake_updates")
    @classmethod
    def _update_a_fake_score(cls, updates: int, info: ValidationInfo) -> int:
        must = "be 1 where matching is fake-free: there is no fake score to update"
        return require(updates == 1 or info.data.get("matching") != "fake-free", updates, must)

    @field_validator("guidance_times")
    @classmethod
    def _guides_elsewhere(cls, times: str, info: ValidationInfo) -> str:
        own, matching, guidance = (
            times == "own",
            info.data.get("matching"),
            info.data.get("real_guidance", 4.0),
        )
        require(not own or matching == "distribution", times, f"be shared where matching is {matching}")
        return require(not own or scales_of(guidance) != (1, 1), times, "be shared where real_guidance is 1")

    @field_validator("joint")
    @classmethod
    def _leave_a_loss(cls, joint: bool, info: ValidationInfo) -> bool:
        return require(joint or info.data.get("matching") != "none", joint, "be true where matching is none")

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

    steps: StepCount = 1000
    flow_map: FlowMapSection = FlowMapSection()
    init_from: Address | None = Field(
        None,
        description="Any-step model to start from; null: the furthest trained, else the pretrained one.",
    )
    world: WorldName | None = Field(None, description="World to draw clips of if --data is not given.")
    clips: VideoCount = Field(256, description="Number of clips to draw.")


Continuing = TypeVar("Continuing", TrainFlowMapSection, DistillSection, FinetuneSection)


class SampleSection(Section):
    """Defaults of `sample`."""

    nfe: Budgets = (4,)
    frames: FrameCount | None = Field(None, description="Frames per video; null: the model's.")
    seed: Seed = 0
    batch_size: BatchSize = 1
    compile: bool = Field(
        False,
        description="torch.compile every block, on a GPU as CUDA graphs; slow first steps of each shape.",
    )
    teacher_steps: EvaluationCount = 50
    teacher_sampler: Literal["euler", "unipc"] = Field(
        "euler", description="Of teachers, in synthesize and evaluate too; Wan's folders name unipc."
    )
    teacher_guidance: GuidanceSetting = Field(
        5.0, description="One scale, or {high: ..., low: ...} for two experts."
    )

    @field_validator("frames")
    @classmethod
    def _whole_latents(cls, frames: int | None) -> int | None:
        return frames and whole_latents(frames)


class VBenchSection(Section):
    """How VBench is run, in an environment of its own."""

    environment: Address | None = Field(
        None, description="Its Python environment; null: ANYFLOW_VBENCH, else ~/.cache/anyflow/vbench."
    )
    weights: Address | None = Field(
        None, description="Its weights; null: VBENCH_CACHE_DIR, else ~/.cache/vbench."
    )
    full_info: Address | None = Field(None, description="Its prompts; null: those in the installed package.")
    augmented: Address | None = Field(
        None, description="File or URL of longer prompts to sample with, one per entry of full_info."
    )
    images: Address | None = Field(None, description="Directory of VBench-I2V's cropped images.")
    dimensions: Annotated[tuple[str, ...], Field(max_length=100)] | None = Field(
        None, description="Dimensions to evaluate; null: all."
    )
    flickering: Literal[5, 25] = Field(
        25, description="Videos per prompt of temporal flickering; a filter keeps 5 static ones of 25."
    )
    seconds: PositiveNumber = Field(
        120, description="Time limit per video, on top of 10 minutes per dimension."
    )


class EvaluateSection(Section):
    """Defaults of `evaluate`."""

    suite: Literal["shapes", "vbench", "vbench-i2v"] = "shapes"
    task: Task = Field("t2v", description="Videos from text, or from text and a first frame.")
    nfe: Budgets = (4, 32)
    prompts: Annotated[int, Field(ge=1, le=10**5)] = Field(
        64, description="Number of prompts of the suite shapes; VBench has its own."
    )
    samples: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Videos per prompt; null: the suite's own number."
    )
    sampler: Literal["flow-map", "euler", "consistency"] | None = Field(
        None, description="Sampler of the evaluated model; null: the model's own."
    )
    vbench: VBenchSection = VBenchSection()
    seed: Seed = 1000
    batch_size: BatchSize = 8
    teacher: bool = Field(True, description="Also evaluate the teacher, at its own step count.")

    @property
    def is_conditioned(self) -> bool:
        """Whether videos are conditioned on images."""
        return self.suite == "vbench-i2v" or (self.suite == "shapes" and self.task == "i2v")


class MemorySection(Section):
    """Where the parts of a model are while it samples; "auto" is chosen by the plan, to fit ``limit``.

    The values of each part are in order: the mildest that fits is taken, of the network first, then of the
    VAE, then of the text encoder. Without a plan, "auto" is the first.
    """

    limit: Literal["auto"] | PositiveNumber = Field(
        "auto", description="GiB of the device's memory; auto: all of a GPU's."
    )
    text_encoder: Literal["auto", "kept", "freed", "streamed"] = Field(
        "auto",
        description="freed: loaded to encode the prompts, then freed; streamed: layer by layer, then freed. "
        "An image encoder is then on the device only while it works.",
    )
    vae: Literal["auto", "kept", "on-demand", "tiled"] = Field(
        "auto",
        description="on-demand: on the device only while it works; tiled: also in overlapping tiles of 256 "
        "pixels, blended (not to the bit).",
    )
    network: Literal["auto", "kept", "alternating", "streamed", "blocks"] = Field(
        "auto",
        description="alternating: off the device while the VAE works, or of two experts the idle one; "
        "streamed: block by block from the host's memory, the next one copied ahead; blocks: without copying "
        "ahead.",
    )
    weights: Literal["auto", "full", "fp8", "int8"] = Field(
        "auto",
        description="Type that the blocks' matrices are stored in; products stay in the precision. int8 is "
        "torchao's and never chosen by itself.",
    )

    @property
    def streams_network(self) -> bool:
        """Whether the network's weights stay in the host's memory."""
        return self.network in ("streamed", "blocks")

    @property
    def frees_text_encoder(self) -> bool:
        """Whether the text encoder is only loaded to encode prompts."""
        return self.text_encoder in ("freed", "streamed")

    @property
    def opens_on_host(self) -> bool:
        """Whether the network is opened in the host's memory, and comes to the device later or in parts."""
        return self.frees_text_encoder or self.network in ("alternating", "streamed", "blocks")

    @property
    def approximations(self) -> tuple[str, ...]:
        """What changes the videos beyond rounding, in words."""
        stored = {"fp8": "weights in fp8", "int8": "weights in int8"}.get(self.weights)
        tiles = "decoded in tiles" if self.vae == "tiled" else None
        return tuple(filter(None, (stored, tiles)))


class LaunchSection(Section):
    """How training is distributed over processes and devices; the results do not depend on it."""

    processes: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        1,
        description="Processes on this machine, if torchrun or accelerate started none; null: one per GPU.",
    )
    sharding: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="FSDP2: shard weights, gradients and optimizer over all processes (full), or over those "
        "of a machine with replicas across machines (hybrid); none: replicate them.",
    )
    context_parallel: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        None,
        description="Processes that share the tokens of one video and its decoding; null: 1, or in `sample` "
        "as many as it takes to keep all processes busy.",
    )
    offload: bool = Field(
        False,
        description="With sharding, keep shards in CPU memory and update them there; without, keep the "
        "frozen base of adapters there and copy each matrix to the device when it is used.",
    )
    async_checkpoint: bool = Field(False, description="Write sharded checkpoints in the background.")

    @field_validator("async_checkpoint")
    @classmethod
    def _needs_sharding(cls, value: bool, info: ValidationInfo) -> bool:
        changed = value is not cls.model_fields[info.field_name or ""].default
        sharded = info.data.get("sharding") != "none"
        return require(sharded or not changed, value, f"be {not value} without sharding".lower())


class Recipe(Section):
    """One model family through all commands."""

    name: Name = Field(description="Name of the run directory; by default the file's name.")
    description: Annotated[str, Field(max_length=10_000)] = ""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    synthesize: SynthesizeSection = SynthesizeSection()
    train_flowmap: TrainFlowMapSection = TrainFlowMapSection()
    distill: DistillSection = DistillSection()
    finetune: FinetuneSection = FinetuneSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection = EvaluateSection()
    memory: MemorySection = MemorySection()
    launch: LaunchSection = LaunchSection()

    @property
    def evaluates_teacher(self) -> bool:
        """Whether the teacher is evaluated beside the model; one without pictures only from text."""
        takes_pictures = self.model.pictures != "none"
        return self.evaluate.teacher and (takes_pictures or not self.evaluate.is_conditioned)

    @field_validator("train_flowmap", "distill", "finetune")
    @classmethod
    def _only_some_models_continue(cls, section: Continuing, info: ValidationInfo) -> Continuing:
        model = info.data.get("model")
        continues = model is None or model.causal is not None or model.pictures == "optional-first"
        return require(
            continues or not section.flow_map.conditioning_prob,
            section,
            "leave flow_map.conditioning_prob at 0: only a causal model, or one with model.pictures: "
            "optional-first, continues frames",
        )

    @field_validator("train_flowmap", "distill", "finetune")
    @classmethod
    def _teachers_see_whole_videos(cls, section: Continuing, info: ValidationInfo) -> Continuing:
        model = info.data.get("model")
        must = "have flow_map.target data for a causal model: the teacher sees all frames at once"
        return require(
            model is None or model.causal is None or section.flow_map.target == "data", section, must
        )

    @field_validator("distill")
    @classmethod
    def _roll_out_as_the_model(cls, distill: DistillSection, info: ValidationInfo) -> DistillSection:
        model = info.data.get("model")
        if model is None:
            return distill
        if model.causal is None:
            by_chunk = distill.replay_rollout or distill.first_chunk_budgets is not None
            must = "have replay_rollout and first_chunk_budgets only for a causal model"
            return require(not by_chunk, distill, must)
        must = "have another matching than fake-free for a causal model, whose jumps see one chunk"
        return require(distill.matching != "fake-free", distill, must)

    @field_validator("distill")
    @classmethod
    def _continue_clean_chunks(cls, distill: DistillSection, info: ValidationInfo) -> DistillSection:
        model = info.data.get("model")
        must = "have another simulation than fixed-steps for a causal model: its chunks would end as noise"
        is_causal = model is not None and model.causal is not None
        return require(not is_causal or distill.simulation != "fixed-steps", distill, must)

    @field_validator("train_flowmap", "distill", "finetune")
    @classmethod
    def _have_weights_in_fp32(cls, section: Continuing, info: ValidationInfo) -> Continuing:
        model = info.data.get("model")
        must = "have flow_map.derivative_precision same: with model.lora the frozen weights are in bf16"
        stores_bf16 = model is not None and model.lora is not None and model.precision != "fp32"
        return require(not stores_bf16 or section.flow_map.derivative_precision == "same", section, must)

    @field_validator("distill")
    @classmethod
    def _roll_out_whole_videos(cls, section: DistillSection, info: ValidationInfo) -> DistillSection:
        model, longest = info.data.get("model"), section.rollout_frames
        fits = model is None or longest is None or (model.causal is not None and longest >= model.frames)
        must = "have rollout_frames only for a causal model, of model.frames at least"
        return require(fits, section, must)

    @field_validator("synthesize")
    @classmethod
    def _fit_the_model(cls, made: SynthesizeSection, info: ValidationInfo) -> SynthesizeSection:
        model = info.data.get("model")
        if model is None:
            return made
        scale, own = 2 * model.vae_scale, (model.height, model.width, model.frames)
        for bucket in made.buckets:
            height, width, frames = bucket
            must = "have no bucket of one frame, which the model is given already"
            require(frames > 1 or not model.needs_pictures, made, must)
            whole = height % scale == width % scale == (frames - 1) % 4 == 0
            must = f"have buckets of multiples of {scale} pixels and 4 n + 1 frames, not {list(bucket)}"
            require(whole, made, must)
            must = f"have no bucket larger than the model's own, {list(own)}, as {list(bucket)} is"
            require(height * width * frames <= math.prod(own), made, must)
        return made

    @field_validator("launch")
    @classmethod
    def _offload_a_base(cls, launch: LaunchSection, info: ValidationInfo) -> LaunchSection:
        model = info.data.get("model")
        base = launch.sharding != "none" or model is None or model.lora is not None
        must = "have offload false without sharding, unless model.lora has adapters on a frozen base"
        return require(base or not launch.offload, launch, must)

    @field_validator("launch")
    @classmethod
    def _call_alike(cls, launch: LaunchSection, info: ValidationInfo) -> LaunchSection:
        stages = [info.data[name] for name in ("train_flowmap", "distill", "finetune") if name in info.data]
        alike = all(
            1 not in scales_of(stage.flow_map.guidance)
            or stage.flow_map.target == "teacher"
            or stage.flow_map.objective == "composition"
            for stage in stages
        )
        must = "have sharding none where a flow_map.guidance is 1: processes would not call the network alike"
        return require(launch.sharding == "none" or alike, launch, must)
