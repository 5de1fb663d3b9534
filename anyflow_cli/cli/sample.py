"""``anyflow sample``: videos from prompts, at one or several step counts side by side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from anyflow_cli.cli.common import (
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
    parse_steps,
    print_plan,
    print_result,
    resolve,
)
from anyflow_cli.cli.progress import Progress
from anyflow_cli.errors import UsageError

if TYPE_CHECKING:
    from anyflow_cli.data.clips import Pixels
    from anyflow_cli.recipe.schema import Recipe

EXAMPLES = examples(
    'anyflow sample --prompt "a small red circle moving left"',
    'anyflow sample -p "a large blue square moving up" --nfe 1,2,4,32 --count 3',
    "anyflow sample --prompts prompts.txt --model runs/tiny/distill --out samples",
    'anyflow sample -p "a green triangle" --teacher',
    'anyflow sample -p "a red circle" --model nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers --image first.png',
)
WITHOUT_PROMPTS = 4
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
    typer.Option(metavar="N,N,...", show_default=False, help="Step counts, instead of the recipe's."),
]
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
FirstStepsOption = Annotated[
    int | None,
    typer.Option(
        "--nfe-first", min=1, metavar="N", show_default=False, rich_help_panel=CAUSAL_PANEL,
        help="Steps of the first chunk that is sampled; --nfe then holds for the others.",
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
    count: CountOption = 1,
    teacher: TeacherOption = False,
    model: ModelOption = None,
    sampler: SamplerOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    video_frames: VideoFramesOption = None,
    nfe_first: FirstStepsOption = None,
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
    options = {"--nfe": ("sample.nfe", parse_steps(nfe)), "--seed": ("sample.seed", seed)}
    settings = resolve(recipe, assignments, options)
    texts = _prompts(settings, prompt, prompts)
    given = _given_frames(settings, image, video, video_frames)

    from anyflow_cli.addresses import check_address, find_model
    from anyflow_cli.recipe.paths import RunPaths
    from anyflow_cli.samples import Request, check_directory, make_directory, write_samples

    paths = RunPaths(runs, settings.name)
    choice = find_model(settings, paths, model, teacher=teacher)
    log.info("Model: %s (%s)", *choice)
    check_directory(out)
    steps = (settings.sample.teacher_steps,) if teacher and nfe is None else settings.sample.nfe
    first = settings.sample.seed
    request = Request(texts, range(first, first + count), tuple(dict.fromkeys(steps)))
    total = len(request.pairs) * len(request.nfe)
    if dry_run:
        check_address(choice.address)
        facts = {"model": choice.address, "because": choice.why, "prompts": len(texts), "nfe": request.nfe}
        facts |= {"seeds": list(request.seeds), "videos": total, "out": out or paths.samples}
        return print_plan("sample", facts, as_json=as_json)

    from anyflow_cli.sample import Sampler

    opened = Sampler.load(choice.address, settings, teacher=teacher, method=sampler)
    opened.begin(given, nfe_first)
    folder = make_directory(out, paths.samples)
    with Progress("sample", total, "videos") as progress:
        record = write_samples(opened, request, folder, settings, choice, progress.update)
    shown = f"{folder / record['sheet']}\n" + "\n".join(str(folder / s["file"]) for s in record["samples"])
    print_result({"out": folder, **record}, as_json=as_json, text=shown)


def _given_frames(
    settings: Recipe, image: Path | None, video: Path | None, count: int | None
) -> Pixels | None:
    """The first frames that a picture or a video gives, at the recipe's size and rate."""
    if image is not None and video is not None:
        raise UsageError("A video begins with --image or with --video, not with both.", "Leave one out.")
    if video is None and count is not None:
        raise UsageError("--video-frames says how much of --video is kept, and there is none.", "Give one.")
    path = image or video
    if path is None:
        return None
    if not path.is_file():
        raise UsageError(f"{path} is no file.", "Give a picture with --image, or a video with --video.")

    from anyflow_cli.data.clips import ClipFormat, UnusableClipError, read_image, read_start

    shape = settings.model
    wanted = ClipFormat(count or max(shape.frames // 2, 1), shape.fps, shape.height, shape.width)
    try:
        clip = read_image(path, wanted) if video is None else read_start(path, wanted)
    except UnusableClipError as error:
        raise UsageError(f"{path}: {error.message}.", "Give a file that ffmpeg can read.") from error
    for change in clip.changes:
        log.info("%s: %s.", path.name, change)
    whole = (len(clip.pixels) - 1) // 4 * 4 + 1
    if whole < len(clip.pixels):
        log.info("%s: the first %d frames are kept; the VAE takes 1, 5, 9, ...", path.name, whole)
    return clip.pixels[:whole]


def _prompts(settings: Recipe, given: list[str] | None, file: Path | None) -> list[str]:
    """The prompts of the command line and of the file; without any, a few of the recipe's own."""
    from anyflow_cli.data.prompts import checked_text, read_prompts, world_captions

    texts = [checked_text("--prompt", text.strip()) for text in given or ()]
    if not all(texts):
        raise UsageError("A prompt is empty.", 'Say what to show: --prompt "a small red circle moving left".')
    if file is not None:
        texts += read_prompts(file)
    if texts:
        return texts
    log.info("No prompt was given; these are the first %d of recipe %s.", WITHOUT_PROMPTS, settings.name)
    if settings.data.prompts is not None:
        return read_prompts(settings.data.prompts)[:WITHOUT_PROMPTS]
    return world_captions(settings.data.world, WITHOUT_PROMPTS, settings.sample.seed)
