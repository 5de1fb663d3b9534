"""``anyflow evaluate``: scores, latency and their trend over step counts, with a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run, print_result
from anyflow_cli.cli.launch import start_processes
from anyflow_cli.cli.progress import Progress, in_words
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.distributed import is_main_process

if TYPE_CHECKING:
    from anyflow_cli.evaluate.cost import EvaluationCost
    from anyflow_cli.evaluate.generate import EvaluationJob
    from anyflow_cli.evaluate.protocol import Protocol
    from anyflow_cli.evaluate.results import Evaluation
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.runs.open import ModelChoice

MEGABYTE = 1e6


log = logging.getLogger(__name__)


def evaluate(
    nfe: options.NfeOption = None,
    model: options.ModelOption = None,
    videos: options.VideosOption = None,
    suite: options.SuiteOption = None,
    task: options.TaskOption = None,
    sampler: options.SamplerOption = None,
    prompts: options.PromptsOption = None,
    limit: options.LimitOption = None,
    compare: options.CompareOption = None,
    fail_below: options.FailBelowOption = None,
    prune: options.PruneOption = False,
    export: options.LeaderboardOption = None,
    out: options.OutOption = None,
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Score a model at several step counts, with the teacher beside it, and write a report.

    Without --model, the furthest model trained with the recipe is used, else the one that ships. Videos and
    scores that exist already are reused. Scores of --prompts or --limit are not comparable with others.
    """
    overrides = {
        "--nfe": ("evaluate.nfe", options.parse_steps(nfe)),
        "--suite": ("evaluate.suite", suite),
        "--task": ("evaluate.task", task),
        "--sampler": ("evaluate.sampler", sampler),
        "--seed": ("evaluate.seed", seed),
        "--nproc": ("launch.processes", processes),
    }
    settings = options.load_settings(recipe, assignments, overrides)
    if export is not None and settings.evaluate.suite == "shapes":
        raise UsageError(
            "--export is for the suites of VBench.", "Add --suite vbench, or leave --export out."
        )

    from anyflow_cli.evaluate.external_videos import prepare_given
    from anyflow_cli.evaluate.registry import protocol_for
    from anyflow_cli.evaluate.run import prepare_evaluation
    from anyflow_cli.runs.resources import Given, find_model, inputs, is_ready, require_inputs

    protocol = protocol_for(settings, prompts, limit)
    paths = RunPaths(runs, settings.name)
    directory = out or paths.evaluate
    if compare is not None:
        others = {"--model": model, "--fail-below": fail_below, "--prune": prune or None, "--videos": videos}
        _refuse_beside("--compare", others)
        return _compare(settings, protocol, compare, directory, dry_run=dry_run, as_json=as_json)
    if videos is not None:
        _refuse_beside(
            "--videos", {"--model": model, "--sampler": sampler, "--nfe": nfe, "--nproc": processes}
        )
        needs = inputs(settings, paths, "evaluate", Given(data=videos))
        require_inputs(needs)
        job = prepare_given(settings, protocol, videos, directory)
    else:
        choice, needs = find_model(settings, paths, model), inputs(settings, paths, "evaluate", Given(model))
        log.info("Model: %s (%s)", *choice)
        if dry_run and not is_ready(needs):
            facts = _planned_facts(settings, protocol, choice, directory)
            return print_dry_run("evaluate", facts, needs, as_json=as_json)
        require_inputs(needs)
        job = prepare_evaluation(settings, protocol, choice, directory)
    if dry_run:
        return print_dry_run("evaluate", _facts(job), needs, as_json=as_json)
    if start_processes(settings.launch):
        return None
    if (evaluation := _run(job)) is None:
        return None
    _show(job, evaluation, as_json=as_json)
    if export is not None:
        _export(job, evaluation, export)
    _tidy(job, prune=prune)
    _judge(evaluation, fail_below)


def _planned_facts(settings: Recipe, protocol: Protocol, choice: ModelChoice, out: Path) -> dict[str, object]:
    """What would be evaluated, where a model is not on this machine yet."""
    counts = tuple(dict.fromkeys(settings.evaluate.nfe))
    beside = settings.evaluate.teacher and settings.evaluate.task == "t2v"
    return {
        "suite": protocol.suite.name,
        "comparable": not protocol.deviations,
        "prompts": len(protocol.prompts),
        "model": choice.address,
        "because": choice.why,
        "nfe": counts,
        "teacher": settings.model.teacher if beside else "not evaluated",
        "videos": len(protocol.items) * (len(counts) + beside),
        "out": out,
    }


def _facts(job: EvaluationJob) -> dict[str, object]:
    """What is asked, what is there, what is still to be made and what it takes."""
    from anyflow_cli.evaluate.cost import cost

    processes = job.recipe.launch.processes or 1
    left = cost(job, processes)
    making = {
        "to make": left.videos,
        "disk": f"about {left.size / MEGABYTE:.1f} MB",
        "time": _time(job, left, processes) or "not known before the first videos",
    }
    return {
        "suite": job.protocol.suite.name,
        "comparable": not job.protocol.deviations,
        "prompts": len(job.protocol.prompts),
        "models": {f"{one.subject.address} at {one.label}": one.subject.why for one in job.variants},
        "videos": job.videos,
        **(making if job.given is None else {}),
        "out": str(job.out),
    }


