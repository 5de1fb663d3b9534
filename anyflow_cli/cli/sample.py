"""``anyflow sample``: videos from prompts, at one or several step counts."""

from __future__ import annotations

import logging
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_dry_run, print_result
from anyflow_cli.cli.launch import count_processes, start_processes
from anyflow_cli.cli.options import DEFAULT_RECIPE
from anyflow_cli.cli.progress import Progress
from anyflow_cli.cli.sample_options import (
    SampleOptions,
    check_stdout,
    options_of_refine,
    read_all_prompts,
    read_conditioning_frames,
    read_prompt_switches,
    read_steps,
    refuse_together,
)
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.distributed import from_first, is_main_process, join_group, process_group
from anyflow_cli.utils.run_lock import RunLock

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.runs.open import ModelChoice
    from anyflow_cli.sample.output import SampleRequest
    from anyflow_cli.sample.sampler import VideoSampler
    from anyflow_cli.sample.shares import VideoShare


log = logging.getLogger(__name__)


def sample(
    prompt: options.PromptOption = None,
    prompts: options.PromptsOption = None,
    nfe: options.NfeScheduleOption = None,
    preview: options.PreviewOption = False,
    refine: options.RefineOption = None,
    latency_budget: options.LatencyBudgetOption = None,
    frames: options.FramesOption = None,
    count: options.SeedCountOption = 1,
    teacher: options.TeacherOption = False,
    model: options.ModelOption = None,
    lora: options.LoraOption = None,
    sampler: options.SamplerOption = None,
    sampler_preset: options.PresetOption = None,
    list_presets: options.ListPresetsOption = False,
    image: options.ImageOption = None,
    last_image: options.LastImageOption = None,
    video: options.VideoOption = None,
    video_frames: options.VideoFramesOption = None,
    then: options.ThenOption = None,
    stream: options.StreamOption = False,
    memory: options.MemoryOption = None,
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
    """Sample videos from prompts with an any-step model, at several step counts side by side.

    Without --model, the furthest model trained with the recipe is used, else the one that ships.
    """
    if list_presets:
        return _print_presets(as_json=as_json)
    counts = {"--nfe": nfe, "--preview": preview or None, "--latency-budget": latency_budget}
    refuse_together(counts, "how many steps to take")
    said = {"--sampler": sampler, "--teacher": teacher or None, "--latency-budget": latency_budget}
    preset = options.read_preset(sampler_preset, nfe or preview or None, said)
    launch: dict[str, tuple[str, Any]] = {"--nproc": ("launch.processes", processes)}
    launch["--memory"] = "memory.limit", options.parse_memory(memory)
    if refine is None:
        overrides = {"--frames": ("sample.frames", frames), "--seed": ("sample.seed", seed), **launch}
        named = recipe or options.recipe_of_model(model)
        keys = preset.overrides if preset else ()
        settings = with_sampled_length(options.load_settings(named, assignments, overrides, keys))
        is_teacher = teacher or (preset is not None and preset.steps is None)
        default = (settings.sample.teacher_steps,) if is_teacher else settings.sample.nfe
        last_seed = settings.sample.seed + count - 1
        if last_seed >= 1 << 63:
            raise UsageError(f"--count {count} leads to seeds above 2^63 - 1.", "Lower --seed.")
        chosen = SampleOptions(
            settings,
            read_all_prompts(settings, prompt, prompts, allow_missing=dry_run),
            list(range(settings.sample.seed, last_seed + 1)),
            read_steps(nfe, preview=preview) or default,
            read_prompt_switches(then, settings.model.frames),
            read_conditioning_frames(settings, image, video, video_frames, last_image, allow_missing=dry_run),
            options.with_lora_files(model, lora),
            method=sampler,
            preset=preset,
        )
    else:
        recorded = {
            "--prompt": prompt, "--prompts": prompts, "--preview": preview or None, "--frames": frames,
            "--count": None if count == 1 else count, "--teacher": teacher or None, "--model": model,
            "--lora": lora, "--sampler-preset": sampler_preset,
            "--sampler": sampler, "--image": image, "--last-image": last_image, "--video": video,
            "--video-frames": video_frames, "--then": then, "--seed": seed,
        }  # fmt: skip
        settings = options.load_settings(recipe or DEFAULT_RECIPE, assignments, launch)
        chosen = options_of_refine(refine, settings, recorded, read_steps(nfe))
    folder = _sample(
        chosen, runs, out, latency_budget, teacher=teacher, stream=stream, dry_run=dry_run, as_json=as_json
    )
    if preview and folder is not None:
        log.info("To sample from the same noise at more steps: anyflow sample --refine %s", folder)


@process_group()
def _sample(
    chosen: SampleOptions,
    runs: Path,
    out: Path | None,
    budget: float | None,
    *,
    teacher: bool,
    stream: bool,
    dry_run: bool,
    as_json: bool,
) -> Path | None:
    """Sample and write the files; return their directory, None if there is none."""
    from anyflow_cli.runs.paths import RunPaths
    from anyflow_cli.runs.resources import (
        TEACHER_METHODS,
        Given,
        find_model,
        inputs,
        is_ready,
        require_inputs,
    )
    from anyflow_cli.sample.output import SampleRequest, check_directory
    from anyflow_cli.sample.presets import check_model
    from anyflow_cli.sample.shares import VideoShare

    settings = chosen.recipe
    paths = RunPaths(runs, settings.name)
    choice = find_model(settings, paths, chosen.model, teacher=teacher)
    log.info("Model: %s (%s)", *choice)
    shape = settings.model
    log.info(
        "Recipe %s: %d frames of %dx%d at %d fps, shift %g, up to %d tokens.",
        settings.name, shape.frames, shape.height, shape.width, shape.fps, shape.shift, shape.max_text_tokens,
    )  # fmt: skip
    named = settings.model.teacher if teacher else chosen.model
    guided = chosen.method in TEACHER_METHODS and (chosen.preset is None or not chosen.preset.steps)
    given = Given(named, prompts=bool(chosen.prompts), pictures=chosen.frames is not None, guided=guided)
    needs = inputs(settings, paths, "sample", given)
    if chosen.preset is not None:
        chosen.preset.check_request(shape.frames, chosen.steps)
        if is_ready(needs):
            check_model(chosen.preset, choice.address, settings)
    steps = tuple(dict.fromkeys(chosen.steps)) if budget is None else (1,)
    request = SampleRequest(chosen.prompts, chosen.seeds, steps, chosen.frames)
    total = len(request.pairs) * len(request.nfe)
    processes = count_processes(settings.launch)
    share = VideoShare.of_process(len(request.pairs), settings.launch.context_parallel, processes)
    if to_stdout := out == Path("-"):
        check_stdout(total, stream=stream, as_json=as_json)
    elif is_main_process():
        check_directory(out)
    kind = "stream" if stream else "teacher" if teacher else "sample"
    settings = options.with_placement(settings, kind, choice.address if is_ready(needs) else None)
    chosen = replace(chosen, recipe=settings)
    if dry_run:
        shown = request.nfe if budget is None else f"as many as fit into {budget:g} s"
        facts = {"model": choice.address, "because": choice.why, "prompts": len(chosen.prompts), "nfe": shown}
        facts |= {"seeds": list(request.seeds), "videos": total, "out": out or paths.samples}
        facts |= {"processes": str(share)} if processes > 1 else {}
        facts |= {"sampling": chosen.preset.in_words} if chosen.preset else {}
        print_dry_run("sample", facts, needs, as_json=as_json)
        return None
    require_inputs(needs)
    if start_processes(settings.launch):
        return None
    join_group()
    with nullcontext() if out is None or to_stdout else RunLock(out):  # numbered directories are new
        return _write(chosen, request, choice, share, paths.samples, out, budget, teacher, stream, as_json)


def _write(
    chosen: SampleOptions,
    request: SampleRequest,
    choice: ModelChoice,
    share: VideoShare,
    samples: Path,
    out: Path | None,
    budget: float | None,
    teacher: bool,
    stream: bool,
    as_json: bool,
) -> Path | None:
    """Load the model, sample, and write the files; return their directory, None for standard output."""
    from anyflow_cli.sample.latency_budget import steps_within
    from anyflow_cli.sample.output import make_directory, write_samples
    from anyflow_cli.sample.sampler import VideoSampler

    settings = chosen.recipe
    how: dict[str, Any] = {"teacher": teacher, "method": chosen.method, "preset": chosen.preset}
    opened = VideoSampler.load(choice.address, settings, **how, context=share.size)
    if chosen.previous is not None:
        chosen.previous.check_model(opened)
    given = chosen.frames
    opened.condition_on(given and given.pixels, chosen.switches, given and given.last)
    if stream or any(isinstance(schedule, tuple) for schedule in request.nfe):
        opened.require_causal()
    if budget is not None:
        request = replace(request, nfe=(from_first(steps_within(budget, opened, chosen.prompts[0])),))
    if out == Path("-"):
        _stream_to_stdout(opened, request)
        return None
    folder = from_first(make_directory(out, samples) if is_main_process() else Path())
    videos = len(request.pairs) * len(request.nfe)
    with Progress("sample", videos, "videos") as progress:
        record = write_samples(
            opened, request, folder, settings, choice, progress.update, stream=stream, share=share
        )
    lines = f"{folder / record['sheet']}\n" + "\n".join(str(folder / s["file"]) for s in record["samples"])
    print_result({"out": folder, **record}, as_json=as_json, text=lines)
    return folder


def _stream_to_stdout(sampler: VideoSampler, request: SampleRequest) -> None:
    """Write the only video to standard output, from the main process; all call the sampler."""
    from anyflow_cli.sample.streaming import stream_to_stdout

    video = request.prompts[0], request.seeds[0], request.nfe[0]
    if is_main_process():
        timing = stream_to_stdout(sampler, *video)
        log.info("%s.", timing.summary(sampler.model.fps).capitalize())
    else:
        deque(sampler.stream(*video), maxlen=0)


def _print_presets(*, as_json: bool) -> None:
    from anyflow_cli.sample.presets import preset_table

    rows = preset_table()
    lines = (f"{row['system']}\n  {row['sampling']}\n  {row['weights']}" for row in rows)
    print_result({"presets": rows}, as_json=as_json, text="\n".join(lines))


def with_sampled_length(recipe: Recipe) -> Recipe:
    """Return the recipe with ``sample.frames`` as its length, which a causal model need not be trained at."""
    frames = recipe.sample.frames or recipe.model.frames
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"frames": frames})})
