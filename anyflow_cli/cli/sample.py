"""``anyflow sample``: videos from prompts, at one or several step counts side by side."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anyflow_cli.cli.options import (
    DEFAULT_RECIPE,
    DEFAULT_RUNS,
    OUTPUT_PANEL,
    DebugOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RunsOption,
    SeedOption,
    SetOption,
    examples,
    load_settings,
    print_dry_run,
    print_result,
)
from anyflow_cli.cli.progress import Progress
from anyflow_cli.cli.sample_options import (
    SampleSettings,
    check_stdout,
    check_steps,
    read_conditioning_frames,
    read_prompt_switches,
    read_prompts_of,
    read_steps,
    settings_of_refine,
)

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe

EXAMPLES = examples(
    'anyflow sample --prompt "a small red circle moving left"',
    'anyflow sample -p "a large blue square moving up" --nfe 1,2,4,32 --count 3',
    "anyflow sample --prompts prompts.txt --model runs/tiny/distill --out samples",
    'anyflow sample -p "a green triangle" --teacher',
    'anyflow sample -p "a red circle" --model nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers --image first.png',
    'anyflow sample -p "a red circle" --then "81: a blue square" --frames 161 --nfe 4,8:2 --model far',
    'anyflow sample -p "a red circle" --nfe 2 --model far --stream --out - | mpv -',
)
STEPS_PANEL = "Steps"
CAUSAL_PANEL = "Causal models"

log = logging.getLogger(__name__)


PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", show_default=False, help="What to show; repeatable."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", show_default=False, help="Prompts: txt, csv, jsonl or parquet."),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        metavar="N,N,...", show_default=False, rich_help_panel=STEPS_PANEL,
        help="Step counts to compare, instead of the recipe's; 8:4:2 is 8 steps for the first chunk of a "
        "causal model, 4 for its second, 2 for all others.",
    ),
]  # fmt: skip
FramesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N", show_default=False,
        help="Frames of each video, instead of the recipe's: 1, 5, 9, ... A causal model takes any number.",
    ),
]  # fmt: skip
CountOption = Annotated[int, typer.Option(min=1, metavar="K", help="Seeds a prompt, counted on from --seed.")]
TeacherOption = Annotated[
    bool, typer.Option("--teacher", help="Sample the recipe's teacher, guided: two evaluations a step.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", show_default=False,
        help="A diffusers folder, a training run or checkpoint, a built-in or Hub name.",
    ),
]  # fmt: skip
SamplerOption = Annotated[
    Literal["flow-map", "euler", "consistency"] | None,
    typer.Option(show_default=False, help="How to go from noise to video, if not as the model's kind asks."),
]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", show_default=False, rich_help_panel=CAUSAL_PANEL,
        help="A picture to be the first frame, scaled and cropped to the recipe's size.",
    ),
]  # fmt: skip
VideoOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", show_default=False, rich_help_panel=CAUSAL_PANEL, help="A video to be continued."
    ),
]
VideoFramesOption = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", show_default=False, rich_help_panel=CAUSAL_PANEL,
        help="Its first frames that are kept, instead of half of what is made at most.",
    ),
]  # fmt: skip
ThenOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FRAME:TEXT", show_default=False, rich_help_panel=CAUSAL_PANEL,
        help="A prompt that takes over from this frame on; repeatable.",
    ),
]  # fmt: skip
StreamOption = Annotated[
    bool,
    typer.Option(
        "--stream", rich_help_panel=CAUSAL_PANEL,
        help="Write each chunk as it is finished, to a NAME.part.mp4 that plays while it grows; with --out - "
        "to standard output, for a player.",
    ),
]  # fmt: skip
PreviewOption = Annotated[
    bool,
    typer.Option("--preview", rich_help_panel=STEPS_PANEL, help="2 steps, to be made again with --refine."),
]
RefineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", show_default=False, rich_help_panel=STEPS_PANEL,
        help="Make the videos of a sampling (its directory, or one mp4) again from the same noise, at 32 "
        "steps or what --nfe says.",
    ),
]  # fmt: skip
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--latency-budget", min=0, metavar="SECONDS", show_default=False, rich_help_panel=STEPS_PANEL,
        help="As many steps as a video may take seconds, from the measured cost of a step.",
    ),
]  # fmt: skip
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", show_default=False, rich_help_panel=OUTPUT_PANEL,
        help="A new directory, instead of the next number under runs/RECIPE/samples.",
    ),
]  # fmt: skip


def sample(
    prompt: PromptOption = None,
    prompts: PromptsOption = None,
    nfe: StepsOption = None,
    preview: PreviewOption = False,
    refine: RefineOption = None,
    latency_budget: BudgetOption = None,
    frames: FramesOption = None,
    count: CountOption = 1,
    teacher: TeacherOption = False,
    model: ModelOption = None,
    sampler: SamplerOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    video_frames: VideoFramesOption = None,
    then: ThenOption = None,
    stream: StreamOption = False,
    out: OutOption = None,
    recipe: RecipeOption = DEFAULT_RECIPE,
    assignments: SetOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    seed: SeedOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make videos from prompts with an any-step model, at several step counts side by side.

    Without --model, the furthest model trained with the recipe is used, else the one that ships.
    """
    check_steps({"--nfe": nfe, "--preview": preview or None, "--latency-budget": latency_budget})
    if refine is None:
        options = {"--frames": ("sample.frames", frames), "--seed": ("sample.seed", seed)}
        settings = at_sampled_length(load_settings(recipe, assignments, options))
        usual = settings.sample.nfe if not teacher else (settings.sample.teacher_steps,)
        asked = SampleSettings(
            settings,
            read_prompts_of(settings, prompt, prompts),
            list(range(settings.sample.seed, settings.sample.seed + count)),
            read_steps(nfe, preview=preview) or usual,
            read_prompt_switches(then, settings.model.frames),
            read_conditioning_frames(settings, image, video, video_frames),
            model,
            sampler,
        )
    else:
        repeated = {
            "--prompt": prompt, "--prompts": prompts, "--preview": preview or None, "--frames": frames,
            "--count": None if count == 1 else count, "--teacher": teacher or None, "--model": model,
            "--sampler": sampler, "--image": image, "--video": video, "--video-frames": video_frames,
            "--then": then, "--seed": seed,
        }  # fmt: skip
        asked = settings_of_refine(refine, load_settings(recipe, assignments), repeated, read_steps(nfe))
    folder = _sample(
        asked, runs, out, latency_budget, teacher=teacher, stream=stream, dry_run=dry_run, as_json=as_json
    )
    if preview and folder is not None:
        log.info("From the same noise at more steps: anyflow sample --refine %s", folder)


