"""``anyflow synthesize``: make, continue or check a data set of latents."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.console import facts_table, print_dry_run, print_result
from anyflow_cli.cli.launch import count_processes, start_processes
from anyflow_cli.cli.progress import Progress
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.distributed import is_main_process, process_group, world_size

if TYPE_CHECKING:
    from anyflow_cli.synthesize.job import SynthesisJob

log = logging.getLogger(__name__)


def synthesize(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    prompts: options.PromptsOption = None,
    count: options.VideoCountOption = None,
    from_videos: options.FromVideosOption = None,
    lora: options.TeacherLoraOption = None,
    previews: options.PreviewsOption = None,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    memory: options.MemoryOption = None,
    assignments: options.SetOption = None,
    out: options.DataOutOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    verify: options.VerifyOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Make a data set: teacher videos from prompts, or real clips, as shards of latents.

    The same command continues a data set that was stopped: only missing shards are made.
    """
    for option, value in (("--prompts", prompts), ("--count", count), ("--lora", lora)):
        if from_videos is not None and value is not None:
            raise UsageError(f"--from-videos and {option} cannot be used together.", f"Omit {option}.")
    overrides = {
        "--prompts": ("data.prompts", None if prompts is None else str(prompts)),
        "--count": ("synthesize.count", count),
        "--previews": ("synthesize.previews", previews),
        "--seed": ("synthesize.seed", seed),
        "--nproc": ("launch.processes", processes),
        "--memory": ("memory.limit", options.parse_memory(memory)),
    }
    settings = options.load_settings(recipe, assignments, overrides)
    teacher = "model.teacher" if settings.synthesize.teacher is None else "synthesize.teacher"
    settings = options.merge_lora_files(settings, lora, teacher)
    paths = RunPaths(runs, settings.name)
    count_processes(settings.launch)
    if verify:
        return _verify(out or settings.data.path or str(paths.data), as_json=as_json)
    from anyflow_cli.runs.resources import Given, can_start, inputs, require_inputs
    from anyflow_cli.synthesize.job import prepare_synthesis

    directory = paths.data if out is None else Path(out)
    options.require_local_directory("--out", directory)
    needs = inputs(settings, paths, "synthesize", Given(data=from_videos))
    if dry_run and prompts is None and not can_start(needs):
        return print_dry_run("synthesize", {"data": directory}, needs, as_json=as_json)
    require_inputs(needs)
    if from_videos is None:
        settings = options.with_placement(settings, "synthesize")
    if not dry_run and start_processes(settings.launch):
        return None
    job = prepare_synthesis(settings, directory, from_videos, dry_run=dry_run)
    if dry_run:
        return print_dry_run("synthesize", _facts(job), needs, as_json=as_json)
    _run(job, as_json=as_json)


def _buckets(job: SynthesisJob) -> dict[str, Any]:
    """Segments of each bucket, where there are several."""
    counts = [(f"{one.frames} frames of {one.height}x{one.width}", n) for one, n in job.buckets.items()]
    return {"buckets": ", ".join(f"{n} of {name}" for name, n in counts)} if len(counts) > 1 else {}


def _run(job: SynthesisJob, *, as_json: bool) -> None:
    from anyflow_cli.synthesize.run import run_synthesis

    with process_group(), Progress("synthesize", job.videos_left(), "videos") as progress:
        waits = is_main_process() and world_size() > 1  # so that its report is that of all
        report = run_synthesis(job, progress.update, wait=waits)
    values = {
        "data": report.out, "samples": report.samples, "wanted": report.wanted, "shards": report.shards,
        "made": report.made, "rejected": report.reasons, "complete": report.complete, **_buckets(job),
    }  # fmt: skip
    rejected = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items()) or "none"
    print_result(values, as_json=as_json, text=facts_table(values | {"rejected": rejected}))


def _verify(address: str, *, as_json: bool) -> None:
    from anyflow_cli.data.published import recognize
    from anyflow_cli.data.verify import number_of_files, verify

    with Progress("verify", number_of_files(address), "shards") as progress:
        found = verify(address, lambda name: progress.update(progress.done + 1))
    values = {"data": address, "shards": found.shards, "samples": found.samples, "problems": found.problems}
    print_result(values, as_json=as_json, text=facts_table(values | {"problems": len(found.problems)}))
    for problem in found.problems:
        log.warning("%s", problem)
    if found.problems:
        number = len(found.problems)
        hint = "Remove the shards named above and run `anyflow synthesize` again: it makes what is missing."
        if recognize(address) is not None:
            hint = "Download the files named above again, or allow for their samples with data.max_corrupt."
        raise AnyflowError(f"The data set {address} has {number} problem{'s' * (number > 1)}.", hint)


def _facts(job: SynthesisJob) -> dict[str, Any]:
    made, complete = job.recipe.synthesize, sum(record is not None for record in job.records())
    teacher = {"teacher": job.teacher, "evaluations per video": f"{made.steps} x 2"}
    prompts = job.recipe.data.prompts or f"captions of the world '{job.recipe.data.world}'"
    return {
        "data": job.out,
        "videos": len(job.captions),
        **({"prompts": prompts, **teacher} if job.clips is None else {"source": "real clips"}),
        **_buckets(job),
        "shards": len(job.ranges),
        "complete already": complete,
    }
