"""Sampling and scoring of the videos an evaluation lacks, by one process or several.

Videos are assigned to processes by their position in the protocol, so processes need no communication: each
appends to a records file of its own, and the first one waits until all videos are there. Processes that share
each video (``launch.context_parallel``) are assigned videos as a group, whose first process looks at what is
missing, writes and scores. Videos finished before a kill are kept; damaged ones are detected by size and hash
and sampled again.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.protocol import EvaluatedModel, Protocol, Variant, VideoRequest
from anyflow_cli.evaluate.store import VariantStore, VideoRecord, size_and_digest, video_name
from anyflow_cli.evaluate.suite import VideoPixels
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.sample.shares import ALL_VIDEOS, VideoShare

OnProgress = Callable[[int], None]  # called with the number of finished videos

POLL_SECONDS = 2.0  # between looks at what other processes have finished
STALL_SECONDS = 1800.0  # without a new video, after which other processes count as lost
BITS_PER_PIXEL = 0.25  # of an mp4 at preview quality, to estimate sizes before there are any

log = logging.getLogger(__name__)


class VideoGenerator(Interface):
    """A source of videos, such as ``VideoSampler``."""

    @property
    def latency(self) -> tuple[float, float]:
        """Mean seconds per video of the last call: in the network, and in the decoder."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts before they are sampled."""
        ...

    def condition_on(self, frames: VideoPixels) -> None:
        """Start the next videos with given frames (B, T, H, W, 3), one set per video."""
        ...

    def videos(
        self, prompts: Sequence[str], seeds: Sequence[int], nfe: int, batch: int
    ) -> Iterator[VideoPixels]:
        """Sample a video (T, H, W, 3) for each prompt, in order."""
        ...


OpenModel = Callable[[EvaluatedModel, Recipe], VideoGenerator]


@dataclass(frozen=True)
class EvaluationJob:
    """An evaluation whose models are described but not loaded.

    Attributes:
        recipe: Recipe with the sizes and settings of sampling.
        protocol: Prompts, seeds and suite.
        variants: Models and step counts.
        out: Directory of the evaluation.
        external: Files generated elsewhere, which are scored instead of sampling any.
    """

    recipe: Recipe
    protocol: Protocol
    variants: tuple[Variant, ...]
    out: Path
    external: Mapping[VideoRequest, Path] | None = None

    @property
    def videos(self) -> int:
        """Number of videos in all."""
        return len(self.protocol.requests) * len(self.variants)

    @property
    def partition(self) -> tuple[int, ...] | None:
        """Chunks of the evaluated model, by which its teacher is scored too."""
        return self.variants[0].model.partition

    def store(self, one: Variant) -> VariantStore:
        """The directory of a variant."""
        return VariantStore(self.out / one.key)

    def path(self, one: Variant, request: VideoRequest) -> Path:
        """The file of a video; never taken from a record."""
        if self.external is not None:
            return self.external[request]
        return self.out / one.key / video_name(request)

    def finished(self, one: Variant) -> dict[VideoRequest, VideoRecord]:
        """Records of the videos of a variant whose files are there, at the recorded size."""
        records = self.store(one).records()
        found = {}
        for request in self.protocol.requests:
            record, path = records.get((request.prompt, request.seed)), self.path(one, request)
            if record is not None and path.is_file() and path.stat().st_size == record.size:
                found[request] = record
        return found

    def missing(self, one: Variant, share: VideoShare = ALL_VIDEOS) -> list[VideoRequest]:
        """Videos of a variant that this process has to sample."""
        done = self.finished(one)
        return [request for request in share.own(self.protocol.requests) if request not in done]

    def done(self) -> int:
        """Number of finished videos, by any process."""
        return sum(len(self.finished(one)) for one in self.variants)


def generate_videos(
    job: EvaluationJob,
    open_model: OpenModel,
    on_progress: OnProgress,
    share: VideoShare = ALL_VIDEOS,
) -> None:
    """Sample and score this process's missing videos, one model at a time."""
    for one in job.variants:
        job.store(one).create(one)
    if share.writes:
        _remove_damaged(job, share)
    missing = share.agreed([job.missing(one, share) for one in job.variants])
    counter = _ProgressCounter(job, on_progress, share)
    opened: tuple[EvaluatedModel, VideoGenerator] | None = None
    batch_size = job.recipe.evaluate.batch_size
    for one, requests in zip(job.variants, missing, strict=True):
        if requests and (opened is None or opened[0] is not one.model):
            log.info("Loading %s (%s).", one.model.address, one.model.reason)
            opened = (one.model, open_model(one.model, job.recipe))
        if opened is not None:
            opened[1].encode_prompts([request.prompt for request in requests])
        for start in range(0, len(requests), batch_size):
            assert opened is not None
            batch = requests[start : start + batch_size]
            for record in _sampled(job, one, opened[1], batch, writes=share.writes):
                job.store(one).append(record, share.group)
            counter.add(len(batch))


