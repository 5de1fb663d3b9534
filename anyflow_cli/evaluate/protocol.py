"""What exactly is measured: model, prompts, seeds, sampler; and the card that stands beside every score.

A *variant* is one model at one number of steps. Its key is a hash of everything that decides its videos and
their scores, so results are found again by what they are: a teacher scored once serves every later student,
and a model that was trained further never meets the scores of its former self. Prompts are not in the key:
each video stands for itself, by prompt and seed.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import anyflow_cli
from anyflow_cli.evaluate.suite import Assessment, Suite
from anyflow_cli.model.causal import partition_for
from anyflow_cli.model.pipeline_io import pipeline_files
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.recipe.schema import Recipe, latent_frames
from anyflow_cli.runs.open import LINEAGE, ModelChoice, describe
from anyflow_cli.sample.sampler import Method
from anyflow_cli.utils.distributed import default_device
from anyflow_cli.utils.files import file_sha256, json_sha256

PACKAGES = ("torch", "diffusers", "transformers", "numpy")
SAMPLED: dict[Method | None, str] = {
    None: "flow-map Euler", "flow-map": "flow-map Euler", "euler": "Euler", "consistency": "consistency"
}  # fmt: skip
WEIGHTLESS = (LINEAGE, "README.md", ".gitattributes")  # files that no video depends on
MORE_SEEDS = 10**6  # where those of further videos of a prompt begin, far from all others
BLOB = 64  # letters of a SHA-256, as the Hub's cache names large files


@dataclass(frozen=True)
class Item:
    """One video to make."""

    prompt: str
    seed: int
    number: int  # of the prompt, from 0


@dataclass(frozen=True)
class Protocol:
    """The questions: prompts, videos a prompt, first seed; and in what it is not the suite's own.

    ``numbers``: the place of each prompt in the suite's whole set; None: they are its first. ``more``: how
    many videos the prompts of these numbers have instead, where that is more. ``titles``: the suite's own
    prompts, where others are sampled with. ``skipped``: seeds of videos that are not there.
    """

    suite: Suite
    prompts: tuple[str, ...]
    samples: int
    seed: int
    deviations: tuple[str, ...] = ()
    numbers: tuple[int, ...] | None = None
    more: Mapping[int, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)  # for the card
    titles: tuple[str, ...] | None = None
    skipped: frozenset[int] = frozenset()

    @property
    def own_prompts(self) -> dict[int, str]:
        """The suite's own by their numbers, whatever is sampled with."""
        return dict(zip(self._numbers, self.titles or self.prompts, strict=True))

    @property
    def items(self) -> list[Item]:
        """All videos of one variant, prompt by prompt; seeds run on over the whole set and its samples."""
        everything = [
            Item(prompt, self._seed(number, k), number)
            for number, prompt in zip(self._numbers, self.prompts, strict=True)
            for k in range(max(self.samples, self.more.get(number, 0)))
        ]
        return [item for item in everything if item.seed not in self.skipped]

    @property
    def _numbers(self) -> Sequence[int]:
        return self.numbers or range(len(self.prompts))

    def _seed(self, number: int, k: int) -> int:
        if k < self.samples:
            return self.seed + number * self.samples + k
        return self.seed + MORE_SEEDS + number * max(self.more.values()) + k


@dataclass(frozen=True)
class Subject:
    """A model as it lies on the disk."""

    address: str
    why: str
    teacher: bool  # a plain Wan model, guided: two evaluations a step
    weights: str  # hash of its files
    lineage: dict[str, Any]
    partition: tuple[int, ...] | None = None  # latent frames of its chunks; None: all at once
    sampler: Method | None = None  # None: by its kind


