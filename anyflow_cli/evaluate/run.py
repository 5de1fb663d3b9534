"""Running an evaluation: a model at each step count, beside its teacher, then scores, reports and verdicts.

Each variant has a directory below ``runs/<recipe>/evaluate``. What is complete there is not generated again,
whether from an interrupted run or from an earlier model; a model is loaded only if videos are missing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.bootstrap import Draws, draw_totals, interval, trend
from anyflow_cli.evaluate.compare import Comparison, compare, is_finished, read_side, side_of
from anyflow_cli.evaluate.diffusers_pipeline import FoundPipeline, PipelineVideos, prepare_pipeline
from anyflow_cli.evaluate.external_videos import prepare_external, score_external_videos
from anyflow_cli.evaluate.generate import (
    EvaluationJob,
    OnProgress,
    OpenModel,
    VideoGenerator,
    check_free_space,
    generate_videos,
    remaining_cost,
    wait_for_others,
)
from anyflow_cli.evaluate.per_chunk import chunk_curves
from anyflow_cli.evaluate.protocol import (
    EvaluatedModel,
    Protocol,
    Variant,
    evaluated_model,
    protocol_card,
    sampling_note,
    variant,
)
from anyflow_cli.evaluate.registry import ProtocolOutline, outline, protocol_for, suite_resources
from anyflow_cli.evaluate.results import Evaluation, Measured
from anyflow_cli.evaluate.store import (
    EvaluationDirectory,
    OtherVariants,
    VideoRecord,
    other_variants,
    remove_variants,
)
from anyflow_cli.evaluate.suite import Assessment, SuiteClip, result_of
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.open import ModelChoice
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.runs.resources import TEACHER_METHODS, Given, Resource, find_model, inputs
from anyflow_cli.sample.presets import SamplerPreset
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.sample.shares import ALL_VIDEOS, VideoShare
from anyflow_cli.utils.distributed import default_device
from anyflow_cli.utils.run_lock import RunLock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationRequest:
    """Options of an evaluation.

    Attributes:
        recipe: The recipe with its overrides.
        paths: Directories of the recipe.
        model: Address of the model; None for the furthest one trained.
        videos: Directory of videos to score instead of sampling any.
        prompts: File of the user's own prompts.
        limit: Only so many prompts.
        out: Directory of the evaluation, if not the recipe's.
        preset: Published system that the model is sampled as.
        pipeline: Pipeline of diffusers to sample with, instead of a model.
    """

    recipe: Recipe
    paths: RunPaths
    model: str | None = None
    videos: Path | None = None
    prompts: Path | None = None
    limit: int | None = None
    out: Path | None = None
    preset: SamplerPreset | None = None
    pipeline: FoundPipeline | None = None

    @property
    def directory(self) -> Path:
        """Directory of the evaluation."""
        return self.out or self.paths.evaluate

    @property
    def choice(self) -> ModelChoice | None:
        """The model; None where videos are scored."""
        if self.pipeline is not None:
            return ModelChoice(str(self.pipeline.folder), f"{self.pipeline.name}, given with --pipeline")
        return find_model(self.recipe, self.paths, self.model) if self.videos is None else None

    def check(self) -> ProtocolOutline:
        """Check options and directory without loading anything; return the size of the protocol."""
        EvaluationDirectory(self.directory).check()
        if self.preset is not None:
            self.preset.check_request(self.recipe.model.frames, self.recipe.evaluate.nfe)
        return outline(self.recipe, self.prompts, self.limit)

    def resources(self) -> list[Resource]:
        """Everything the evaluation reads before it starts."""
        suite = suite_resources(self.recipe)
        if self.pipeline is not None:
            return [*suite, Resource("pipeline", str(self.pipeline.folder), "ready")]
        guided = self.recipe.evaluate.sampler in TEACHER_METHODS and self.preset is None
        given = Given(self.model, self.videos, guided=guided)
        return [*suite, *inputs(self.recipe, self.paths, "evaluate", given)]

    def protocol(self) -> Protocol:
        """Prompts, seeds and suite."""
        return protocol_for(self.recipe, self.prompts, self.limit)

    def job(self) -> EvaluationJob:
        """The evaluation with its models described."""
        choice, protocol = self.choice, self.protocol()
        if self.pipeline is not None:
            return prepare_pipeline(self.recipe, protocol, self.pipeline, self.directory)
        if choice is not None:
            return prepare_evaluation(self.recipe, protocol, choice, self.directory, self.preset)
        assert self.videos is not None
        return prepare_external(self.recipe, protocol, self.videos, self.directory)


def prepare_evaluation(
    recipe: Recipe,
    protocol: Protocol,
    choice: ModelChoice,
    out: Path,
    preset: SamplerPreset | None = None,
) -> EvaluationJob:
    """Choose the variants: the model at each of the recipe's step counts, and its teacher."""
    protocol.suite.check(recipe.model)
    of = evaluated_model(choice, recipe, recipe.evaluate.sampler, preset)
    conditioned, pictures = "i2v" in protocol.suite.groups, recipe.model.pictures
    if conditioned and of.partition is None and pictures not in ("optional-first", "first"):
        raise UsageError(
            f"{choice.address} makes no videos from text and a first frame.",
            "Give a causal (FAR) model or an image-to-video model with --model, or omit --task i2v.",
        )
    if not conditioned and recipe.model.needs_pictures:
        raise UsageError(
            f"{choice.address} makes videos from pictures, and {protocol.suite.name} has only prompts.",
            "Evaluate a first-frame model with --task i2v, or with --suite vbench-i2v.",
        )
    variants = [variant(of, steps, protocol, recipe) for steps in dict.fromkeys(recipe.evaluate.nfe)]
    if recipe.evaluate.teacher and not recipe.evaluates_teacher:
        log.info("The teacher is omitted: %s is not conditioned on images.", recipe.model.teacher)
    elif recipe.evaluate.teacher:
        teacher = ModelChoice(recipe.model.teacher, f"the teacher of recipe {recipe.name}")
        steps = recipe.sample.teacher_steps
        beside = variant(evaluated_model(teacher, recipe), steps, protocol, recipe, reference=True)
        log.info("Teacher: %s.", sampling_note(beside))
        variants += [beside] if beside.key not in {one.key for one in variants} else []
    return EvaluationJob(recipe, protocol, tuple(variants), out)