def wait_for_others(job: EvaluationJob, on_progress: OnProgress) -> None:
    """Return once all videos are there, whichever process samples them."""
    done, since = job.done(), time.monotonic()
    while done < job.videos:
        if time.monotonic() - since > STALL_SECONDS:
            raise AnyflowError(
                f"{job.videos - done} videos of other processes are missing, and none was finished in the "
                f"last {STALL_SECONDS / 60:.0f} minutes.",
                "Check the output of the other processes, and start the same command again.",
            )
        time.sleep(POLL_SECONDS)
        now = job.done()
        if now > done:
            done, since = now, time.monotonic()
            on_progress(done)


class _ProgressCounter:
    """Counts finished videos: this process's at once, those of others every few seconds."""

    def __init__(self, job: EvaluationJob, on_progress: OnProgress, share: VideoShare) -> None:
        self._job, self._on_progress, self._several = job, on_progress, share.groups > 1
        self._done, self._polled = job.done(), time.monotonic()
        on_progress(self._done)

    def add(self, videos: int) -> None:
        self._done += videos
        if self._several and time.monotonic() - self._polled > POLL_SECONDS:
            self._done, self._polled = self._job.done(), time.monotonic()
        self._on_progress(self._done)


def _remove_damaged(job: EvaluationJob, share: VideoShare) -> None:
    """Delete this process's videos that differ from their record, so that they are sampled again."""
    damaged = 0
    for one in job.variants:
        store = job.store(one)
        store.drop_partial_line(share.group)
        records = store.records()
        for request in share.own(job.protocol.requests):
            record, path = records.get((request.prompt, request.seed)), job.path(one, request)
            is_whole = record and path.is_file() and size_and_digest(path) == (record.size, record.digest)
            if record and not is_whole:
                store.remove_video(request)
                damaged += 1
    if damaged:
        log.warning("%d damaged video%s will be sampled again.", damaged, "s" * (damaged > 1))


def _sampled(
    job: EvaluationJob,
    one: Variant,
    generator: VideoGenerator,
    requests: Sequence[VideoRequest],
    *,
    writes: bool,
) -> Iterator[VideoRecord]:
    """Sample one batch, then write each video as mp4 and score it from its pixels, if this process does."""
    suite = job.protocol.suite
    prompts, seeds = [request.prompt for request in requests], [request.seed for request in requests]
    images = suite.images(prompts, seeds)
    if images is not None:
        generator.condition_on(np.stack(images)[:, None])
    videos = list(generator.videos(prompts, seeds, one.steps, len(requests)))
    if not writes:
        return
    network, decode = generator.latency
    scores = suite.score(videos, prompts, images)
    for request, video, score in zip(requests, videos, scores, strict=True):
        path = job.path(one, request)
        write_mp4(path, video, job.recipe.model.fps)
        yield VideoRecord(
            request.prompt,
            request.seed,
            video_name(request),
            *size_and_digest(path),
            network=network,
            decode=decode,
            batch=len(requests),
            score=score,
            made=time.time(),
        )


# -- what is left to do --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationCost:
    """Videos still to sample, their bytes, and their seconds if finished videos allow an estimate."""

    videos: int
    size: float
    seconds: float | None


def remaining_cost(job: EvaluationJob, processes: int = 1) -> EvaluationCost:
    """Estimate disk space and time of the missing videos from the finished ones."""
    missing = {one.key: len(job.missing(one)) for one in job.variants}
    records = {one.key: list(job.store(one).records().values()) for one in job.variants}
    sizes = [float(record.size) for known in records.values() for record in known]
    model, total = job.recipe.model, sum(missing.values())
    guess = model.frames * model.height * model.width * BITS_PER_PIXEL / 8
    seconds = [missing[one.key] * _seconds_per_video(one, job.variants, records) for one in job.variants]
    return EvaluationCost(
        videos=total,
        size=total * float(np.mean(sizes or [guess])),
        seconds=sum(seconds) / processes if sizes else None,
    )


def _seconds_per_video(
    one: Variant, variants: Sequence[Variant], records: Mapping[str, list[VideoRecord]]
) -> float:
    """Median of the variant's own records, else another variant's scaled by network evaluations."""
    like = next((other for other in (one, *variants) if records[other.key]), None)
    if like is None:
        return 0.0
    network, decode = (
        float(np.median([getattr(record, part) for record in records[like.key]]))
        for part in ("network", "decode")
    )
    return network * one.evaluations / like.evaluations + decode


def check_free_space(out: Path, needed: float) -> None:
    """Raise a UsageError if the disk has less than ``needed`` bytes free."""
    place = next(path for path in (out, *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"The videos need about {needed / 1e6:.0f} MB, but {place} has {free / 1e6:.0f} MB free.",
            "Free space, use another --out, or evaluate fewer prompts with --limit.",
        )
