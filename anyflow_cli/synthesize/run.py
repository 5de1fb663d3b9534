"""Data sets of latents: teacher videos from prompts, or real clips, as shards.

``run_synthesis`` makes the missing shards of a job. A shard is the unit of everything: of work between
processes (``shard_locks``; they need not talk), of a kill (a process loses its open shard at
most), of repetition (same seeds, same bytes). Whoever completes the last shard writes the manifest.

A video that fails the checks is made again from the next seed of its index, three seeds in all; each failure
stands in the shard's record with its reason. The teacher samples with guidance at N steps, 2 evaluations
each.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width; a
video is (T, 3, height, width) in [0, 1].
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_cli.data.clips import ClipFile
from anyflow_cli.data.shard_index import index_path, write_index
from anyflow_cli.data.shards import (
    MANIFEST,
    NEGATIVE,
    PROVENANCE,
    LatentSample,
    Rejection,
    read_record,
    shard_path,
    write_manifest,
    write_negative,
    write_shard,
)
from anyflow_cli.data.video import (
    ClipFormat,
    UnusableClipError,
    from_pixels,
    read_clip,
    to_pixels,
    write_mp4,
)
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.synthesize.job import SynthesisJob
from anyflow_cli.synthesize.quality_checks import find_defect
from anyflow_cli.synthesize.shard_locks import LOCK_FILE, ShardLocks
from anyflow_cli.utils.distributed import default_device, rank, world_size
from anyflow_cli.utils.files import clear_leftovers, write_json

TRIES = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SynthesisReport:
    """How a data set stands when this process is done with it."""

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
    """Where samples come from."""

    negative: Tensor  # (L, D), not padded

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """The samples of these indices in order, and each candidate that was turned down."""


def run_synthesis(
    job: SynthesisJob, on_progress: Callable[[int], None] = lambda settled: None
) -> SynthesisReport:
    """Make missing shards until none is left that no other process makes.

    ``on_progress`` hears how many videos are settled so far, those of other processes by whole shards.
    """
    if _is_whole(job):
        return _report(job, 0)
    with ShardLocks(job.out, rank(), world_size()) as claims:
        with claims.everything():
            write_json(job.out / PROVENANCE, job.provenance)
        made = _make_missing(job, claims, on_progress)
        with claims.everything():
            report = _report(job, made)
            if report.complete:
                _complete(job)
    if not report.complete:
        log.info("What is missing is being made by other processes, or left for the next start.")
    return report


def _is_whole(job: SynthesisJob) -> bool:
    """Whether a data set lacks nothing."""
    shards = [shard_path(job.out, number) for number in range(len(job.ranges))]
    files = [job.out / MANIFEST, job.out / NEGATIVE, *map(index_path, shards)]
    return all(file.exists() for file in files) and not job.missing()


def _make_missing(job: SynthesisJob, claims: ShardLocks, on_progress: Callable[[int], None]) -> int:
    """Make every missing shard that no other process makes; gives their number."""
    made, wanted = 0, job.videos_left()
    source: SampleSource | None = None
    for number in job.missing():
        path, indices = shard_path(job.out, number), job.ranges[number]
        with claims.shard(number) as is_mine:
            if is_mine and read_record(path) is None:  # another process may have made it meanwhile
                source = source or _source(job)
                clear_leftovers(job.out, path.stem)
                before = wanted - job.videos_left()
                write_shard(path, _watched(source.results(indices), indices, before, on_progress))
                made += 1
    with claims.everything():
        if not (job.out / NEGATIVE).exists():
            write_negative(job.out, (source or _source(job)).negative)
    return made


def _complete(job: SynthesisJob) -> None:
    """Write what a whole data set has: the manifest, and the index of each shard that came without."""
    records = [record for record in job.records() if record is not None]
    for path in (job.out / record.name for record in records):
        if not index_path(path).exists():
            write_index(path)
    write_manifest(job.out, records, job.provenance)
    clear_leftovers(job.out)
    (job.out / LOCK_FILE).unlink(missing_ok=True)


def _report(job: SynthesisJob, made: int) -> SynthesisReport:
    """How the data set stands now."""
    found = job.records()
    records = [record for record in found if record is not None]
    rejected = tuple(entry for record in records for entry in record.rejected)
    samples = sum(record.samples for record in records)
    complete = len(records) == len(found)
    return SynthesisReport(job.out, len(job.captions), samples, len(records), made, complete, rejected)


def _watched(
    results: Iterator[LatentSample | Rejection],
    indices: range,
    before: int,
    on_progress: Callable[[int], None],
) -> Iterator[LatentSample | Rejection]:
    """Pass results on, and tell how many videos are settled: those of earlier shards and these."""
    done = before
    for result in results:
        yield result
        if isinstance(result, LatentSample):
            done = before + result.index - indices.start + 1
            on_progress(done)
    if done < before + len(indices):  # the last ones were given up
        on_progress(before + len(indices))


def _source(job: SynthesisJob) -> SampleSource:
    return TeacherSource(job) if job.clips is None else VideoSource(job, job.clips)


class TeacherSource:
    """Guided samples of the recipe's teacher, one a caption."""

    def __init__(self, job: SynthesisJob) -> None:
        device, folder = default_device(), resolve_pipeline(job.teacher)
        self._job = job
        self._encoders = Encoders(job, folder, device)
        self.negative = self._encoders.negative
        network = load_network(folder, job.stored).to(device)
        if network.config.two_time:
            raise UsageError(
                f"{job.teacher} is an any-step model, not a teacher.",
                "Set synthesize.teacher or model.teacher to a plain Wan pipeline.",
            )
        self._sampler = VideoSampler(
            network, job.recipe.model, self._encoders.latent_shape, method="euler",
            guidance=job.recipe.synthesize.guidance, negative=self._encoders.padded([self.negative])[0],
        )  # fmt: skip

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """Batch by batch; a shard in which nothing passes means that a setting is wrong."""
        passed, reasons = 0, Counter[str]()
        size = self._job.recipe.synthesize.batch_size
        for start in range(indices.start, indices.stop, size):
            for result in self._batch(range(start, min(start + size, indices.stop))):
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

    def _batch(self, indices: range) -> Iterator[LatentSample | Rejection]:
        texts = self._encoders.text([self._job.captions[index] for index in indices])
        made: dict[int, LatentSample] = {}
        for attempt in range(TRIES):
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
        recipe = self._job.recipe
        seeds = [seed_of(recipe.synthesize.seed, index, attempt) for index in indices]
        padded = self._encoders.padded(texts)
        (latents,) = self._sampler.latents(padded, seeds, recipe.synthesize.steps, len(seeds))
        videos = self._encoders.vae.decode(latents)
        for index, seed, text, x, video in zip(indices, seeds, texts, latents, videos, strict=True):
            reason = find_defect(x, video)
            if reason is None:
                facts = {"seed": seed, "source": "teacher"}
                yield self._encoders.sample(index, x, text, video, facts)
            else:
                what = "given up" if attempt + 1 == TRIES else "the next seed follows"
                log.warning("Video %d from seed %d is %s; %s.", index, seed, reason, what)
                yield Rejection(index, f"seed {seed}", reason)


