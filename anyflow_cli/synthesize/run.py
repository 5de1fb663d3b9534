"""Synthesis of data sets: teacher videos from prompts, or real clips, encoded as shards of latents.

``run_synthesis`` makes the missing shards of a job. Everything goes by shard: work is divided between
processes by ``shard_locks``, without communication; a killed process loses at most its open shard; equal
seeds give equal bytes. The process that completes the last shard writes the manifest.

A video that fails the checks is sampled again from the next seed of its index, three seeds in all; each
failure is in the shard's record with its reason. The teacher samples with guidance, 2 evaluations per step.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width; a
video is (T, 3, height, width) in [0, 1].
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_cli.data.clips import PICTURE_SUFFIXES
from anyflow_cli.data.segments import ClipSegment
from anyflow_cli.data.shard_index import index_path, write_index
from anyflow_cli.data.shards import (
    MANIFEST,
    NEGATIVE,
    PICTURES,
    PROVENANCE,
    LatentSample,
    Rejection,
    read_shard_record,
    shard_path,
    write_manifest,
    write_negative,
    write_shard,
)
from anyflow_cli.data.video import (
    UnusableClipError,
    from_pixels,
    read_clip,
    read_image,
    to_pixels,
    write_mp4,
)
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.encoders import PictureEncoder, TextEncoder, VideoVAE, check_scale
from anyflow_cli.model.parallelize import apply_attention, apply_context
from anyflow_cli.model.pictures import PictureConditioner, check_pictures
from anyflow_cli.model.pipeline_io import load_network, read_config, resolve_pipeline
from anyflow_cli.model.placement import PlacedNetwork, storage_of
from anyflow_cli.model.precision import resolve_precision
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.synthesize.job import SynthesisJob
from anyflow_cli.synthesize.pictures import GivenPictures
from anyflow_cli.synthesize.quality_checks import find_defect
from anyflow_cli.synthesize.shard_locks import LOCK_FILE, ShardLocks
from anyflow_cli.utils.distributed import default_device, from_first, join_group, rank, world_size
from anyflow_cli.utils.files import clear_leftovers, write_json

SEEDS_PER_VIDEO = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisReport:
    """State of a data set when this process is done with it."""

    out: Path
    wanted: int
    samples: int
    shards: int
    made: int  # shards made by this process
    complete: bool
    rejected: tuple[Rejection, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How often each reason rejected a candidate."""
        return dict(Counter(entry.reason.partition(" (")[0].partition(":")[0] for entry in self.rejected))


class SampleSource(Protocol):
    """A source of samples."""

    negative: Tensor  # (L, D), not padded

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """Yield the samples of these indices in order, and each rejected candidate."""

    def report(self) -> None:
        """Log counts of what was done so far."""