def _sample(
    asked: SampleSettings,
    runs: Path,
    out: Path | None,
    budget: float | None,
    *,
    teacher: bool,
    stream: bool,
    dry_run: bool,
    as_json: bool,
) -> Path | None:
    """Sample; gives the directory where the files are."""
    from anyflow_cli.runs.open import check_address, find_model
    from anyflow_cli.runs.paths import RunPaths
    from anyflow_cli.sample.output import SampleRequest, check_directory, make_directory, write_samples

    settings = asked.settings
    paths = RunPaths(runs, settings.name)
    choice = find_model(settings, paths, asked.model, teacher=teacher)
    log.info("Model: %s (%s)", *choice)
    steps = tuple(dict.fromkeys(asked.steps)) if budget is None else (1,)
    request = SampleRequest(asked.prompts, asked.seeds, steps, asked.given)
    total = len(request.pairs) * len(request.nfe)
    if to_stdout := out == Path("-"):
        check_stdout(total, stream=stream, as_json=as_json)
    else:
        check_directory(out)
    if dry_run:
        check_address(choice.address)
        shown = request.nfe if budget is None else f"what {budget:g} s allow"
        facts = {"model": choice.address, "because": choice.why, "prompts": len(asked.prompts), "nfe": shown}
        facts |= {"seeds": list(request.seeds), "videos": total, "out": out or paths.samples}
        print_dry_run("sample", facts, as_json=as_json, recipe=settings)
        return None

    from anyflow_cli.sample.latency_budget import steps_within
    from anyflow_cli.sample.sampler import VideoSampler
    from anyflow_cli.sample.streaming import stream_to_stdout

    opened = VideoSampler.load(choice.address, settings, teacher=teacher, method=asked.method)
    if asked.preview is not None:
        asked.preview.check_model(opened)
    opened.begin(asked.given and asked.given.pixels, asked.later)
    if stream or any(isinstance(each, tuple) for each in request.nfe):
        opened.require_causal()
    if budget is not None:
        request = replace(request, nfe=(steps_within(budget, opened, asked.prompts[0]),))
    if to_stdout:
        pace = stream_to_stdout(opened, request.prompts[0], request.seeds[0], request.nfe[0])
        log.info("%s.", pace.said(settings.model.fps).capitalize())
        return None
    folder = make_directory(out, paths.samples)
    with Progress("sample", total, "videos") as progress:
        record = write_samples(opened, request, folder, settings, choice, progress.update, stream=stream)
    lines = f"{folder / record['sheet']}\n" + "\n".join(str(folder / s["file"]) for s in record["samples"])
    print_result({"out": folder, **record}, as_json=as_json, text=lines)
    return folder


def at_sampled_length(recipe: Recipe) -> Recipe:
    """The recipe for videos of ``sample.frames``; a causal model goes on beyond its trained length."""
    frames = recipe.sample.frames or recipe.model.frames
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"frames": frames})})
