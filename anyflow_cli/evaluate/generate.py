"""The making of an evaluation's videos: those that are missing, by one process or by several.

Items are dealt out by their place in the protocol, so processes need not talk: each writes a file of scores
of its own, and the first one waits until every video is there. What a process finished before it was killed
stays; damaged files are found by size and hash and are made again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.protocol import Item, Protocol, Subject, Variant
from anyflow_cli.evaluate.store import VIDEOS, Scored, Store, digest_of
from anyflow_cli.evaluate.suite import VideoPixels
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.distributed import rank, world_size

Advance = Callable[[int], None]  # called with the number of videos finished so far

LOCK = ".lock"
LOOK_EVERY = 2.0  # seconds between looks at what other processes have finished
PATIENCE = 1800.0  # seconds without a new video after which other processes count as lost

log = logging.getLogger(__name__)


class Generator(Interface):
    """A source of videos, such as ``VideoSampler``."""

    @property
    def latency(self) -> tuple[float, float]:
        """Mean seconds per video of the last call: in the network, and in the decoder."""
        ...

    def condition_on(self, frames: VideoPixels) -> None:
        """Start the next videos with given frames (B, T, H, W, 3), one set per video."""
        ...

    def videos(
        self, prompts: Sequence[str], seeds: Sequence[int], nfe: int, batch: int
    ) -> Iterator[VideoPixels]:
        """Videos (T, H, W, 3) in the order of the prompts."""
        ...


Open = Callable[[Subject, Recipe], Generator]


@dataclass(frozen=True)
class WorkShare:
    """Which of several processes this is."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of_process(cls) -> WorkShare:
        """As torchrun, accelerate launch or plain RANK and WORLD_SIZE say."""
        return cls(rank(), world_size())


ALONE = WorkShare()


@dataclass(frozen=True)
class EvaluationJob:
    """What is to be evaluated, looked at but not loaded."""

    recipe: Recipe
    protocol: Protocol
    variants: tuple[Variant, ...]
    out: Path
    given: Mapping[Item, Path] | None = None  # files made elsewhere; nothing is sampled then

    @property
    def videos(self) -> int:
        """How many there are to be in all."""
        return len(self.protocol.items) * len(self.variants)

    @property
    def partition(self) -> tuple[int, ...] | None:
        """Chunks of the model in question; its teacher's videos are told by the same ones."""
        return self.variants[0].subject.partition

    def store(self, one: Variant) -> Store:
        """Where its videos and scores lie."""
        return Store(self.out / one.key)

    def missing(self, one: Variant, share: WorkShare = ALONE) -> list[Item]:
        """Its videos that are still to be made, by this process."""
        done = self.store(one).read()
        mine = self.protocol.items[share.rank :: share.world]
        return [item for item in mine if (item.prompt, item.seed) not in done]

    def done(self) -> int:
        """How many videos are finished, whoever made them."""
        return self.videos - sum(len(self.missing(one)) for one in self.variants)


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep a second evaluation out of a directory."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"Another evaluation is running in {out}.", "Wait for it to end, or use another --out."
            ) from error
        yield


def make_videos(job: EvaluationJob, open_model: Open, advance: Advance, share: WorkShare = ALONE) -> None:
    """Sample and score this process's missing videos, one model at a time."""
    _drop_damaged(job, share)
    tally = _Tally(job, advance, share)
    opened: tuple[Subject, Generator] | None = None
    for one in job.variants:
        items = job.missing(one, share)
        if items and (opened is None or opened[0] is not one.subject):
            log.info("Loading %s, %s.", one.subject.address, one.subject.why)
            opened = (one.subject, open_model(one.subject, job.recipe))
        for start in range(0, len(items), job.recipe.evaluate.batch_size):
            assert opened is not None
            part = items[start : start + job.recipe.evaluate.batch_size]
            for record in _scored(job, one, opened[1], part):
                job.store(one).append(record, share.rank)
            tally.count(len(part))


def wait_for_others(job: EvaluationJob, advance: Advance) -> None:
    """Return when every video is there, whoever makes it."""
    done, since = job.done(), time.monotonic()
    while done < job.videos:
        if time.monotonic() - since > PATIENCE:
            raise AnyflowError(
                f"{job.videos - done} videos of other processes are missing, and none has come for "
                f"{PATIENCE / 60:.0f} minutes.",
                "See what the other processes said, and start the same command again.",
            )
        time.sleep(LOOK_EVERY)
        now = job.done()
        if now > done:
            done, since = now, time.monotonic()
            advance(done)


class _Tally:
    """Counts finished videos: its own as they come, those of other processes now and then."""

    def __init__(self, job: EvaluationJob, advance: Advance, share: WorkShare) -> None:
        self._job, self._advance, self._several = job, advance, share.world > 1
        self._done, self._looked = job.done(), time.monotonic()
        advance(self._done)

    def count(self, videos: int) -> None:
        self._done += videos
        if self._several and time.monotonic() - self._looked > LOOK_EVERY:
            self._done, self._looked = self._job.done(), time.monotonic()
        self._advance(self._done)


def _drop_damaged(job: EvaluationJob, share: WorkShare) -> None:
    """Remove files of this process's share that are not as they were written, so that they are made again."""
    damaged = 0
    for one in job.variants:
        store = job.store(one)
        store.mend(share.rank)
        done = store.records()
        for item in job.protocol.items[share.rank :: share.world]:
            record = done.get((item.prompt, item.seed))
            if record and not store.is_whole(record):
                (store.directory / record.file).unlink(missing_ok=True)
                damaged += 1
    if damaged:
        many = "s are" if damaged > 1 else " is"
        log.warning("%d video%s not as written any more and will be made again.", damaged, many)


def _scored(
    job: EvaluationJob, one: Variant, generator: Generator, items: Sequence[Item]
) -> Iterator[Scored]:
    """One batch: sample; then, one by one, keep as mp4 and score from the raw pixels."""
    suite, store = job.protocol.suite, job.store(one)
    prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
    images = suite.images(prompts, seeds)
    if images is not None:
        generator.condition_on(np.stack(images)[:, None])
    videos = list(generator.videos(prompts, seeds, one.steps, len(items)))
    network, decode = generator.latency
    scores = suite.score(videos, prompts, images)
    for item, video, score in zip(items, videos, scores, strict=True):
        path = store.directory / file_of(item)
        write_mp4(path, video, job.recipe.model.fps)
        size, digest = digest_of(path)
        yield Scored(
            item.prompt,
            item.seed,
            file_of(item),
            size,
            digest,
            network,
            decode,
            len(items),
            score,
            time.time(),
        )


def file_of(item: Item) -> str:
    """A name made of a hash: a prompt is data and names no path."""
    return f"{VIDEOS}/{hashlib.sha256(item.prompt.encode()).hexdigest()[:12]}-{item.seed}.mp4"