def run_evaluation(
    job: EvaluationJob,
    open_model: OpenModel | None = None,
    on_progress: OnProgress = lambda done: None,
    share: VideoShare = ALL_VIDEOS,
) -> Evaluation:
    """Generate what is missing and score it, in the first of several processes."""
    with RunLock(job.out):
        return _run(job, open_model, on_progress, share)


def generate_share(job: EvaluationJob, share: VideoShare, open_model: OpenModel | None = None) -> None:
    """Generate this process's share of the videos, or its part of a group's, in the other processes."""
    generate_videos(job, open_model or _open_sampler, lambda done: None, share)


@dataclass(frozen=True)
class FinishedEvaluation:
    """Results, the files written, and the variants of other models beside them."""

    evaluation: Evaluation
    files: dict[str, Path]
    exported: list[Path]
    others: OtherVariants


def evaluate_and_report(
    job: EvaluationJob,
    *,
    share: VideoShare = ALL_VIDEOS,
    on_progress: OnProgress = lambda done: None,
    export: Path | None = None,
    prune: bool = False,
) -> FinishedEvaluation | None:
    """Evaluate and write the reports; None in all processes but the first.

    Args:
        job: What to evaluate.
        share: Which of several processes this is.
        on_progress: Called with the number of finished videos.
        export: Directory for VBench's leaderboard.
        prune: Delete variants of other models or settings.
    """
    from anyflow_cli.evaluate.report.page import write_results
    from anyflow_cli.evaluate.vbench.leaderboard import check_export, export_leaderboard

    if share.group or not share.writes:
        generate_share(job, share)
        return None
    if export is not None:
        check_export(export)
    if job.external is None:
        check_free_space(job.out, remaining_cost(job, share.groups).size)
    EvaluationDirectory(job.out).check()
    with RunLock(job.out):
        evaluation = _run(job, None, on_progress, share)
        files = write_results(evaluation, job.protocol.suite, job.out)
        exported = [] if export is None else export_leaderboard(job, evaluation, export)
        others = other_variants(job.out, job.variants)
        if prune:
            remove_variants(others.removable)
    return FinishedEvaluation(evaluation, files, exported, others)


def check_total(evaluation: Evaluation, least: float) -> None:
    """Raise an AnyflowError where Total is below ``least`` at any step count of the model.

    Raises:
        UsageError: There is no Total to compare.
    """
    low: list[str] = []
    for one in evaluation.models:
        if one.result.total is None:
            raise UsageError(
                f"--fail-below needs a Total, and there is none without {', '.join(one.result.missing)}.",
                "Evaluate more prompts.",
            )
        if one.result.total < least:
            low.append(f"{one.result.total:.1f} at {one.title}")
    if low:
        raise AnyflowError(f"Total is {', '.join(low)}: below {least:g}.")


