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
    from anyflow_cli.recipe.schema import Recipe

EXAMPLES = examples(
    'anyflow sample --prompt "a small red circle moving left"',
    'anyflow sample -p "a large blue square moving up" --nfe 1,2,4,32 --count 3',
    "anyflow sample --prompts prompts.txt --model runs/tiny/distill --out samples",
    'anyflow sample -p "a green triangle" --teacher',
)
WITHOUT_PROMPTS = 4

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
    folder = make_directory(out, paths.samples)
    with Progress("sample", total, "videos") as progress:
        record = write_samples(opened, request, folder, settings, choice, progress.update)
    shown = f"{folder / record['sheet']}\n" + "\n".join(str(folder / s["file"]) for s in record["samples"])
    print_result({"out": folder, **record}, as_json=as_json, text=shown)


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
