"""``anyflow evaluate``: scores, latency and their trend over step counts, with a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run, print_result
from anyflow_cli.cli.launch import count_processes, start_processes
from anyflow_cli.cli.progress import Progress, in_words
from anyflow_cli.errors import UsageError
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.distributed import process_group

if TYPE_CHECKING:
    from anyflow_cli.evaluate.diffusers_pipeline import FoundPipeline
    from anyflow_cli.evaluate.generate import EvaluationJob
    from anyflow_cli.evaluate.registry import ProtocolOutline
    from anyflow_cli.evaluate.run import EvaluationRequest, FinishedEvaluation
    from anyflow_cli.evaluate.store import OtherVariants
    from anyflow_cli.plan.hardware import Hardware
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.runs.open import ModelChoice

MEGABYTE = 1e6
# Options that decide what is scored, and those that cannot be given beside them.
ALONE = {
    "--compare": (
        "--model", "--fail-below", "--videos", "--pipeline", "--export", "--prune", "--sampler-preset"
    ),
    "--videos": ("--model", "--sampler", "--sampler-preset", "--pipeline", "--nfe", "--nproc"),
    "--pipeline": ("--model", "--sampler", "--sampler-preset"),
}  # fmt: skip

log = logging.getLogger(__name__)


def evaluate(
    nfe: options.NfeOption = None,
    model: options.ModelOption = None,
    lora: options.LoraOption = None,
    videos: options.VideosOption = None,
    pipeline: options.PipelineOption = None,
    suite: options.SuiteOption = None,
    task: options.TaskOption = None,
    sampler: options.SamplerOption = None,
    memory: options.MemoryOption = None,
    sampler_preset: options.PresetOption = None,
    prompts: options.PromptsOption = None,
    limit: options.LimitOption = None,
    compare: options.CompareOption = None,
    fail_below: options.FailBelowOption = None,
    prune: options.PruneOption = False,
    export: options.LeaderboardOption = None,
    out: options.OutOption = None,
    recipe: options.ModelRecipeOption = None,
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
        "--memory": ("memory.limit", options.parse_memory(memory)),
    }
    given = {
        "--model": model, "--videos": videos, "--pipeline": pipeline, "--sampler": sampler, "--nfe": nfe,
        "--sampler-preset": sampler_preset, "--nproc": processes, "--compare": compare, "--export": export,
        "--fail-below": fail_below, "--prune": prune or None,
    }  # fmt: skip
    _refuse_together(given)
    preset = options.read_preset(sampler_preset, nfe, {"--sampler": sampler})
    found = None if pipeline is None else _find_pipeline(pipeline)
    defaults = preset.overrides if preset else found.overrides if found else ()
    named = recipe or options.recipe_of_model(model)
    settings = options.load_settings(named, assignments, overrides, defaults)
    model = options.with_lora_files(model, lora)
    _check_settings(settings, given)

    from anyflow_cli.evaluate.run import EvaluationRequest, check_total
    from anyflow_cli.runs.resources import is_ready, require_inputs

    paths = RunPaths(runs, settings.name)
    request = EvaluationRequest(settings, paths, model, videos, prompts, limit, out, preset, found)
    size = request.check()
    if compare is not None:
        return _compare(request, size, compare, dry_run=dry_run, as_json=as_json)
    needs, choice = request.resources(), request.choice
    if choice is not None:
        log.info("Model: %s (%s)", *choice)
    if dry_run and not is_ready(needs):
        return print_dry_run("evaluate", _planned_facts(request, size, choice), needs, as_json=as_json)
    require_inputs(needs)
    job = _placed_job(request)
    if dry_run:
        return print_dry_run("evaluate", _facts(job), needs, as_json=as_json)
    if start_processes(settings.launch):
        return None
    with process_group():
        finished = _run(job, export=export, prune=prune)
    if finished is not None:
        _show(finished, job.out, prune=prune, as_json=as_json)
        if fail_below is not None:
            check_total(finished.evaluation, fail_below)


def _placed_job(request: EvaluationRequest) -> EvaluationJob:
    """The evaluation, with a place for each part of its model."""
    choice = request.choice
    if choice is not None:
        recipe = options.with_placement(request.recipe, "evaluate", choice.address)
        request = replace(request, recipe=recipe)
    return request.job()


def _compare(
    request: EvaluationRequest,
    size: ProtocolOutline,
    addresses: tuple[str, str],
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Evaluate those of the two that are models, and compare."""
    from anyflow_cli.evaluate.registry import suite_resources
    from anyflow_cli.evaluate.report.tables import comparison_table
    from anyflow_cli.evaluate.run import compare_and_report, prepare_comparison
    from anyflow_cli.runs.resources import is_ready, require_inputs

    needs = suite_resources(request.recipe)
    if dry_run and not is_ready(needs):
        return print_dry_run("evaluate", _planned_facts(request, size, None), needs, as_json=as_json)
    require_inputs(needs)
    protocol = request.protocol()
    jobs = prepare_comparison(request.recipe, protocol, addresses, request.directory)
    if dry_run:
        facts = {address: _facts(jobs[address]) if address in jobs else "finished" for address in addresses}
        return print_dry_run("evaluate", facts, as_json=as_json)
    if jobs and start_processes(request.recipe.launch):
        return None
    with process_group():
        finished = {address: _run(job) for address, job in jobs.items()}
    evaluated = {address: one.evaluation for address, one in finished.items() if one is not None}
    if len(evaluated) < len(jobs):
        return None  # one of the other processes
    found, written = compare_and_report(protocol, addresses, evaluated, request.directory)
    files = {name: str(path) for name, path in written.items()}
    print_result(found.as_json() | {"files": files}, as_json=as_json, text=comparison_table(found))


