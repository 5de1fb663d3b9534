"""``run_evaluation``: sample and score a suite with a model at each step count, and with its teacher.

Every variant has a directory under ``runs/<recipe>/evaluate``; what lies there complete is not made again,
whether from a run that was killed or from an earlier model's. A model is loaded only if videos are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.bootstrap import Doubles, interval, totals, trend
from anyflow_cli.evaluate.external_videos import score_external_videos
from anyflow_cli.evaluate.generate import (
    ALONE,
    Advance,
    EvaluationJob,
    Generator,
    Open,
    WorkShare,
    alone_in,
    make_videos,
    wait_for_others,
)
from anyflow_cli.evaluate.per_chunk import chunk_curves
from anyflow_cli.evaluate.protocol import Protocol, Subject, Variant, card, subject, variant
from anyflow_cli.evaluate.results import Evaluation, Measured
from anyflow_cli.evaluate.store import Scored
from anyflow_cli.evaluate.suite import Assessment, SuiteClip, VideoScore, result_of
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.open import ModelChoice
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.utils.distributed import default_device

log = logging.getLogger(__name__)


def prepare_evaluation(recipe: Recipe, protocol: Protocol, choice: ModelChoice, out: Path) -> EvaluationJob:
    """Settle the variants: the model at each of the recipe's step counts, then its teacher at its own."""
    protocol.suite.check(recipe.model)
    of = subject(choice, recipe, recipe.evaluate.sampler)
    conditioned = "i2v" in protocol.suite.groups
    if conditioned and of.partition is None:
        raise UsageError(
            f"{choice.address} is bidirectional: it makes all frames at once and begins with no picture.",
            "Give a causal (FAR) model with --model, or leave --task i2v out.",
        )
    variants = [variant(of, steps, protocol, recipe) for steps in dict.fromkeys(recipe.evaluate.nfe)]
    if conditioned and recipe.evaluate.teacher:
        log.info("No teacher beside it: %s takes text alone.", recipe.model.teacher)
    elif recipe.evaluate.teacher:
        teacher = subject(ModelChoice(recipe.model.teacher, f"the teacher of recipe {recipe.name}"), recipe)
        beside = variant(teacher, recipe.sample.teacher_steps, protocol, recipe, reference=True)
        variants += [beside] if beside.key not in {one.key for one in variants} else []
    return EvaluationJob(recipe, protocol, tuple(variants), out)


def run_evaluation(
    job: EvaluationJob,
    open_model: Open | None = None,
    advance: Advance = lambda done: None,
    share: WorkShare = ALONE,
) -> Evaluation:
    """Make what is missing, then sum up; of several processes the others call ``help_make``."""
    with alone_in(job.out):
        if job.given is not None:
            score_external_videos(job)
        else:
            make_videos(job, open_model or _open, advance, share)
            wait_for_others(job, advance)
        return _summed(job)


def help_make(job: EvaluationJob, share: WorkShare, open_model: Open | None = None) -> None:
    """Make this process's share of the videos, for the first one to sum up."""
    make_videos(job, open_model or _open, lambda done: None, share)


def _summed(job: EvaluationJob) -> Evaluation:
    judged = [_judged(job, one) for one in job.variants]
    draws = [_draws(job, assessment.scores) for _, assessment in judged]
    measured = tuple(
        _measured(job, one, scored, assessment, drawn)
        for one, (scored, assessment), drawn in zip(job.variants, judged, draws, strict=True)
    )
    by_steps = {
        m.steps: (m.result.total, drawn)
        for m, drawn in zip(measured, draws, strict=True)
        if not m.reference and m.result.total is not None and drawn is not None
    }
    return Evaluation(
        card=card(job.protocol, job.variants, job.recipe, [assessment for _, assessment in judged]),
        measured=measured,
        trend=trend(by_steps),
        prompts=job.protocol.prompts,
        partition=job.partition,
    )


def _judged(job: EvaluationJob, one: Variant) -> tuple[list[Scored], Assessment]:
    """The suite's word on all videos of a variant, and their records with the scores it gave."""
    store, items = job.store(one), job.protocol.items
    done = store.read()
    records = [done[item.prompt, item.seed] for item in items]
    clips = [
        SuiteClip(item.number, store.directory / record.file, record.score)
        for item, record in zip(items, records, strict=True)
    ]
    assessment = job.protocol.suite.assess(clips, store.directory)
    pairs = zip(records, assessment.scores, strict=True)
    judged = [replace(record, score=score) for record, score in pairs]
    for record, before in zip(judged, records, strict=True):
        if record != before:  # what a suite says of finished files is for later comparisons too
            store.append(replace(record, made=time.time()))
    return judged, assessment


def _draws(job: EvaluationJob, scores: Sequence[VideoScore]) -> Doubles | None:
    return totals(job.protocol.suite, scores, [item.number for item in job.protocol.items])


def _measured(
    job: EvaluationJob, one: Variant, scored: Sequence[Scored], assessment: Assessment, draws: Doubles | None
) -> Measured:
    return Measured(
        key=one.key,
        label=one.label,
        guided=one.subject.teacher,
        reference=one.reference,
        address=one.subject.address,
        steps=one.steps,
        evaluations=one.evaluations,
        result=result_of(job.protocol.suite, assessment),
        interval=None if draws is None else interval(draws),
        network_seconds=float(np.median([record.network for record in scored])),
        decode_seconds=float(np.median([record.decode for record in scored])),
        batch=scored[0].batch,
        directory=job.store(one).directory,
        scored=tuple(scored),
        along=chunk_curves(job.protocol.suite, [record.score for record in scored], job.partition),
    )


def _open(of: Subject, recipe: Recipe) -> Generator:
    return VideoSampler.load(
        of.address, recipe, teacher=of.teacher, method=of.sampler, device=default_device()
    )