class VideoSource:
    """Real clips with captions, encoded as the teacher's videos would be."""

    def __init__(self, job: SynthesisJob, clips: Sequence[ClipFile]) -> None:
        model = job.recipe.model
        self._job, self._clips = job, clips
        self._format = ClipFormat(model.frames, model.fps, model.height, model.width)
        self._encoders = Encoders(job, resolve_pipeline(job.teacher), default_device())
        self.negative = self._encoders.negative

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        """One clip after another; what was done to each is said, and kept in its facts."""
        for index in indices:
            clip = self._clips[index]
            try:
                yield self._encoded(index, clip)
            except UnusableClipError as error:
                log.warning("%s is left out: %s.", clip.path.name, error.message)
                yield Rejection(index, f"clip {clip.path.name}", error.message)

    def _encoded(self, index: int, clip: ClipFile) -> LatentSample:
        if clip.caption is None:
            raise UnusableClipError(
                "no caption: neither a text file beside it nor a row in captions.csv or .jsonl"
            )
        fitted = read_clip(clip.path, self._format)
        if fitted.changes:
            log.info("%s: %s.", clip.path.name, ", ".join(fitted.changes))
        video = from_pixels(fitted.pixels)
        latents = self._encoders.vae.encode(video[None])[0]
        reason = find_defect(latents, video)
        if reason is not None:
            raise UnusableClipError(reason)
        text = self._encoders.text([clip.caption])[0]
        facts = {"source": clip.path.name, "changes": list(fitted.changes)}
        return self._encoders.sample(index, latents, text, video, facts)


