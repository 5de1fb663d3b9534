"""What a data set is to be, settled and checked before a model is loaded: captions, clips, provenance.

The provenance holds everything that decides the bytes of a data set. It is written into the directory before
the first shard, so that the same command continues there and any other is refused with the keys that differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import anyflow_cli
from anyflow_cli.data.clips import ClipFile, list_clips
from anyflow_cli.data.prompts import read_prompts, world_captions
from anyflow_cli.data.shards import PROVENANCE, ShardRecord, read_record, shard_path, shard_ranges
from anyflow_cli.errors import UsageError
from anyflow_cli.model.pipeline_io import resolve_pipeline
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.distributed import default_device, rank, world_size
from anyflow_cli.utils.hub import is_hub_name

NOTES = ("recipe", "anyflow")  # of the provenance: worth knowing, but no reason to refuse a directory


@dataclass(frozen=True)
class SynthesisJob:
    """What will be made and where. ``clips`` is None when the teacher makes the videos."""

    recipe: Recipe
    out: Path
    captions: Sequence[str]
    clips: Sequence[ClipFile] | None
    provenance: Mapping[str, Any]

    @property
    def ranges(self) -> list[range]:
        """The indices of each shard."""
        return shard_ranges(len(self.captions), self.recipe.synthesize.shard_size)

    def records(self) -> list[ShardRecord | None]:
        """What is complete already, by shard."""
        return [read_record(shard_path(self.out, number)) for number in range(len(self.ranges))]

    def missing(self) -> list[int]:
        """The shards still to be made. Each process begins at others, so that few find theirs taken."""
        first, step = rank(), world_size()
        missing = [number for number, record in enumerate(self.records()) if record is None]
        return sorted(missing, key=lambda number: ((number - first) % step, number))

    def videos_left(self) -> int:
        """Videos of the shards still to be made, by whichever process."""
        return sum(len(self.ranges[number]) for number in self.missing())

    @property
    def teacher(self) -> str:
        """Address of the pipeline that makes the videos, or encodes the clips."""
        return str(self.provenance["model"])

    @property
    def stored(self) -> torch.dtype:
        """Latents keep the precision they are made in: at full scale fp32 would be 2 TB where bf16 is 1."""
        return torch.bfloat16 if self.provenance["precision"] == "bf16" else torch.float32


def prepare_synthesis(recipe: Recipe, out: Path, videos: Path | None = None) -> SynthesisJob:
    """Read prompts or list videos, and make sure that ``out`` is free or holds this very data set."""
    clips = None if videos is None else list_clips(videos)
    if clips is None:
        captions = _captions(recipe)
        _check_teacher(recipe.synthesize.teacher or recipe.model.teacher)
    else:
        captions = [clip.caption or "" for clip in clips]
    job = SynthesisJob(recipe, out, captions, clips, _provenance(recipe, captions, clips, videos))
    _check_directory(job)
    return job


def _captions(recipe: Recipe) -> list[str]:
    """One caption an index: the prompts over and over until there are ``count``, or captions of the world."""
    wanted = recipe.synthesize.count
    if recipe.data.prompts is not None:
        prompts = read_prompts(recipe.data.prompts)
        return [prompts[index % len(prompts)] for index in range(wanted or len(prompts))]
    if wanted is None:
        raise UsageError(
            f"The captions of the world '{recipe.data.world}' have no end.",
            "Say how many videos with --count.",
        )
    return world_captions(recipe.data.world, wanted, recipe.synthesize.seed)


def _check_teacher(address: str) -> None:
    """A local teacher must be there; one of the Hub is fetched later, since a dry run loads nothing."""
    if not is_hub_name(address):
        resolve_pipeline(address)


def _provenance(
    recipe: Recipe, captions: Sequence[str], clips: Sequence[ClipFile] | None, videos: Path | None
) -> dict[str, Any]:
    """Everything that decides the bytes of the data set, and a few notes. The batch size does not."""
    model, made = recipe.model, recipe.synthesize
    teacher = (made.teacher or model.teacher) if clips is None else model.teacher
    common = {
        "anyflow": anyflow_cli.__version__, "recipe": recipe.name,
        "kind": "teacher" if clips is None else "videos",
        "model": teacher, "height": model.height, "width": model.width, "frames": model.frames,
        "fps": model.fps, "max_text_tokens": model.max_text_tokens, "negative_prompt": model.negative_prompt,
        "precision": resolve_precision(model.precision, default_device()), "count": len(captions),
        "shard_size": made.shard_size, "previews": made.previews, "captions": _hash(captions),
    }  # fmt: skip
    if clips is None:
        return common | {
            "steps": made.steps,
            "guidance": made.guidance,
            "shift": model.shift,
            "seed": made.seed,
        }
    assert videos is not None
    listed = [(clip.path.relative_to(videos).as_posix(), clip.path.stat().st_size) for clip in clips]
    return common | {"videos": _hash(listed)}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _check_directory(job: SynthesisJob) -> None:
    """Refuse a directory that holds something else, with the keys that differ."""
    out = job.out
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory.", "Choose another --out.")
    path = out / PROVENANCE
    if not path.exists():
        if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UsageError(
                f"{out} holds files that are no data set.", "Choose an empty or new directory with --out."
            )
        return
    try:
        there = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} cannot be read.", "Choose another --out.") from error
    keys = [
        k for k in {**there, **job.provenance} if k not in NOTES and there.get(k) != job.provenance.get(k)
    ]
    if keys:
        named = ", ".join(
            f"{key} ({_short(there.get(key))} there, {_short(job.provenance.get(key))} now)" for key in keys
        )
        raise UsageError(
            f"{out} holds another data set; it differs in {named}.",
            "Choose another --out or --runs, remove that directory, or go back to its settings.",
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