def _run(job: EvaluationJob, *, export: Path | None = None, prune: bool = False) -> FinishedEvaluation | None:
    from anyflow_cli.evaluate.generate import remaining_cost
    from anyflow_cli.evaluate.run import evaluate_and_report
    from anyflow_cli.sample.shares import VideoShare

    share = VideoShare.of_process(job.videos, job.recipe.launch.context_parallel or 1)
    if job.external is None and not share.group and share.writes:
        left = remaining_cost(job, share.groups)
        time = _time(job, left.seconds, share.groups * share.size) if left.videos else None
        log.info(
            "%d videos, %d of them still to sample: about %.1f MB%s.",
            job.videos, left.videos, left.size / MEGABYTE, f" and {time}" if time else "",
        )  # fmt: skip
    with Progress("evaluate", job.videos, "videos") as progress:
        return evaluate_and_report(job, share=share, on_progress=progress.update, export=export, prune=prune)


def _show(finished: FinishedEvaluation, out: Path, *, prune: bool, as_json: bool) -> None:
    from anyflow_cli.evaluate.report.tables import score_table

    evaluation, files = finished.evaluation, {name: str(path) for name, path in finished.files.items()}
    print_result(evaluation.as_json() | {"files": files}, as_json=as_json, text=score_table(evaluation))
    log.info("Report: %s", files["report.html"])
    for path in finished.exported:
        log.info("For VBench's leaderboard: %s", path)
    _report_others(finished.others, out, pruned=prune)


def _report_others(others: OtherVariants, out: Path, *, pruned: bool) -> None:
    """Report variants of other models in the directory, or their deletion."""
    many, size = len(others.removable), f"{others.size / MEGABYTE:.1f} MB"
    if many and pruned:
        log.info("Deleted %d variants of other models or settings (%s).", many, size)
    elif many:
        log.info("%s also has %d variants of other models or settings (%s); --prune deletes them.",
                 out, many, size)  # fmt: skip
    if others.kept and pruned:
        log.info("Kept %s: not marked by anyflow, or with other files in it.",
                 ", ".join(path.name for path in others.kept))  # fmt: skip