class Encoders:
    """Text encoder and VAE of the teacher's folder, and the samples they make for a job."""

    def __init__(self, job: SynthesisJob, folder: Path, device: torch.device) -> None:
        # On a GPU a text encoder of 5 billion weights in fp32 would leave little room for the teacher.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = job.recipe.model
        self._job, self._device = job, device
        self._has_said_cut = False
        self._text = TextEncoder.load(folder, dtype, device)
        self.vae = VideoVAE.load(folder, device)
        self.latent_shape = self.vae.latent_shape(model.frames, model.height, model.width)
        self.negative = self.text([model.negative_prompt])[0].to(job.stored)

    def text(self, captions: Sequence[str]) -> list[Tensor]:
        """An embedding (L, D) for each caption, without padding, on the CPU."""
        limit = self._job.recipe.model.max_text_tokens
        padded = self._text.encode(captions, limit).cpu()
        lengths = self._text.tokens(captions)
        self._say_cut(captions, lengths)
        return [text[: min(length, limit)] for text, length in zip(padded, lengths, strict=True)]

    def _say_cut(self, captions: Sequence[str], lengths: Sequence[int]) -> None:
        """Warn of the first caption that is longer than the model reads; a line for each would be many."""
        limit = self._job.recipe.model.max_text_tokens
        cut = [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]
        if cut and not self._has_said_cut:
            self._has_said_cut = True
            log.warning(
                "Captions are read up to model.max_text_tokens (%d); this one is longer: %s", limit, cut[0]
            )

    def padded(self, texts: Sequence[Tensor]) -> Tensor:
        """Embeddings (L', D) -> (B, L, D) on the device, zeros after each."""
        limit = self._job.recipe.model.max_text_tokens
        rows = [torch.nn.functional.pad(text.float(), (0, 0, 0, limit - len(text))) for text in texts]
        return torch.stack(rows).to(self._device)

    def sample(
        self, index: int, latents: Tensor, text: Tensor, video: Tensor, facts: Mapping[str, Any]
    ) -> LatentSample:
        """Make a sample as it is stored, with a preview if the recipe wants one."""
        recipe, stored = self._job.recipe, self._job.stored
        preview = _mp4(video, recipe.model.fps) if recipe.synthesize.previews else None
        facts = {**facts, "fps": recipe.model.fps, "frames": recipe.model.frames}
        caption = self._job.captions[index]
        return LatentSample(index, caption, latents.cpu().to(stored), text.to(stored), facts, preview)


def seed_of(seed: int, index: int, attempt: int) -> int:
    """Seed of a video's n-th attempt; attempts are far apart, so that no two videos share a seed."""
    return seed + index + (attempt << 30)


def _mp4(video: Tensor, fps: int) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "preview.mp4"
        write_mp4(path, to_pixels(video), fps)
        return path.read_bytes()
