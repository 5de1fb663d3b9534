"""What a data set will contain, settled and checked before a model is loaded: captions, clips, provenance.

The provenance holds everything that determines the bytes of a data set. It is written into the directory
before the first shard, so that the same command continues there and any other is refused with the keys that
differ.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import anyflow_cli
from anyflow_cli.data.clips import ClipFile, list_clips
from anyflow_cli.data.prompts import WorldCaptions, read_prompts
from anyflow_cli.data.segments import CUTS_FILE, ClipSegment, SegmentRules, remembered_cuts
from anyflow_cli.data.shards import PROVENANCE, ShardRecord, bucketed_ranges, read_shard_record, shard_path
from anyflow_cli.data.video import ClipFormat
from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.components import ORIGINAL_FILES
from anyflow_cli.model.lora_formats import split_loras
from anyflow_cli.model.pipeline_io import (
    FROZEN,
    PICTURE_ENCODER,
    frozen_files,
    pipeline_files,
    resolve_pipeline,
    with_components,
)
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.recipe.schema import Recipe, guidance_record
from anyflow_cli.synthesize.content_hashes import ContentHashes
from anyflow_cli.synthesize.pictures import GivenPictures, given_pictures
from anyflow_cli.utils.distributed import default_device, is_main_process, rank, world_size
from anyflow_cli.utils.files import json_sha256
from anyflow_cli.utils.hub import is_hub_name
from anyflow_cli.utils.records import read_record

NOTES = ("recipe", "anyflow")  # in the provenance for people; a difference is no reason to refuse
CONTENTS = ("encoder_files", "transformer_files", "clip_files")  # missing in data sets of version 0.1

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisJob:
    """What will be made, and in which directory. ``clips`` is None when the teacher samples the videos."""

    recipe: Recipe
    out: Path
    captions: Sequence[str]
    clips: Sequence[ClipSegment] | None
    provenance: Mapping[str, Any]
    pictures: GivenPictures | None = None  # that the teacher's videos start from

    @cached_property
    def ranges(self) -> list[range]:
        """The indices of each shard; a shard has one bucket."""
        counts = [len(self.captions)] if self.clips is None else list(self.buckets.values())
        return bucketed_ranges(counts, self.recipe.synthesize.shard_size)

    @property
    def buckets(self) -> Counter[ClipFormat]:
        """Segments of each format, in the order of their indices."""
        return Counter(segment.format for segment in self.clips or ())

    def records(self) -> list[ShardRecord | None]:
        """Records of the complete shards, None for the others."""
        return [read_shard_record(shard_path(self.out, number)) for number in range(len(self.ranges))]

    def missing(self) -> list[int]:
        """Shards still to be made, in an order of this process's own, so that few find theirs locked."""
        first, step = rank(), world_size()
        missing = [number for number, record in enumerate(self.records()) if record is None]
        return sorted(missing, key=lambda number: ((number - first) % step, number))

    def videos_left(self) -> int:
        """Videos of the shards still to be made, by any process."""
        return sum(len(self.ranges[number]) for number in self.missing())

    @property
    def teacher(self) -> str:
        """Address of the pipeline that samples the videos, or encodes the clips."""
        return str(self.provenance["model"])

    @property
    def pipeline(self) -> Path:
        """Folder with the VAE, the text encoder and the tokenizer."""
        model = self.recipe.model
        return with_components(resolve_pipeline(self.teacher), model.components or model.teacher)

    @property
    def stored(self) -> torch.dtype:
        """Latents are stored in the precision they are made in: at full scale 1 TB in bf16, 2 in fp32."""
        return torch.bfloat16 if self.provenance["precision"] == "bf16" else torch.float32