def _planned_facts(
    request: EvaluationRequest, size: ProtocolOutline, choice: ModelChoice | None
) -> dict[str, object]:
    """What a dry run reports where a model or the suite's environment is not on this machine yet."""
    settings = request.recipe
    facts: dict[str, object] = {
        "suite": size.suite,
        "dimensions": size.dimensions,
        "comparable": size.is_complete,
        "prompts": size.prompts,
    }
    if choice is None:
        return facts | {"videos": size.videos, "out": str(request.directory)}
    counts = tuple(dict.fromkeys(settings.evaluate.nfe))
    beside = settings.evaluates_teacher
    return facts | {
        "model": choice.address,
        "reason": choice.why,
        "nfe": counts,
        "teacher": settings.model.teacher if beside else "not evaluated",
        "videos": size.videos * (len(counts) + beside),
        "out": str(request.directory),
    }


def _facts(job: EvaluationJob) -> dict[str, object]:
    """What a dry run reports: the protocol, what is finished, and what the rest needs."""
    from anyflow_cli.evaluate.generate import remaining_cost
    from anyflow_cli.sample.shares import VideoShare

    launch = job.recipe.launch
    processes = count_processes(launch)
    share = VideoShare.of_process(job.videos, launch.context_parallel or 1, processes)
    facts: dict[str, object] = {
        "suite": job.protocol.suite.name,
        "comparable": not job.protocol.deviations,
        "prompts": len(job.protocol.prompts),
        "models": {f"{one.model.address} at {one.label}": one.model.reason for one in job.variants},
        "videos": job.videos,
    }
    if job.external is None:
        left = remaining_cost(job, share.groups)
        facts |= {
            "to sample": left.videos,
            "disk": f"about {left.size / MEGABYTE:.1f} MB",
            "time": _time(job, left.seconds, processes) or "not known before the first videos",
        }
    facts |= {"processes": str(share)} if processes > 1 else {}
    return facts | {"out": str(job.out)}


def _time(job: EvaluationJob, seconds: float | None, processes: int) -> str | None:
    """Time of the missing videos, from the finished ones or else from the peak of this machine's GPUs."""
    from anyflow_cli.plan.hardware import this_machine

    if seconds is not None:
        return in_words(seconds)
    if any(one.model.pipeline is not None for one in job.variants):
        return None
    planned = network_seconds(job, processes, this_machine())
    return None if planned is None else f"{in_words(planned)} without decoding, at the GPUs' peak"


def network_seconds(job: EvaluationJob, processes: int, hardware: Hardware) -> float | None:
    """Time of the network alone for the missing videos; None where speed or sizes are unknown."""
    from anyflow_cli.plan.estimate import target_of
    from anyflow_cli.plan.steps import sampling_cost

    flops = 0.0
    try:
        target = target_of(job.recipe, hardware)
    except UsageError:
        return None
    for one in job.variants if hardware.peak else ():
        setup = target.setup(None, None, two_time=not one.model.teacher)
        cost = sampling_cost(setup, job.recipe.evaluate.batch_size, is_guided=one.model.teacher)
        flops += len(job.missing(one)) * (one.steps * cost.step_flops + cost.cache_flops)
    return hardware.seconds(flops / processes, "sample")


def _check_settings(settings: Recipe, given: Mapping[str, object]) -> None:
    """Refuse options that do not go with the recipe."""
    if given["--export"] is not None and settings.evaluate.suite == "shapes":
        raise UsageError("--export is for the VBench suites.", "Add --suite vbench, or omit --export.")
    if given["--videos"] is None:
        count_processes(settings.launch)
    if given["--pipeline"] is not None and (settings.launch.context_parallel or 1) > 1:
        raise UsageError(
            "A pipeline of diffusers samples each video with one process.",
            "Set launch.context_parallel=null.",
            everywhere=True,
        )


def _find_pipeline(folder: Path) -> FoundPipeline:
    from anyflow_cli.evaluate.diffusers_pipeline import find_pipeline

    return find_pipeline(folder)


def _refuse_together(given: Mapping[str, object]) -> None:
    for option, others in ALONE.items():
        for name in others if given[option] is not None else ():
            if given[name] is not None:
                raise UsageError(f"{name} cannot be combined with {option}.", f"Omit {name}.")
