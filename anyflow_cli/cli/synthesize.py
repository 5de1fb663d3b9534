"""``anyflow synthesize``: make, continue or check a data set of latents."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.console import facts_table, print_dry_run, print_result
from anyflow_cli.cli.progress import Progress
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs.paths import RunPaths

if TYPE_CHECKING:
    from anyflow_cli.synthesize.job import SynthesisJob

log = logging.getLogger(__name__)


def synthesize(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    prompts: options.PromptsOption = None,
    count: options.VideoCountOption = None,
    from_videos: options.FromVideosOption = None,
    previews: options.PreviewsOption = None,
    seed: options.SeedOption = None,
    assignments: options.SetOption = None,
    out: options.OutOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    verify: options.VerifyOption = False,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Make a data set: teacher videos from prompts, or real clips, as shards of latents.

    The same command continues a data set that was stopped: only missing shards are made.
    """
    _refuse_together({"--from-videos": from_videos, "--prompts": prompts})
    _refuse_together({"--from-videos": from_videos, "--count": count})
    overrides = {
        "--prompts": ("data.prompts", None if prompts is None else str(prompts)),
        "--count": ("synthesize.count", count),
        "--previews": ("synthesize.previews", previews),
        "--seed": ("synthesize.seed", seed),
    }
    settings = options.load_settings(recipe, assignments, overrides)
    paths = RunPaths(runs, settings.name)
    directory = out or paths.data
    if verify:
        return _verify(directory, as_json=as_json)
    from anyflow_cli.runs.resources import Given, can_start, inputs, require_inputs
    from anyflow_cli.synthesize.job import prepare_synthesis

    needs = inputs(settings, paths, "synthesize", Given(data=from_videos))
    if dry_run and prompts is None and not can_start(needs):
        return print_dry_run("synthesize", {"data": directory}, needs, as_json=as_json)
    require_inputs(needs)
    job = prepare_synthesis(settings, directory, from_videos)
    if dry_run:
        return print_dry_run("synthesize", _facts(job), needs, as_json=as_json)
    _run(job, as_json=as_json)


def _run(job: SynthesisJob, *, as_json: bool) -> None:
    from anyflow_cli.synthesize.run import run_synthesis as run

    with Progress("synthesize", job.videos_left(), "videos") as progress:
        report = run(job, progress.update)
    values = {
        "data": report.out, "samples": report.samples, "wanted": report.wanted, "shards": report.shards,
        "made": report.made, "rejected": report.reasons, "complete": report.complete,
    }  # fmt: skip
    shown = facts_table(values | {"rejected": _counted(report.reasons)})
    print_result(values, as_json=as_json, text=shown)


def _verify(directory: Path, *, as_json: bool) -> None:
    from anyflow_cli.data.shards import read_manifest
    from anyflow_cli.data.verify import verify

    with Progress("verify", len(read_manifest(directory).shards), "shards") as progress:
        found = verify(directory, lambda record: progress.update(progress.done + 1))
    values = {"data": directory, "shards": found.shards, "samples": found.samples, "problems": found.problems}
    print_result(values, as_json=as_json, text=facts_table(values | {"problems": len(found.problems)}))
    for problem in found.problems:
        log.warning("%s", problem)
    if found.problems:
        number = len(found.problems)
        raise AnyflowError(
            f"The data set {directory} has {number} problem{'s' * (number > 1)}.",
            "Remove the shards named above and run `anyflow synthesize` again: it makes what is missing.",
        )


def _facts(job: SynthesisJob) -> dict[str, Any]:
    made, done = job.recipe.synthesize, sum(record is not None for record in job.records())
    teacher = {"teacher": job.teacher, "evaluations a video": f"{made.steps} x 2"}
    prompts = job.recipe.data.prompts or f"captions of the world '{job.recipe.data.world}'"
    return {
        "data": job.out,
        "videos": len(job.captions),
        **({"prompts": prompts, **teacher} if job.clips is None else {"source": "real clips"}),
        "shards": len(job.ranges),
        "complete already": done,
    }


def _counted(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"


def _refuse_together(options: dict[str, object]) -> None:
    if all(value is not None for value in options.values()):
        raise UsageError(f"{' and '.join(options)} cannot be used together.", "Leave one of them out.")
