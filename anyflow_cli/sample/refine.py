"""``--refine``: the record of earlier samples, to sample them again from the same noise at more steps.

Every ``samples.json`` is such a record; ``--preview`` writes one of two-step samples. Noise, conditioning
frames and the model's lineage are compared with the record, so that a difference is not silent.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from anyflow_cli.data.prompts import check_text
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.recipe.renamed import with_new_keys
from anyflow_cli.recipe.schema import ExpertGuidance, ModelSection, Name, Recipe
from anyflow_cli.sample.output import SAMPLES_JSON, ConditioningFrames
from anyflow_cli.sample.sampler import Method, PromptSwitch, VideoSampler
from anyflow_cli.utils.records import read_record

PREVIEW_STEPS, REFINED_STEPS = 2, 32
RESTART = "Sample again with --preview."

log = logging.getLogger(__name__)


class RecordedModel(BaseModel):
    """The sampled model."""

    address: str
    lineage: Mapping[str, Any]


class RecordedFrames(BaseModel):
    """The conditioning frames; ``mark`` is a hash of their pixels."""

    kind: Literal["image", "video"]
    file: str
    frames: int = Field(ge=1)
    mark: str
    last_file: str | None = None


class RecordedVideo(BaseModel):
    """One sampled video; ``noise`` is the fingerprint of its starting noise."""

    file: str
    prompt: str
    seed: int
    noise: str | None = None


class RecordedRecipe(BaseModel):
    """The recipe; its name becomes a directory."""

    name: Name


class SamplesRecord(BaseModel):
    """The part of ``samples.json`` that sampling again needs."""

    model: RecordedModel
    sampler: Method
    guidance: float | ExpertGuidance | None
    preset: str | None = None
    then: tuple[tuple[int, str], ...]
    versions: Mapping[str, str]
    recipe: RecordedRecipe
    settings: Mapping[str, Any]
    given: RecordedFrames | None
    samples: tuple[RecordedVideo, ...]


@dataclass(frozen=True)
class PreviousSamples:
    """Sampled videos to refine, and the record they belong to."""

    record: SamplesRecord
    videos: tuple[RecordedVideo, ...]
    model: ModelSection

    @property
    def prompts(self) -> list[str]:
        """Each prompt once, in order."""
        return list(dict.fromkeys(video.prompt for video in self.videos))

    @property
    def seeds(self) -> list[int]:
        """Each seed once, in order."""
        return list(dict.fromkeys(video.seed for video in self.videos))

    @property
    def switches(self) -> tuple[PromptSwitch, ...]:
        """Prompts that replace the first one."""
        return tuple(PromptSwitch(*switch) for switch in self.record.then)

    def recipe(self, settings: Recipe) -> Recipe:
        """Return ``settings`` with the name, the model and the guidance of the record."""
        guidance = {} if self.record.guidance is None else {"teacher_guidance": self.record.guidance}
        sample = settings.sample.model_copy(update=guidance)
        return settings.model_copy(
            update={"name": self.record.recipe.name, "model": self.model, "sample": sample}
        )

    def check_frames(self, frames: ConditioningFrames | None) -> None:
        """Refuse conditioning frames whose pixels are not the recorded ones."""
        if frames is not None and self.record.given and frames.record["mark"] != self.record.given.mark:
            raise AnyflowError(
                f"{frames.file} has changed: the samples start with other frames.",
                f"Restore the file, or start over: {RESTART}",
            )

    def check_model(self, sampler: VideoSampler) -> None:
        """Refuse other noise than the recorded; warn of a model that has changed."""
        for video in self.videos:
            if sampler.noise_fingerprint(video.seed) != video.noise:
                torch = self.record.versions.get("torch", "(unknown)")
                raise AnyflowError(
                    f"Seed {video.seed} gives other noise here than in the recorded samples (torch {torch}).",
                    f"Use that version, or start over: {RESTART}",
                )
        if sampler.lineage != self.record.model.lineage:
            log.warning("%s has changed since these samples.", self.record.model.address)


def read_previous_samples(path: Path) -> PreviousSamples:
    """Read the record of a directory that ``anyflow sample`` wrote, or of one mp4 in it."""
    folder = path if path.is_dir() else path.parent
    file = folder / SAMPLES_JSON
    if not path.exists() or not file.is_file():
        raise UsageError(
            f"{path} is not a directory of samples: it has no {SAMPLES_JSON}.",
            "Give a directory that `anyflow sample` wrote, or an mp4 in it.",
        )
    record = read_record(file, SamplesRecord, RESTART)
    videos = tuple(video for video in record.samples if path.is_dir() or video.file == path.name)
    if not videos or any(video.noise is None for video in videos):
        raise UsageError(
            f"{file} does not say how {path.name} was sampled.",
            f"Give a video that it lists, or start over: {RESTART}",
        )
    for text in [video.prompt for video in videos] + [prompt for _, prompt in record.then]:
        check_text(text, str(file))
    try:
        # Chunks belong to the network: a video longer than it was trained for has not the recipe's.
        settings = {**with_new_keys(record.settings, ("model",)), "causal": None}
        return PreviousSamples(record, videos, ModelSection.model_validate(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, ("settings", *first["loc"])))
        raise UsageError(f"{file} is damaged: {where}: {first['msg']}.", RESTART) from error