def prepare_comparison(
    recipe: Recipe, protocol: Protocol, addresses: Sequence[str], out: Path
) -> dict[str, EvaluationJob]:
    """Jobs for those of two addresses that are models; the others are finished evaluations."""
    alone = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"teacher": False})})
    return {
        address: prepare_evaluation(alone, protocol, ModelChoice(address, "named with --compare"), out)
        for address in addresses
        if not is_finished(address)
    }


def compare_and_report(
    protocol: Protocol, addresses: tuple[str, str], evaluated: Mapping[str, Evaluation], out: Path
) -> tuple[Comparison, dict[str, Path]]:
    """Compare two models and write the comparison.

    Args:
        protocol: Protocol of both.
        addresses: The two models or finished evaluations.
        evaluated: Those that were just evaluated.
        out: Directory of the comparison.
    """
    from anyflow_cli.evaluate.report.page import write_comparison

    first, second = (
        side_of(address, evaluated[address])
        if address in evaluated
        else read_side(Path(address).expanduser())
        for address in addresses
    )
    comparison = compare(protocol.suite, first, second)
    with RunLock(out):
        return comparison, write_comparison(comparison, out)


def _run(
    job: EvaluationJob, open_model: OpenModel | None, on_progress: OnProgress, share: VideoShare
) -> Evaluation:
    if job.external is not None:
        score_external_videos(job)
    else:
        generate_videos(job, open_model or _open_sampler, on_progress, share)
        wait_for_others(job, on_progress)
    assessed = [_assess(job, one) for one in job.variants]
    suite, prompts = job.protocol.suite, [request.number for request in job.protocol.requests]
    draws = [draw_totals(suite, assessment.scores, prompts) for _, assessment in assessed]
    measured = tuple(
        _measure(job, one, records, assessment, drawn)
        for one, (records, assessment), drawn in zip(job.variants, assessed, draws, strict=True)
    )
    by_steps = {
        m.steps: (m.result.total, drawn)
        for m, drawn in zip(measured, draws, strict=True)
        if not m.reference and m.result.total is not None and drawn is not None
    }
    return Evaluation(
        card=protocol_card(
            job.protocol, job.variants, job.recipe, [assessment for _, assessment in assessed]
        ),
        measured=measured,
        trend=trend(by_steps),
        prompts=job.protocol.prompts,
        partition=job.partition,
    )


def _assess(job: EvaluationJob, one: Variant) -> tuple[list[VideoRecord], Assessment]:
    """Let the suite score a variant's videos; return the records with these scores."""
    store, done = job.store(one), job.finished(one)
    records = [done[request] for request in job.protocol.requests]
    clips = [
        SuiteClip(request.number, job.path(one, request), record.score)
        for request, record in zip(job.protocol.requests, records, strict=True)
    ]
    assessment = job.protocol.suite.assess(clips, store.directory)
    scored = [replace(record, score=score) for record, score in zip(records, assessment.scores, strict=True)]
    for record, before in zip(scored, records, strict=True):
        if record != before:  # a later comparison needs the scores of finished files too
            store.append(replace(record, made=time.time()))
    return scored, assessment


def _measure(
    job: EvaluationJob,
    one: Variant,
    records: Sequence[VideoRecord],
    assessment: Assessment,
    draws: Draws | None,
) -> Measured:
    return Measured(
        key=one.key,
        label=one.label,
        reference=one.reference,
        address=one.model.address,
        steps=one.steps,
        evaluations=one.evaluations,
        result=result_of(job.protocol.suite, assessment),
        interval=None if draws is None else interval(draws),
        network_seconds=float(np.median([record.network for record in records])),
        decode_seconds=float(np.median([record.decode for record in records])),
        batch=records[0].batch,
        records=tuple(records),
        files=tuple(job.path(one, request) for request in job.protocol.requests),
        chunks=chunk_curves(job.protocol.suite, [record.score for record in records], job.partition),
    )


def _open_sampler(of: EvaluatedModel, recipe: Recipe) -> VideoGenerator:
    if of.pipeline is not None:
        return PipelineVideos.load(of.pipeline, recipe)
    return VideoSampler.load(
        of.address,
        recipe,
        teacher=of.teacher,
        method=of.sampler,
        preset=of.preset,
        device=default_device(),
        context=recipe.launch.context_parallel or 1,
    )
