"""What a sampling's record holds for making its videos again, from the same noise, at more steps.

Every sampling writes such a record; ``--preview`` is one of two steps. What is made again is known to be so:
the noise, the given frames and the model's lineage are compared with what the record says of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.recipe.renamed import with_new_keys
from anyflow_cli.recipe.schema import ModelSection, Recipe
from anyflow_cli.sample.output import SAMPLES_JSON, ConditioningFrames
from anyflow_cli.sample.sampler import PromptSwitch, VideoSampler
from anyflow_cli.utils.files import read_json

PREVIEW_STEPS, REFINED_STEPS = 2, 32

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreviousSample:
    """Videos that were made, and the record of their sampling."""

    record: dict[str, Any]
    entries: Sequence[dict[str, Any]]

    @property
    def prompts(self) -> list[str]:
        """Each prompt once, in order."""
        return list(dict.fromkeys(entry["prompt"] for entry in self.entries))

    @property
    def seeds(self) -> list[int]:
        """Each seed once, in order."""
        return list(dict.fromkeys(entry["seed"] for entry in self.entries))

    @property
    def then(self) -> tuple[PromptSwitch, ...]:
        """The prompts that take over."""
        return tuple(PromptSwitch(*later) for later in self.record["then"])

    def recipe(self, settings: Recipe) -> Recipe:
        """``settings`` with the name, the model and the guidance of the sampling."""
        guidance = {} if self.record["guidance"] is None else {"teacher_guidance": self.record["guidance"]}
        return settings.model_copy(
            update={
                "name": self.record["recipe"]["name"],
                # chunks are the network's own; a video longer than it was trained at has not the recipe's
                "model": ModelSection.model_validate(
                    {**with_new_keys(self.record["settings"], ("model",)), "causal": None}
                ),
                "sample": settings.sample.model_copy(update=guidance),
            }
        )

    def check_given(self, given: ConditioningFrames | None) -> None:
        """Refuse frames that are not those the videos began with."""
        if given is not None and given.facts["mark"] != self.record["given"]["mark"]:
            raise AnyflowError(
                f"{given.file} is not what it was: the preview began with other frames.",
                "Bring the file back, or begin anew with --preview.",
            )

    def check_model(self, sampler: VideoSampler) -> None:
        """Refuse other noise than that of the preview; say where the model has changed."""
        for entry in self.entries:
            if sampler.noise_fingerprint(entry["seed"]) != entry["noise"]:
                torch = self.record["versions"]["torch"]
                raise AnyflowError(
                    f"Seed {entry['seed']} gives other noise here than under the preview's torch {torch}.",
                    "Use that version, or begin anew with --preview.",
                )
        if sampler.lineage != self.record["model"]["lineage"]:
            log.warning("%s has changed since the preview.", self.record["model"]["address"])


def read_previous_sample(path: Path) -> PreviousSample:
    """The videos of a directory that ``anyflow sample`` made, or one of them by its mp4."""
    folder = path if path.is_dir() else path.parent
    if not path.exists() or not (folder / SAMPLES_JSON).is_file():
        raise UsageError(
            f"{path} is no sampling: there is no {folder / SAMPLES_JSON}.",
            "Give a directory that `anyflow sample` made, or an mp4 in it.",
        )
    record = read_json(folder / SAMPLES_JSON)
    entries = [entry for entry in record.get("samples", ()) if path.is_dir() or entry["file"] == path.name]
    if not entries or not all("noise" in entry for entry in entries):
        raise UsageError(
            f"{folder / SAMPLES_JSON} does not say how {path.name} was made.",
            "Give a video that is named there, or begin anew with --preview.",
        )
    return PreviousSample(record, entries)