def run_synthesis(
    job: SynthesisJob, on_progress: Callable[[int], None] = lambda finished: None, *, wait: bool = False
) -> SynthesisReport:
    """Make missing shards until none is left that no other process makes.

    Args:
        job: What to make.
        on_progress: Called with the number of videos finished so far, those of other processes by shard.
        wait: Wait for the shards of other processes, and take over those of a process that dies.
    """
    if _is_complete(job):
        return _state(job, 0)
    shared = 1 if job.clips is not None else job.recipe.launch.context_parallel or 1
    source = SharedTeacher(job, shared) if shared > 1 else None
    if source is not None and rank() % shared:
        source.follow()
        return _state(job, 0)
    with ShardLocks(job.out, rank() // shared, world_size() // shared) as locks:
        with locks.shared_files():
            write_json(job.out / PROVENANCE, job.provenance)
        made = _make_missing(job, locks, on_progress, source, wait=wait)
        with locks.shared_files():
            report = _state(job, made)
            if report.complete:
                _complete(job)
    if source is not None:
        source.dismiss()
    if not report.complete:
        log.info("Other processes are making the remaining shards, or the next start will.")
    return report


def _is_complete(job: SynthesisJob) -> bool:
    shards = [shard_path(job.out, number) for number in range(len(job.ranges))]
    files = [job.out / MANIFEST, job.out / NEGATIVE, *map(index_path, shards)]
    return all(file.exists() for file in files) and not job.missing()


def _make_missing(
    job: SynthesisJob,
    locks: ShardLocks,
    on_progress: Callable[[int], None],
    source: SampleSource | None = None,
    *,
    wait: bool,
) -> int:
    """Make every missing shard that no other process makes; return their number."""
    made, wanted = 0, job.videos_left()
    for waits, number in product((False, True) if wait else (False,), job.missing()):
        path, indices = shard_path(job.out, number), job.ranges[number]
        with locks.shard(number, wait=waits) as is_mine:
            if is_mine and read_shard_record(path) is None:  # another process may have just made it
                source = source or _source(job)
                clear_leftovers(job.out, path.stem)
                before = wanted - job.videos_left()
                write_shard(path, _counted(source.results(indices), indices, before, on_progress))
                made += 1
    with locks.shared_files():
        if not (job.out / NEGATIVE).exists():
            write_negative(job.out, (source or _source(job)).negative)
    if source is not None:
        source.report()
    return made


def _complete(job: SynthesisJob) -> None:
    """Write the files of a complete data set: missing indices and the manifest."""
    records = [record for record in job.records() if record is not None]
    for path in (job.out / record.name for record in records):
        if not index_path(path).exists():
            write_index(path)
    write_manifest(job.out, records, job.provenance)
    clear_leftovers(job.out)
    (job.out / LOCK_FILE).unlink(missing_ok=True)


def _state(job: SynthesisJob, made: int) -> SynthesisReport:
    found = job.records()
    records = [record for record in found if record is not None]
    rejected = tuple(entry for record in records for entry in record.rejected)
    samples = sum(record.samples for record in records)
    complete = len(records) == len(found)
    return SynthesisReport(job.out, len(job.captions), samples, len(records), made, complete, rejected)


def _counted(
    results: Iterator[LatentSample | Rejection],
    indices: range,
    before: int,
    on_progress: Callable[[int], None],
) -> Iterator[LatentSample | Rejection]:
    """Pass results on and report the number of finished videos, in earlier shards and this one."""
    done = before
    for result in results:
        yield result
        if isinstance(result, LatentSample):
            done = before + result.index - indices.start + 1
            on_progress(done)
    if done < before + len(indices):  # the last ones were given up
        on_progress(before + len(indices))


def _source(job: SynthesisJob) -> SampleSource:
    return TeacherSource(job) if job.clips is None else ClipSource(job, job.clips)


class TeacherSource:
    """Guided samples of the recipe's teacher, one per caption."""

    def __init__(self, job: SynthesisJob, context: int = 1) -> None:
        device, folder = default_device(), resolve_pipeline(job.teacher)
        self._job = job
        self._encoders = Encoders(job, job.pipeline, device)
        self.negative = self._encoders.negative
        memory = job.recipe.memory
        place = "cpu" if memory.opens_on_host else device
        network = load_network(folder, job.stored, place, storage_of(memory))
        if network.config.two_time:
            raise UsageError(
                f"{job.teacher} is an any-step model, not a teacher.",
                "Set synthesize.teacher or model.teacher to a plain Wan pipeline.",
            )
        model, shape = job.recipe.model, self._encoders.latent_shape
        check_pictures(network.config, model, job.teacher)
        precision = resolve_precision(model.precision, device)
        apply_context([network], context, device)
        if network.context is not None:
            self._encoders.vae.share(network.context)
        apply_attention([network], model.attention, shape, precision, device)
        self._sampler = VideoSampler(
            network, model, shape, method=job.recipe.sample.teacher_sampler,
            guidance=job.recipe.synthesize.guidance, negative=self._encoders.padded([self.negative]).text[0],
            placed=PlacedNetwork(network, memory, job.stored, device),
        )  # fmt: skip

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """Sample batch by batch; a shard in which nothing passes means that a setting is wrong."""
        passed, reasons = 0, Counter[str]()
        size = self._job.recipe.synthesize.batch_size
        self._sampler.make_room("text encoder")
        texts = self._encoders.text([self._job.captions[index] for index in indices])
        for start in range(0, len(indices), size):
            for result in self._batch(indices[start : start + size], texts[start : start + size]):
                if isinstance(result, Rejection):
                    reasons[result.reason] += 1
                passed += isinstance(result, LatentSample)
                yield result
        if not passed:
            named = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            raise AnyflowError(
                f"None of the videos {indices.start} to {indices.stop - 1} passed the checks ({named}).",
                "Look at the teacher with `anyflow sample --teacher`; check its shift, guidance and steps.",
            )

    def report(self) -> None:
        """Log how many captions were truncated."""
        self._encoders.report()

    def agreed(self, defect: str | None) -> str | None:
        """The defect of a video, on which all processes that share it go on."""
        return defect

    def _batch(self, indices: range, texts: list[Tensor]) -> Iterator[LatentSample | Rejection]:
        made: dict[int, LatentSample] = {}
        for attempt in range(SEEDS_PER_VIDEO):
            pending = [index for index in indices if index not in made]
            if pending:
                text = [texts[index - indices.start] for index in pending]
                for result in self._attempt(pending, text, attempt):
                    if isinstance(result, LatentSample):
                        made[result.index] = result
                    else:
                        yield result
        yield from (made[index] for index in sorted(made))

    def _attempt(
        self, indices: Sequence[int], texts: list[Tensor], attempt: int
    ) -> Iterator[LatentSample | Rejection]:
        """Sample one video per index and text (L, D), and check each."""
        recipe = self._job.recipe
        seeds = [attempt_seed(recipe.synthesize.seed, index, attempt) for index in indices]
        self._sampler.make_room("vae")
        parts = self._encoders.given(self._job.pictures, indices)
        condition = self._encoders.padded(texts).with_pictures(**parts).to(self._encoders.device)
        (latents,) = self._sampler.latents(condition, seeds, recipe.synthesize.steps, len(seeds))
        self._sampler.make_room("vae")
        videos = self._encoders.vae.decode(latents)
        made = zip(indices, seeds, texts, latents, videos, strict=True)
        for place, (index, seed, text, x, video) in enumerate(made):
            reason = self.agreed(find_defect(x, video))
            if reason is None:
                facts = {"seed": seed, "source": "teacher"}
                own = {name: part[place] for name, part in parts.items()}
                yield self._encoders.sample(index, x, text, video, facts, own)
            else:
                what = "given up" if attempt + 1 == SEEDS_PER_VIDEO else "trying the next seed"
                log.warning("Video %d from seed %d is %s; %s.", index, seed, reason, what)
                yield Rejection(index, f"seed {seed}", reason)


class SharedTeacher(TeacherSource):
    """A teacher whose videos are each sampled by several processes: the first leads, the others follow."""

    def __init__(self, job: SynthesisJob, context: int) -> None:
        join_group()
        super().__init__(job, context)
        self._group = self._sampler.context_group

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """Have the others sample the same videos."""
        from_first(indices, self._group)
        yield from super().results(indices)

    def agreed(self, defect: str | None) -> str | None:
        """What the first process has found."""
        return from_first(defect, self._group)

    def follow(self) -> None:
        """Sample what the first process does, until it is done."""
        while (indices := from_first(range(0), self._group)) is not None:
            deque(super().results(indices), maxlen=0)

    def dismiss(self) -> None:
        """Let the others go."""
        from_first(None, self._group)


class ClipSource:
    """Real clips with captions, encoded like the teacher's videos."""

    def __init__(self, job: SynthesisJob, segments: Sequence[ClipSegment]) -> None:
        self._job, self._segments = job, segments
        self._encoders = Encoders(job, job.pipeline, default_device())
        self._changes = Counter[str]()
        self.negative = self._encoders.negative

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """Encode one clip after another; what was done to each is kept in its facts."""
        for index in indices:
            name = self._segments[index].clip.path.name
            try:
                yield self._encode(index, self._segments[index])
            except UnusableClipError as error:
                log.warning("%s is left out: %s.", name, error.message)
                yield Rejection(index, f"clip {name}", error.message)

    def report(self) -> None:
        """Log how many clips were converted in which way."""
        for change, count in self._changes.most_common():
            log.info("%d clip%s: %s.", count, "s" * (count > 1), change)
        self._encoders.report()

    def _encode(self, index: int, segment: ClipSegment) -> LatentSample:
        clip, wanted = segment.clip, segment.format
        if clip.caption is None:
            raise UnusableClipError(clip.problem)
        if clip.path.suffix.lower() in PICTURE_SUFFIXES:
            converted = read_image(clip.path, wanted)
        else:
            converted = read_clip(clip.path, wanted, segment.start)
        video = from_pixels(converted.pixels)
        latents = self._encoders.vae.encode(video[None])[0]
        reason = find_defect(latents, video)
        if reason is not None:
            raise UnusableClipError(reason)
        if converted.changes:
            log.debug("%s: %s.", clip.path.name, ", ".join(converted.changes))
            self._changes.update(change.partition(" (")[0] for change in converted.changes)
        text = self._encoders.text([clip.caption])[0]
        facts: dict[str, Any] = {"source": clip.path.name, "changes": list(converted.changes)}
        facts |= {"start": segment.start} if segment.start else {}
        own = self._encoders.of_clip(video)
        return self._encoders.sample(index, latents, text, video, facts, own)


class Encoders:
    """Text encoder and VAE of the teacher, and the samples they make for a job."""

    def __init__(self, job: SynthesisJob, folder: Path, device: torch.device) -> None:
        # On a GPU a text encoder of 5 billion weights in fp32 would leave little room for the teacher.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = job.recipe.model
        self._job, self.device = job, device
        self._truncated, self._first_truncated = 0, ""
        self._text = TextEncoder.load(folder, dtype, device, job.recipe.memory.text_encoder)
        self.vae = VideoVAE.load(folder, device, job.recipe.memory.vae)
        check_scale(self.vae.spatial_factor, model.vae_scale)
        self.latent_shape = self.vae.latent_shape(model.frames, model.height, model.width)
        self.negative = self.text([model.negative_prompt])[0].to(job.stored)
        network = read_config(resolve_pipeline(job.teacher)) if model.needs_pictures else None
        takes_clip = network is not None and network.image_dim is not None
        stays = not job.recipe.memory.frees_text_encoder
        clip = PictureEncoder.load(folder, dtype, device, stays=stays) if takes_clip else None
        self._pictures = PictureConditioner(model.pictures, model.frames, self.vae, clip)

    def text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embed captions: (L, D) each, without padding, on the CPU."""
        limit = self._job.recipe.model.max_text_tokens
        padded = self._text.encode(captions, limit).cpu()
        lengths = self._text.tokens(captions)
        for caption, length in zip(captions, lengths, strict=True):
            if length > limit:
                self._truncated += 1
                self._first_truncated = self._first_truncated or caption
        return [text[: min(length, limit)] for text, length in zip(padded, lengths, strict=True)]

    def report(self) -> None:
        """Log how many captions have more tokens than the model reads."""
        if self._truncated:
            log.warning(
                "%d captions have more than %d tokens (model.max_text_tokens); their end is not read. "
                "The first: %s",
                self._truncated, self._job.recipe.model.max_text_tokens, self._first_truncated,
            )  # fmt: skip

    def padded(self, texts: Sequence[Tensor]) -> Condition:
        """Embeddings (L', D) as a condition on the device, zeros after each."""
        limit = self._job.recipe.model.max_text_tokens
        rows = [torch.nn.functional.pad(text.float(), (0, 0, 0, limit - len(text))) for text in texts]
        return Condition(torch.stack(rows)).to(self.device)

    def given(self, pictures: GivenPictures | None, indices: Sequence[int]) -> dict[str, Tensor]:
        """Parts of the conditions of videos that start from pictures, (B, ...) each; none without."""
        if pictures is None:
            return {}
        firsts, lasts = zip(*(pictures.of(index) for index in indices), strict=True)
        return self._pictures(torch.stack(firsts), None if lasts[0] is None else torch.stack(lasts))

    def of_clip(self, video: Tensor) -> dict[str, Tensor]:
        """Parts of the condition under which a model that needs pictures makes this clip (T, 3, H, W)."""
        model = self._job.recipe.model
        if not model.needs_pictures:
            return {}
        conditioner = replace(self._pictures, frames=len(video))  # a bucket has a length of its own
        parts = conditioner(video[:1], video[-1:] if model.pictures == "first-last" else None)
        return {name: part[0] for name, part in parts.items()}

    def sample(
        self,
        index: int,
        latents: Tensor,
        text: Tensor,
        video: Tensor,
        facts: Mapping[str, Any],
        pictures: Mapping[str, Tensor],
    ) -> LatentSample:
        """Make a sample as it is stored, with a preview if the recipe has previews."""
        recipe, stored = self._job.recipe, self._job.stored
        preview = _mp4(video, recipe.model.fps) if recipe.synthesize.previews else None
        facts = {**facts, "fps": recipe.model.fps, "frames": len(video)}
        caption = self._job.captions[index]
        parts = {name: pictures[name].cpu().to(stored) for name in PICTURES if name in pictures}
        return LatentSample(index, caption, latents.cpu().to(stored), text.to(stored), facts, preview, parts)


def attempt_seed(seed: int, index: int, attempt: int) -> int:
    """Seed of a video's n-th attempt; attempts are far apart, so that no two videos share a seed."""
    return seed + index + (attempt << 30)


def _mp4(video: Tensor, fps: int) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "preview.mp4"
        write_mp4(path, to_pixels(video), fps)
        return path.read_bytes()
