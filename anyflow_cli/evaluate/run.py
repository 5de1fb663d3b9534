"""``evaluate``: a suite's videos by a model at each number of steps, and by its teacher, made and scored.

Every variant has a directory under ``runs/<recipe>/evaluate``; what lies there complete is not made again,
whether from a run that was killed or from an earlier model's. A model is loaded only if videos are missing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np

from anyflow_cli.addresses import Choice
from anyflow_cli.data.clips import write_mp4
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.protocol import Item, Protocol, Subject, Variant, card, subject, variant
from anyflow_cli.evaluate.results import Evaluation, Measured
from anyflow_cli.evaluate.store import VIDEOS, Scored, Store
from anyflow_cli.evaluate.suite import Video, summarise
from anyflow_cli.evaluate.trend import Doubles, interval, totals, trend
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.sample import Sampler

log = logging.getLogger(__name__)

Advance = Callable[[int], None]  # called with the number of videos finished so far


class Generator(Interface):
    """What makes videos; ``sample.Sampler`` is one."""

    @property
    def latency(self) -> tuple[float, float]:
        """Seconds a video in the network and in the decoder, of the last sampling."""
        ...

    def begin(self, frames: Video) -> None:
        """Let the videos that follow begin with frames (B, T, H, W, 3), each with its own."""
        ...

    def videos(self, prompts: Sequence[str], seeds: Sequence[int], nfe: int, batch: int) -> Iterator[Video]:
        """Videos (T, H, W, 3) in the order of the prompts."""
        ...


Open = Callable[[Subject, Recipe], Generator]


@dataclass(frozen=True)
class Job:
    """What is to be evaluated, looked at but not loaded."""

    recipe: Recipe
    protocol: Protocol
    variants: tuple[Variant, ...]
    out: Path

    @property
    def videos(self) -> int:
        """How many there are to be in all."""
        return len(self.protocol.items) * len(self.variants)

    def store(self, one: Variant) -> Store:
        """Where its videos and scores lie."""
        return Store(self.out / one.key)

    def missing(self, one: Variant) -> list[Item]:
        """Its videos that are still to be made."""
        done = self.store(one).read()
        return [item for item in self.protocol.items if (item.prompt, item.seed) not in done]


def prepare(recipe: Recipe, protocol: Protocol, choice: Choice, out: Path) -> Job:
    """Settle the variants: the model at each of the recipe's step counts, then its teacher at its own."""
    protocol.suite.check(recipe.model)
    of = subject(choice, recipe)
    conditioned = recipe.evaluate.task == "i2v"
    if conditioned and of.partition is None:
        raise UsageError(
            f"{choice.address} is bidirectional: it makes all frames at once and begins with no picture.",
            "Give a causal (FAR) model with --model, or leave --task i2v out.",
        )
    variants = [variant(of, steps, protocol, recipe) for steps in dict.fromkeys(recipe.evaluate.nfe)]
    if conditioned and recipe.evaluate.teacher:
        log.info("No teacher beside it: %s takes text alone.", recipe.model.teacher)
    elif recipe.evaluate.teacher:
        teacher = subject(Choice(recipe.model.teacher, f"the teacher of recipe {recipe.name}"), recipe)
        beside = variant(teacher, recipe.sample.teacher_steps, protocol, recipe, reference=True)
        variants += [beside] if beside.key not in {one.key for one in variants} else []
    return Job(recipe, protocol, tuple(variants), out)


def evaluate(job: Job, open_model: Open | None = None, advance: Advance = lambda done: None) -> Evaluation:
    """Make what is missing, then sum up."""
    _make(job, open_model or _open, advance)
    stored = [job.store(one).read() for one in job.variants]
    items = job.protocol.items
    records = [[done[item.prompt, item.seed] for item in items] for done in stored]
    draws = [_draws(job, scored) for scored in records]
    measured = tuple(
        _measured(job, one, scored, drawn)
        for one, scored, drawn in zip(job.variants, records, draws, strict=True)
    )
    by_steps = {
        m.steps: (m.result.total, drawn)
        for m, drawn in zip(measured, draws, strict=True)
        if not m.reference and m.result.total is not None and drawn is not None
    }
    return Evaluation(
        card=card(job.protocol, job.variants, job.recipe),
        measured=measured,
        trend=trend(by_steps),
        prompts=job.protocol.prompts,
    )


def _make(job: Job, open_model: Open, advance: Advance) -> None:
    """Sample and score every missing video, one model at a time."""
    done = job.videos - sum(len(job.missing(one)) for one in job.variants)
    if done:
        log.info("%d of %d videos are there already.", done, job.videos)
    advance(done)
    opened: tuple[Subject, Generator] | None = None
    for one in job.variants:
        with job.store(one).locked():
            items = job.missing(one)  # again, now that nobody else writes
            if items and (opened is None or opened[0] is not one.subject):
                log.info("Loading %s, %s.", one.subject.address, one.subject.why)
                opened = (one.subject, open_model(one.subject, job.recipe))
            for start in range(0, len(items), job.recipe.evaluate.batch):
                assert opened is not None
                part = items[start : start + job.recipe.evaluate.batch]
                job.store(one).append(_scored(job, one, opened[1], part))
                done += len(part)
                advance(done)


def _scored(job: Job, one: Variant, generator: Generator, items: Sequence[Item]) -> list[Scored]:
    """One batch: sample, keep as mp4, score from the raw pixels."""
    prompts = [item.prompt for item in items]
    images = job.protocol.suite.images(prompts, [item.seed for item in items])
    if images is not None:
        generator.begin(np.stack(images)[:, None])
    videos = list(generator.videos(prompts, [item.seed for item in items], one.steps, len(items)))
    network, decode = generator.latency
    files = [_file(item) for item in items]
    for file, video in zip(files, videos, strict=True):
        write_mp4(job.store(one).directory / file, video, job.recipe.model.fps)
    scores = job.protocol.suite.score(videos, prompts, images)
    return [
        Scored(item.prompt, item.seed, file, network, decode, len(items), score)
        for item, file, score in zip(items, files, scores, strict=True)
    ]


def _file(item: Item) -> str:
    """A name made of a hash: a prompt is data and names no path."""
    return f"{VIDEOS}/{hashlib.sha256(item.prompt.encode()).hexdigest()[:12]}-{item.seed}.mp4"


def _draws(job: Job, scored: Sequence[Scored]) -> Doubles | None:
    numbers = [item.number for item in job.protocol.items]
    return totals(job.protocol.suite, [record.score for record in scored], numbers)


def _measured(job: Job, one: Variant, scored: Sequence[Scored], draws: Doubles | None) -> Measured:
    return Measured(
        key=one.key,
        label=one.label,
        guided=one.subject.teacher,
        reference=one.reference,
        address=one.subject.address,
        steps=one.steps,
        evaluations=one.evaluations,
        result=summarise(job.protocol.suite, [record.score for record in scored]),
        interval=None if draws is None else interval(draws),
        network_seconds=float(np.median([record.network for record in scored])),
        decode_seconds=float(np.median([record.decode for record in scored])),
        batch=scored[0].batch,
        directory=job.store(one).directory,
        scored=tuple(scored),
    )


def _open(of: Subject, recipe: Recipe) -> Generator:
    return Sampler.load(of.address, recipe, teacher=of.teacher)
