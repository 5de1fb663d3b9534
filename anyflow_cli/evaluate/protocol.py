"""What an evaluation measures (models, prompts, seeds, samplers), and the protocol card beside every score.

A *variant* is one model at one step count. Its key is a hash of everything that determines its videos and
scores except prompt and seed, and names its directory. Results are thus reused exactly where they still hold:
a teacher scored once serves every student, and a model trained further gets a new directory. Prompt and seed
identify the videos within it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

import anyflow_cli
from anyflow_cli.evaluate.suite import Assessment, Suite
from anyflow_cli.model.causal import partition_for
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.recipe.schema import Recipe, guidance_record, latent_frames
from anyflow_cli.runs.open import ModelChoice, describe
from anyflow_cli.runs.paths import LINEAGE
from anyflow_cli.sample.presets import SamplerPreset, check_model
from anyflow_cli.sample.sampler import Method
from anyflow_cli.utils.distributed import default_device
from anyflow_cli.utils.files import file_sha256, json_sha256

if TYPE_CHECKING:
    from anyflow_cli.evaluate.diffusers_pipeline import FoundPipeline

CARD_PACKAGES = ("torch", "diffusers", "transformers", "numpy")
SAMPLER_NAMES: dict[Method | None, str] = {
    None: "flow-map Euler", "flow-map": "flow-map Euler", "euler": "Euler", "unipc": "UniPC",
    "consistency": "consistency",
}  # fmt: skip
WEIGHTLESS = (LINEAGE, "README.md", ".gitattributes")  # files that do not affect the videos
EXTRA_SEEDS = 10**6  # first seed of videos beyond ``Protocol.samples``, far from all others
DIGEST_LENGTH = 64  # of a SHA-256 in hexadecimal, by which the Hub's cache names large files

# Keys as 0.1 wrote them -> keys now, in ``results.json`` and in the settings behind a variant's key.
RENAMED_KEYS = {
    "suite version": "suite_version",
    "prompt set": "prompt_set",
    "samples a prompt": "samples_per_prompt",
    "full info": "full_info",
    "prompts sampled with": "sampled_prompts",
    "videos a prompt of temporal flickering": "flickering_samples",
    "dimensions asked for": "dimensions_requested",
    "because": "reason",
    "negative prompt": "negative_prompt",
    "text tokens": "text_tokens",
    "dimensions run": "dimensions_run",
    "static filter": "static_filter",
    "share of teacher": "share_of_teacher",
    "with decoding": "with_decoding",
}  # fmt: skip


@dataclass(frozen=True)
class VideoRequest:
    """One video to sample; ``number`` is that of its prompt, from 0."""

    prompt: str
    seed: int
    number: int


@dataclass(frozen=True)
class VBenchNotes:
    """VBench's part of the protocol card.

    Attributes:
        full_info: SHA-256 of the benchmark's list of prompts.
        sampled_prompts: Source of the prompts the videos are sampled with.
        flickering_samples: Videos per prompt of temporal flickering.
        dimensions_requested: Dimensions named in the recipe, or ``all``.
    """

    full_info: str
    sampled_prompts: str
    flickering_samples: int
    dimensions_requested: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """Prompts, seeds and videos per prompt, and how they differ from the suite's own protocol.

    Attributes:
        suite: Suite that scores the videos.
        prompts: Text that each video is sampled with.
        samples: Videos per prompt.
        seed: First seed.
        deviations: Differences from the suite's protocol; any makes the result not comparable.
        numbers: Number of each prompt in the suite; None where they are its first ones.
        more_samples: Prompt number -> videos, for prompts with more than ``samples``.
        notes: Further entries of the protocol card.
        titles: The suite's prompts, where videos are sampled with longer versions of them.
        skipped: Seeds without a video.
    """

    suite: Suite
    prompts: tuple[str, ...]
    samples: int
    seed: int
    deviations: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None
    more_samples: Mapping[int, int] = field(default_factory=dict)
    notes: VBenchNotes | None = None
    titles: tuple[str, ...] | None = None
    skipped: frozenset[int] = frozenset()

    @property
    def suite_prompts(self) -> dict[int, str]:
        """The suite's prompts by number, whatever the videos are sampled with."""
        return dict(zip(self._numbers, self.titles or self.prompts, strict=True))

    @property
    def requests(self) -> list[VideoRequest]:
        """All videos of one variant, prompt by prompt."""
        everything = [
            VideoRequest(prompt, self._seed(number, k), number)
            for number, prompt in zip(self._numbers, self.prompts, strict=True)
            for k in range(max(self.samples, self.more_samples.get(number, 0)))
        ]
        return [request for request in everything if request.seed not in self.skipped]

    @property
    def _numbers(self) -> Sequence[int]:
        return self.numbers or range(len(self.prompts))

    def _seed(self, number: int, k: int) -> int:
        """A seed depends on the prompt's number in the suite, so that a subset keeps its videos."""
        if k < self.samples:
            return self.seed + number * self.samples + k
        return self.seed + EXTRA_SEEDS + number * max(self.more_samples.values()) + k