@dataclass(frozen=True)
class Variant:
    """One model at one number of steps, on one machine's arithmetic."""

    subject: Subject
    steps: int  # 0: its videos were made elsewhere
    settings: dict[str, Any]  # all that decides its videos and scores, besides prompt and seed
    reference: bool = False  # the teacher, beside the model in question

    @property
    def label(self) -> str:
        """Steps as the literature writes them: ``4``, or ``50x2`` for a guided teacher."""
        if not self.steps:
            return "given"
        return f"{self.steps}x2" if self.subject.teacher else str(self.steps)

    @property
    def evaluations(self) -> int:
        """Calls of the network for one video."""
        return self.steps * 2 if self.subject.teacher else self.steps

    @property
    def key(self) -> str:
        """A name for its directory."""
        kind = "teacher" if self.subject.teacher else "model"
        return f"{kind}-{self.label}-{json_sha256(self.settings)[:12]}"


def subject(choice: ModelChoice, recipe: Recipe, sampler: Method | None = None) -> Subject:
    """Look at a model or checkpoint without loading it.

    A plain Wan model is a teacher, unless it is sampled as the few-step student that it may be too.
    """
    info = describe(choice.address, recipe)
    partition = None
    if info.causal is not None:
        partition = partition_for(info.causal, latent_frames(recipe.model.frames))
    weights = json_sha256([_content_hash(source) for source in info.sources])
    teacher = not info.two_time and sampler in (None, "euler")
    return Subject(choice.address, choice.why, teacher, weights, info.lineage, partition, sampler)


def variant(
    of: Subject, steps: int, protocol: Protocol, recipe: Recipe, *, reference: bool = False
) -> Variant:
    """A subject at a number of steps under a protocol."""
    model = recipe.model
    settings = {
        "suite": protocol.suite.name, "suite version": protocol.suite.version, "weights": of.weights,
        "steps": steps, "sampler": "guided Euler" if of.teacher else SAMPLED[of.sampler],
        "guidance": recipe.sample.teacher_guidance if of.teacher else None,
        "negative prompt": model.negative_prompt if of.teacher else None,
        "shift": model.shift, "size": [model.frames, model.height, model.width],
        "text tokens": model.max_text_tokens,
        "precision": resolve_precision(model.precision, default_device()),
    }  # fmt: skip
    return Variant(of, steps, settings, reference)


def card(
    protocol: Protocol, variants: Sequence[Variant], recipe: Recipe, assessments: Sequence[Assessment]
) -> dict[str, Any]:
    """Everything a stranger needs to repeat the numbers, or to see why theirs differ."""
    seeds = [item.seed for item in protocol.items]
    found = (deviation for assessment in assessments for deviation in assessment.deviations)
    deviations = list(dict.fromkeys([*protocol.deviations, *found]))
    return {
        "suite": protocol.suite.name,
        "suite version": protocol.suite.version,
        "dimensions": [dimension.name for dimension in protocol.suite.dimensions],
        "comparable": not deviations,
        "deviations": deviations,
        "prompts": len(protocol.prompts),
        "prompt set": json_sha256(list(protocol.prompts)),
        "samples a prompt": protocol.samples,
        "videos": len(seeds),
        "seeds": [min(seeds), max(seeds)],  # one a video, the same for every model
        **protocol.notes,
        "fps": recipe.model.fps,
        "recipe": recipe.name,
        "models": {
            one.key: _model_card(one) | assessment.notes
            for one, assessment in zip(variants, assessments, strict=True)
        },
        "versions": {"anyflow": anyflow_cli.__version__} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {_device_name()}, {torch.get_num_threads()} threads",
    }


def _model_card(one: Variant) -> dict[str, Any]:
    of = one.subject
    return {"address": of.address, "because": of.why, **one.settings, "lineage": of.lineage}


def _content_hash(source: Path) -> str | list[list[str]]:
    """SHA-256 of a file, or of each file of a folder that its videos depend on."""
    if source.is_file():
        return _file_hash(source)
    files = pipeline_files(source).items()
    return [[name, _file_hash(file)] for name, file in files if file.name not in WEIGHTLESS]


def _file_hash(path: Path) -> str:
    """SHA-256 of a file; the Hub's cache names large files by it, which saves reading them."""
    name = path.resolve().name
    if path.is_symlink() and len(name) == BLOB:
        return name
    return file_sha256(path)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