def _time(job: EvaluationJob, left: EvaluationCost, processes: int) -> str | None:
    """What the missing videos take: as the finished ones did, else as this machine's GPUs multiply."""
    from anyflow_cli.plan.evaluation import evaluation_seconds

    if left.seconds is not None:
        return in_words(left.seconds)
    planned = evaluation_seconds(job, processes)
    return None if planned is None else f"{in_words(planned)} without decoding, by the GPUs' peak"


def _run(job: EvaluationJob) -> Evaluation | None:
    """Make the videos, and sum up where this is the first process."""
    from anyflow_cli.evaluate.cost import check_room, cost
    from anyflow_cli.evaluate.generate import WorkShare
    from anyflow_cli.evaluate.run import help_make
    from anyflow_cli.evaluate.run import run_evaluation as run

    share = WorkShare.of_process()
    if share.rank:
        help_make(job, share)
        return None
    if job.given is None:
        left = cost(job, share.world)
        check_room(job.out, left.size)
        time = _time(job, left, share.world) if left.videos else None
        log.info(
            "%d videos, of which %d are still to be made: about %.1f MB%s.",
            job.videos, left.videos, left.size / MEGABYTE, f" and {time}" if time else "",
        )  # fmt: skip
    with Progress("evaluate", job.videos, "videos") as progress:
        return run(job, advance=progress.update, share=share)


def _show(job: EvaluationJob, evaluation: Evaluation, *, as_json: bool) -> None:
    from anyflow_cli.evaluate.report.page import write_results
    from anyflow_cli.evaluate.report.tables import score_table

    written = write_results(evaluation, job.protocol.suite, job.out)
    files = {name: str(path) for name, path in written.items()}
    print_result(evaluation.as_json() | {"files": files}, as_json=as_json, text=score_table(evaluation))
    log.info("Report: %s", files["report.html"])


def _export(job: EvaluationJob, evaluation: Evaluation, directory: Path) -> None:
    from anyflow_cli.evaluate.vbench.leaderboard import export_leaderboard

    for path in export_leaderboard(job, evaluation, directory):
        log.info("For VBench's leaderboard: %s", path)


def _judge(evaluation: Evaluation, least: float | None) -> None:
    """Exit code 1 where a Total asked for is too low; a missing one cannot be judged."""
    if least is None:
        return
    low: list[str] = []
    for one in evaluation.models:
        if one.result.total is None:
            raise UsageError(
                f"Without {', '.join(one.result.missing)} there is no Total for --fail-below to judge.",
                "Evaluate more prompts.",
            )
        if one.result.total < least:
            low.append(f"{one.result.total:.1f} at {one.title}")
    if low:
        raise AnyflowError(f"Total is {', '.join(low)}: below {least:g}.")


def _tidy(job: EvaluationJob, *, prune: bool) -> None:
    """Say where earlier models' videos are, or delete them."""
    from anyflow_cli.evaluate.older import older_variants, remove

    older = older_variants(job)
    if not older.directories:
        return
    many, size = len(older.directories), f"{older.size / MEGABYTE:.1f} MB"
    if prune:
        remove(older)
        log.info("Deleted %d variants of earlier models or settings (%s).", many, size)
    else:
        log.info("%s also holds %d variants of earlier models or settings (%s); --prune deletes them.",
                 job.out, many, size)  # fmt: skip


def _refuse_beside(option: str, options: Mapping[str, object]) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} cannot be used together with {option}.", f"Leave {name} out.")


def _compare(
    settings: Recipe,
    protocol: Protocol,
    addresses: tuple[str, str],
    out: Path,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Evaluate what is a model, read what is finished, and hold the second against the first."""
    from anyflow_cli.evaluate.compare import compare, is_finished, read_side, side_of
    from anyflow_cli.evaluate.report.page import write_comparison
    from anyflow_cli.evaluate.report.tables import comparison_table
    from anyflow_cli.evaluate.run import prepare_evaluation
    from anyflow_cli.runs.open import ModelChoice

    recipe = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"teacher": False})})
    jobs = {
        address: prepare_evaluation(recipe, protocol, ModelChoice(address, "given with --compare"), out)
        for address in addresses
        if not is_finished(address)
    }
    if dry_run:
        finished = {address: "finished" for address in addresses if address not in jobs}
        return print_dry_run(
            "evaluate", finished | {a: _facts(job) for a, job in jobs.items()}, as_json=as_json
        )
    if jobs and start_processes(settings.launch):
        return None
    found = {address: _run(job) for address, job in jobs.items()}
    if not is_main_process():
        return None
    sides = [
        side_of(address, made) if (made := found.get(address)) else read_side(Path(address).expanduser())
        for address in addresses
    ]
    result = compare(protocol.suite, *sides)
    files = {name: str(path) for name, path in write_comparison(result, out).items()}
    print_result(result.as_json() | {"files": files}, as_json=as_json, text=comparison_table(result))