def prepare_synthesis(
    recipe: Recipe,
    out: Path,
    videos: Path | None = None,
    *,
    dry_run: bool = False,
    choose_another: str = "--out or --runs",
) -> SynthesisJob:
    """Read prompts or list videos, and check that ``out`` is free or holds this very data set.

    Args:
        recipe: What to make.
        out: Directory of the data set.
        videos: Directory of clips; without it the teacher samples.
        dry_run: Hash captions, model and clips only if there is a data set to compare with.
        choose_another: Options that choose another directory, for the hint.

    Raises:
        UsageError: No caption can be used, the teacher is missing, or ``out`` holds something else.
    """
    rules = segment_rules(recipe)
    clips = None if videos is None else list_clips(videos, pictures=rules.has_pictures)
    segments: list[ClipSegment] | None = None
    pictures = given_pictures(recipe) if clips is None else None
    if clips is None:
        captions = _captions(recipe)
        address = recipe.synthesize.teacher or recipe.model.teacher
    else:
        _check_captions(clips, videos)
        save = not dry_run and is_main_process()
        segments = remembered_cuts(clips, rules, out / CUTS_FILE, save=save)
        captions, address = [one.clip.caption or "" for one in segments], recipe.model.teacher
    if not is_hub_name(address):  # a model of the Hub is downloaded later: a dry run loads nothing
        resolve_pipeline(address)
    provenance = _provenance(recipe, address, captions, clips, videos)
    if recipe.model.needs_pictures:  # absent in data sets of videos from text
        provenance["pictures"] = recipe.model.pictures
    if pictures is not None:
        provenance["given_pictures"] = pictures.record
    if segments is not None and videos is not None and not rules.are_default:
        provenance |= _cutting(segments, rules, videos)
    is_begun = (out / PROVENANCE).exists()
    if is_begun or not dry_run:
        provenance["captions"] = json_sha256(list(captions))  # two minutes for a million of a world
        _check_directory(out, provenance, choose_another)
        hashes = ContentHashes(out)
        other = recipe.model.components or recipe.model.teacher
        components = with_components(resolve_pipeline(address), other)
        provenance |= _contents(address, components, clips, videos, hashes)
        if is_begun and not dry_run and is_main_process():  # one writer; the others may be clearing up
            hashes.save()
    _check_directory(out, provenance, choose_another)
    return SynthesisJob(recipe, out, captions, segments, provenance, pictures)


def segment_rules(recipe: Recipe) -> SegmentRules:
    """How a recipe cuts real clips, and into which formats; the model's own is the first."""
    model, made = recipe.model, recipe.synthesize
    sizes = dict.fromkeys([(model.height, model.width, model.frames), *made.buckets])
    formats = tuple(ClipFormat(frames, model.fps, height, width) for height, width, frames in sizes)
    return SegmentRules(formats, made.clips, made.segments, made.stride)


def _cutting(segments: Sequence[ClipSegment], rules: SegmentRules, videos: Path) -> dict[str, Any]:
    """What the provenance records of clips that are cut, or that have several formats."""
    parts = [
        [one.clip.path.relative_to(videos).as_posix(), one.start, *asdict(one.format).values()]
        for one in segments
    ]
    recorded: dict[str, Any] = {"clips": rules.cutting, "segments": json_sha256(parts)}
    if len(rules.formats) > 1:
        recorded["buckets"] = [[one.height, one.width, one.frames] for one in rules.formats]
    return recorded


def _check_captions(clips: Sequence[ClipFile], videos: Path | None) -> None:
    missing = sum(clip.caption is None for clip in clips)
    if missing == len(clips):
        raise UsageError(
            f"None of the {missing} videos in {videos} has a caption that can be used.",
            "Write NAME.txt beside each, or one captions.csv with the columns file and caption.",
        )
    if missing:
        log.warning("%s: %d of %d videos are left out, without a caption.", videos, missing, len(clips))