@dataclass(frozen=True)
class EvaluatedModel:
    """A model on disk, described but not loaded.

    Attributes:
        address: Path or name it was found by.
        reason: Why it was chosen.
        teacher: Whether it is a plain Wan model with guidance, at two evaluations per step.
        weights: Hash of its files.
        lineage: Content of ``lineage.json``.
        partition: Latent frames of each chunk; None for a bidirectional model.
        sampler: Requested sampler; None for that of its kind.
        scheduler: Scheduler of its pipeline folder, which the sampler replaces.
        preset: Published system that it is sampled as.
        pipeline: The pipeline of diffusers that samples it, instead of our own sampler.
    """

    address: str
    reason: str
    teacher: bool
    weights: str
    lineage: dict[str, Any]
    partition: tuple[int, ...] | None = None
    sampler: Method | None = None
    scheduler: str | None = None
    preset: SamplerPreset | None = None
    pipeline: FoundPipeline | None = None


@dataclass(frozen=True)
class SamplingSettings:
    """Everything besides prompt and seed that determines videos and scores of a variant."""

    suite: str
    suite_version: int
    weights: str
    steps: int
    sampler: str
    guidance: float | dict[str, float] | None
    negative_prompt: str | None
    shift: float
    size: tuple[int, int, int]  # frames, height, width
    text_tokens: int
    precision: str


@dataclass(frozen=True)
class PipelineSettings:
    """The same for a pipeline of diffusers, which has a scheduler and a negative prompt of its own."""

    suite: str
    suite_version: int
    weights: str
    pipeline: str  # its class
    steps: int
    guidance: float | None
    size: tuple[int, int, int]  # frames, height, width
    precision: str


@dataclass(frozen=True)
class ExternalSettings:
    """The same for videos that were generated elsewhere."""

    suite: str
    suite_version: int
    videos: str  # their directory


@dataclass(frozen=True)
class Variant:
    """One model at one step count; ``steps`` is 0 for videos that were generated elsewhere."""

    model: EvaluatedModel
    steps: int
    settings: SamplingSettings | PipelineSettings | ExternalSettings
    reference: bool = False  # the teacher beside the evaluated model

    @property
    def label(self) -> str:
        """Steps as the literature writes them: ``4``, or ``50x2`` for a guided teacher."""
        if not self.steps:
            return "given"
        return f"{self.steps}x2" if self.model.teacher else str(self.steps)

    @property
    def evaluations(self) -> int:
        """Network evaluations per video."""
        return self.steps * 2 if self.model.teacher else self.steps

    @property
    def key(self) -> str:
        """Name of its directory; hashed with the keys of 0.1, so that earlier results are found."""
        old = {new: key for key, new in RENAMED_KEYS.items()}
        digest = json_sha256({old.get(key, key): value for key, value in asdict(self.settings).items()})
        return f"{'teacher' if self.model.teacher else 'model'}-{self.label}-{digest[:12]}"


def evaluated_model(
    choice: ModelChoice, recipe: Recipe, sampler: Method | None = None, preset: SamplerPreset | None = None
) -> EvaluatedModel:
    """Describe and hash a model or checkpoint without loading it.

    A plain Wan model is a teacher, unless it is sampled as a few-step student (``sampler``, ``preset``).
    """
    info = describe(choice.address, recipe)
    if preset is not None:
        check_model(preset, choice.address, recipe)
    partition, causal = None, info.causal if preset is None else preset.causal
    if causal is not None:
        partition = partition_for(causal, latent_frames(recipe.model.frames))
    strengths = [setting for lora in info.loras for setting in lora.settings]
    weights = json_sha256([*(content_hash(source) for source in info.sources), *strengths])
    is_student = preset is not None and preset.steps is not None
    teacher = not info.two_time and not is_student and sampler in (None, "euler")
    return EvaluatedModel(
        choice.address, choice.why, teacher, weights, info.lineage, partition, sampler, info.scheduler, preset
    )


def _sampler_in_words(of: EvaluatedModel, recipe: Recipe) -> str:
    if not of.teacher:
        return SAMPLER_NAMES[of.sampler] if of.preset is None else of.preset.in_words
    solver = f"guided {SAMPLER_NAMES[of.sampler or recipe.sample.teacher_sampler]}"
    return solver if of.preset is None else f"{solver} ({of.preset.in_words})"