def _captions(recipe: Recipe) -> Sequence[str]:
    """One caption per index: prompts, repeated until there are ``count``, or captions of the world."""
    count = recipe.synthesize.count
    if recipe.data.prompts is not None:
        prompts = read_prompts(recipe.data.prompts)
        return [prompts[index % len(prompts)] for index in range(count or len(prompts))]
    if count is None:
        raise UsageError(
            f"The world '{recipe.data.world}' has captions without end.",
            "Set the number of videos with --count.",
        )
    return WorldCaptions(recipe.data.world, count, recipe.synthesize.seed)


def _provenance(
    recipe: Recipe,
    address: str,
    captions: Sequence[str],
    clips: Sequence[ClipFile] | None,
    videos: Path | None,
) -> dict[str, Any]:
    """Settings that determine the bytes of the data set, and a few notes. The batch size does not."""
    model, made = recipe.model, recipe.synthesize
    common = {
        "anyflow": anyflow_cli.__version__, "recipe": recipe.name,
        "kind": "teacher" if clips is None else "videos",
        "model": address, "height": model.height, "width": model.width, "frames": model.frames,
        "fps": model.fps, "max_text_tokens": model.max_text_tokens, "negative_prompt": model.negative_prompt,
        "precision": resolve_precision(model.precision, default_device()), "count": len(captions),
        "shard_size": made.shard_size, "previews": made.previews,
    }  # fmt: skip
    if clips is None:
        sampler = recipe.sample.teacher_sampler
        return common | {
            "steps": made.steps, "guidance": guidance_record(made.guidance),
            "shift": model.shift, "seed": made.seed,
            **({} if sampler == "euler" else {"sampler": sampler}),  # absent in data sets of version 0.1
        }  # fmt: skip
    assert videos is not None
    listed = [[clip.path.relative_to(videos).as_posix(), clip.path.stat().st_size] for clip in clips]
    return common | {"videos": json_sha256(listed)}


def _contents(
    address: str,
    components: Path,
    clips: Sequence[ClipFile] | None,
    videos: Path | None,
    hashes: ContentHashes,
) -> dict[str, str]:
    """Hashes of the files of encoders, transformer and LoRAs, and of the clips."""
    path = resolve_pipeline(address)
    model, loras = split_loras(str(path))
    files = {Path(model).name: Path(model)} if Path(model).is_file() else pipeline_files(Path(model))
    contents = {"encoder_files": hashes.combined(frozen_files(components))}
    if clips is None:
        frozen = (*FROZEN, *PICTURE_ENCODER, ORIGINAL_FILES["tokenizer"][0].partition("/")[0])
        network = {n: file for n, file in files.items() if n.partition("/")[0] not in frozen and "/" in n}
        merged = {f"lora {n} {lora.manner}": lora.path for n, lora in enumerate(loras)}
        contents["transformer_files"] = hashes.combined((network or files) | merged)
    else:
        assert videos is not None
        named = {clip.path.relative_to(videos).as_posix(): clip.path for clip in clips}
        contents["clip_files"] = hashes.combined(named)
    return contents


def _check_directory(out: Path, provenance: Mapping[str, Any], choose_another: str) -> None:
    """Refuse a directory that holds something else, with the keys that differ."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a directory.", f"Choose another {choose_another}.")
    path = out / PROVENANCE
    if not path.exists():
        if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
            raise UsageError(
                f"{out} contains files that are not a data set.",
                f"Choose an empty or new directory with {choose_another}.",
            )
        return
    there = read_record(path, dict[str, Any], f"Choose another {choose_another}.")
    keys = [
        key
        for key in {**there, **provenance}
        if key not in NOTES
        and there.get(key) != provenance.get(key)
        and (key not in CONTENTS or (key in there and key in provenance))
    ]
    if keys:
        named = ", ".join(
            f"{key} ({_short(there.get(key))} there, {_short(provenance.get(key))} now)" for key in keys
        )
        raise UsageError(
            f"{out} holds another data set; it differs in {named}.",
            f"Choose another {choose_another}, remove that directory, or restore its settings and files.",
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