def variant(
    of: EvaluatedModel, steps: int, protocol: Protocol, recipe: Recipe, *, reference: bool = False
) -> Variant:
    """A model at a step count under a protocol."""
    model = recipe.model
    settings = SamplingSettings(
        suite=protocol.suite.name,
        suite_version=protocol.suite.version,
        weights=of.weights,
        steps=steps,
        sampler=_sampler_in_words(of, recipe),
        guidance=guidance_record(recipe.sample.teacher_guidance) if of.teacher else None,
        negative_prompt=model.negative_prompt if of.teacher else None,
        shift=model.shift,
        size=(model.frames, model.height, model.width),
        text_tokens=model.max_text_tokens,
        precision=", ".join(
            [resolve_precision(model.precision, default_device()), *recipe.memory.approximations]
        ),
    )
    return Variant(of, steps, settings, reference)


def sampling_note(one: Variant) -> str:
    """Sampler and shift of a variant, beside those of the model's own folder."""
    assert isinstance(one.settings, SamplingSettings)
    own = f" (its own scheduler: {one.model.scheduler})" if one.model.scheduler else ""
    return f"{one.settings.sampler}, {one.label} steps, shift {one.settings.shift:g}{own}"


class ModelCard(BaseModel):
    """One variant on the protocol card: its settings, its model, and notes of the suite."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    address: str
    reason: str
    suite: str
    suite_version: int
    lineage: dict[str, Any]
    weights: str | dict[str, str] = ""  # 0.1 put VBench's weights here, in place of the model's hash
    steps: int | None = None
    sampler: str | None = None
    scheduler: str | None = None  # of the model's folder, which the sampler replaces
    preset: str | None = None
    pipeline: str | None = None  # class in diffusers
    guidance: float | dict[str, float] | None = None
    negative_prompt: str | None = None
    shift: float | None = None
    size: tuple[int, int, int] | None = None
    text_tokens: int | None = None
    precision: str | None = None
    videos: str | None = None
    dimensions_run: tuple[str, ...] | None = None
    static_filter: bool | None = None
    vbench: dict[str, str] | None = None
    vbench_weights: dict[str, str] | None = None


class ProtocolCard(BaseModel):
    """Everything needed to repeat the numbers, or to see why other numbers differ."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    suite: str
    suite_version: int
    dimensions: tuple[str, ...]
    comparable: bool
    deviations: tuple[str, ...]
    prompts: int
    prompt_set: str  # SHA-256
    samples_per_prompt: int
    videos: int
    seeds: tuple[int, int]  # smallest and largest; one per video, the same for every model
    fps: int
    recipe: str
    models: dict[str, ModelCard]  # by the variant's key
    versions: dict[str, str]
    machine: str
    full_info: str | None = None
    sampled_prompts: str | None = None
    flickering_samples: int | None = None
    dimensions_requested: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``results.json``, without the fields that do not apply."""
        return self.model_dump(mode="json", exclude_unset=True)


def protocol_card(
    protocol: Protocol, variants: Sequence[Variant], recipe: Recipe, assessments: Sequence[Assessment]
) -> ProtocolCard:
    """Write the card of a finished evaluation."""
    seeds = [request.seed for request in protocol.requests]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found = (deviation for assessment in assessments for deviation in assessment.deviations)
    deviations = tuple(dict.fromkeys([*protocol.deviations, *found]))
    return ProtocolCard(
        suite=protocol.suite.name,
        suite_version=protocol.suite.version,
        dimensions=tuple(dimension.name for dimension in protocol.suite.dimensions),
        comparable=not deviations,
        deviations=deviations,
        prompts=len(protocol.prompts),
        prompt_set=json_sha256(list(protocol.prompts)),
        samples_per_prompt=protocol.samples,
        videos=len(seeds),
        seeds=(min(seeds), max(seeds)),
        **({} if protocol.notes is None else asdict(protocol.notes)),
        fps=recipe.model.fps,
        recipe=recipe.name,
        models={
            one.key: _model_card(one, assessment)
            for one, assessment in zip(variants, assessments, strict=True)
        },
        versions={"anyflow": anyflow_cli.__version__} | {name: version(name) for name in CARD_PACKAGES},
        machine=f"{platform.machine()}, {device}, {torch.get_num_threads()} threads",
    )


def _model_card(one: Variant, assessment: Assessment) -> ModelCard:
    return ModelCard(
        address=one.model.address,
        reason=one.model.reason,
        lineage=one.model.lineage,
        scheduler=one.model.scheduler,
        **({} if one.model.preset is None else {"preset": one.model.preset.name}),
        **asdict(one.settings),
        **({} if assessment.notes is None else asdict(assessment.notes)),
    )


def content_hash(source: Path) -> str | list[list[str]]:
    """SHA-256 of a file, or of each file of a folder that affects the videos."""
    if source.is_file():
        return _file_hash(source)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path.name not in WEIGHTLESS]
    return [[path.relative_to(source).as_posix(), _file_hash(path)] for path in files]


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, which the Hub's cache uses as the name of large files; those need no reading."""
    name = path.resolve().name
    return name if path.is_symlink() and len(name) == DIGEST_LENGTH else file_sha256(path)
