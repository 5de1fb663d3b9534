"""Every option of the command line, once, and the recipe that the options select.

A verb is a function of these options in a module of its own and one row in the table of ``app.py``::

    def distill(
        recipe: options.RecipeOption = options.DEFAULT_RECIPE,
        assignments: options.SetOption = None,
        runs: options.RunsOption = options.DEFAULT_RUNS,
        ...
    ) -> None:
        '''Stage 2: on-policy distillation of an any-step model.'''      # the first line is the help
        settings = options.load_settings(recipe, assignments, {"--seed": ("distill.seed", seed)})

It imports torch and its friends inside the function and lets errors pass: ``app.main`` turns them into
sentences. Results go to stdout through ``print_result``; everything else is logged, which ends on stderr.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from typer.models import OptionInfo

from anyflow_cli.cli.console import set_debug
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.user_text import escaped, path_problem, shortened

if TYPE_CHECKING:
    from anyflow_cli.recipe.load import Override
    from anyflow_cli.recipe.schema import Recipe
    from anyflow_cli.sample.presets import SamplerPreset

log = logging.getLogger(__name__)

DEFAULT_RECIPE = "tiny"
DEFAULT_RUNS = Path("runs")

PATHS = (
    "DIR",
    "FILE",
    "PATH",
    "NAME|PATH",
    "ADDRESS",
    "RUN_A RUN_B",
)  # placeholders of options that take one
_RECIPE = "Recipe"
_OUTPUT = "Output"
_STEPS = "Steps"
_CAUSAL = "Given frames, and causal models"
_MACHINE = "Machine"


def _check_path(param: typer.CallbackParam, value: Any) -> Any:
    """Refuse what cannot be a path or an address, whatever the command would do with it."""
    for one in value if isinstance(value, tuple | list) else (value,):
        text = os.fspath(one) if isinstance(one, Path) else one
        if text is not None and (problem := path_problem(text)):
            option = param.opts[0]
            raise UsageError(f"{option} must {problem}, got {shortened(escaped(text))!r}.", "Correct it.")
    return value


def require_local_directory(option: str, path: Path) -> None:
    """Refuse what cannot be a directory to write in; a dry run says so too."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        hint = "Write to a local directory, then upload it."
        raise UsageError(f"{option} {path} is not a local directory.", hint)
    above = next(place for place in (path, *path.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        raise UsageError(f"{option} {path}: {above} is not a directory.", "Choose another directory.")


def _check_directory(param: typer.CallbackParam, value: Path | None) -> Path | None:
    _check_path(param, value)
    if value is not None and value != Path("-"):
        require_local_directory(param.opts[0], value)
    return value


def _check_output(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a file or directory to write that cannot be in its directory."""
    _check_path(param, value)
    if value is not None:
        require_local_directory(param.opts[0], value.parent)
    return value


def _option(help_: str, *names: str, panel: str | None = None, **settings: Any) -> OptionInfo:
    """Describe an option; its default is hidden unless ``show_default``, and a path is checked."""
    if settings.get("metavar") in PATHS:
        settings.setdefault("callback", _check_path)
    info: OptionInfo = typer.Option(
        *names, help=help_, rich_help_panel=panel, **{"show_default": False, **settings}
    )
    return info


# --- every verb

RecipeOption = Annotated[
    str,
    _option(
        "A shipped recipe (`anyflow recipes list`) or a YAML file.", "--recipe", "-r",
        metavar="NAME|PATH", panel=_RECIPE, show_default=True,
    ),
]  # fmt: skip
ModelRecipeOption = Annotated[
    str | None,
    _option(
        "A shipped recipe (`anyflow recipes list`) or a YAML file. Default: that of --model, else tiny.",
        "--recipe", "-r", metavar="NAME|PATH", panel=_RECIPE,
    ),
]  # fmt: skip
SetOption = Annotated[
    list[str] | None,
    _option(
        "Override one value of the recipe, e.g. distill.steps=100; repeatable.", "--set",
        metavar="KEY=VALUE", panel=_RECIPE,
    ),
]  # fmt: skip
SeedOption = Annotated[
    int | None, _option("Seed, instead of the recipe's.", "--seed", metavar="N", panel=_RECIPE)
]
ProcessesOption = Annotated[
    int | None,
    _option(
        "Processes on this machine, one per GPU; the same as running under torchrun or accelerate launch.",
        "--nproc", metavar="N", panel=_RECIPE,
    ),
]  # fmt: skip
RunsOption = Annotated[
    Path,
    _option(
        "Directory of all runs; this recipe's are in DIR/RECIPE.", "--runs",
        metavar="DIR", panel=_OUTPUT, show_default=True, callback=_check_directory,
    ),
]  # fmt: skip
OutOption = Annotated[
    Path | None,
    _option(
        "Output directory, instead of the one under --runs.", "--out",
        metavar="DIR", panel=_OUTPUT, callback=_check_directory,
    ),
]  # fmt: skip
DryRunOption = Annotated[
    bool, _option("Check everything and print what would be done.", "--dry-run", panel=_OUTPUT)
]
JsonOption = Annotated[bool, _option("Print the result as JSON.", "--json", panel=_OUTPUT)]
DebugOption = Annotated[
    bool,
    _option(
        "Log more, and show the traceback of an error.", "--debug",
        panel=_OUTPUT, callback=set_debug, envvar="ANYFLOW_DEBUG", show_envvar=False,
    ),
]  # fmt: skip
TargetArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="YAML file to create; never overwritten.", callback=_check_output),
]
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a YAML file.")]

# --- models, prompts and samplers

ModelOption = Annotated[
    str | None,
    _option(
        "A diffusers folder, a training run, a checkpoint, or a built-in or Hub name.", "--model",
        metavar="ADDRESS",
    ),
]  # fmt: skip
LoraOption = Annotated[
    list[str] | None,
    _option(
        "LoRA file to merge into --model, at a strength of 1 if none is given; repeatable. Of two experts: "
        "into the one that its name says, or high=FILE or low=FILE.", "--lora",
        metavar="FILE[:STRENGTH]",
    ),
]  # fmt: skip
BaseOption = Annotated[
    str | None,
    _option(
        "The model that --model was trained from: with --format adapter, to extract a LoRA against; with "
        "--transplant, where its lineage does not tell.", "--base", metavar="ADDRESS",
    ),
]  # fmt: skip
TransplantOption = Annotated[
    str | None,
    _option(
        "Add what --model was trained to, times STRENGTH (1), to this base of the same shapes, such as a "
        "fine-tune.", "--transplant", metavar="ADDRESS[:STRENGTH]",
    ),
]  # fmt: skip
RankOption = Annotated[
    int, _option("Rank of the LoRA that --base extracts.", "--rank", min=1, max=4096, metavar="R")
]
TeacherLoraOption = Annotated[
    list[str] | None,
    _option(
        "LoRA file to merge into the teacher, at a strength of 1 if none is given; repeatable.", "--lora",
        metavar="FILE[:STRENGTH]", panel=_RECIPE,
    ),
]  # fmt: skip
InitFromOption = Annotated[
    str | None,
    _option(
        "Any-step model to start from, instead of the one that the preceding stage trained.", "--model",
        metavar="ADDRESS", panel=_RECIPE,
    ),
]  # fmt: skip
PromptOption = Annotated[
    list[str] | None, _option("Text of a video; repeatable.", "--prompt", "-p", metavar="TEXT")
]
PromptsOption = Annotated[
    Path | None, _option("File of prompts: txt, csv, jsonl or parquet.", "--prompts", metavar="FILE")
]
NfeOption = Annotated[
    str | None,
    _option("Step counts to compare, instead of the recipe's.", "--nfe", metavar="N,N,...", panel=_STEPS),
]
NfeScheduleOption = Annotated[
    str | None,
    _option(
        "Step counts to compare, instead of the recipe's. 8:4:2 gives the first chunk of a causal model 8 "
        "steps, the second 4 and all others 2.", "--nfe", metavar="N,N,...", panel=_STEPS,
    ),
]  # fmt: skip
SamplerOption = Annotated[
    Literal["flow-map", "euler", "consistency"] | None,
    _option(
        "Sampler, instead of the model's own; consistency for students of rCM or Self-Forcing.", "--sampler"
    ),
]
PresetOption = Annotated[
    str | None,
    _option(
        "Sample a published few-step or causal model as its own code does: steps, chunks, cache, size; "
        "`anyflow sample --list-presets` lists them.", "--sampler-preset", metavar="NAME",
    ),
]  # fmt: skip
ListPresetsOption = Annotated[
    bool, _option("List the values of --sampler-preset and what each does.", "--list-presets")
]

# --- synthesize

VideoCountOption = Annotated[
    int | None,
    _option(
        "Number of videos; prompts are repeated if there are fewer.", "--count", metavar="N", panel=_RECIPE
    ),
]
FromVideosOption = Annotated[
    Path | None,
    _option(
        "Encode real clips instead; captions in NAME.txt beside each, or in captions.csv (file, caption).",
        "--from-videos", metavar="DIR", panel=_RECIPE,
    ),
]  # fmt: skip
PreviewsOption = Annotated[
    bool | None,
    _option("Keep an mp4 of every video in the shards.", "--previews/--no-previews", panel=_RECIPE),
]
DataOutOption = Annotated[
    str | None,
    _option(
        "Directory of the data set, instead of the one under --runs; --verify takes any address (s3://, hf://).",
        "--out", metavar="DIR", panel=_OUTPUT,
    ),
]  # fmt: skip
VerifyOption = Annotated[
    bool, _option("Check a finished data set: hashes, shapes and values.", "--verify", panel=_OUTPUT)
]

# --- training

StepsOption = Annotated[
    int | None,
    _option(
        "Total optimizer steps; a finished run continues if the number is raised.", "--steps",
        metavar="N", panel=_RECIPE,
    ),
]  # fmt: skip
ObjectiveOption = Annotated[
    str | None,
    _option(
        "flow-map, flow-matching (tunes the teacher) or consistency-ode (a baseline).", "--objective",
        metavar="NAME", panel=_RECIPE,
    ),
]  # fmt: skip
SimulationOption = Annotated[
    str | None,
    _option(
        "How the student's samples are simulated: flow-map, or as baselines consistency or fixed-steps.",
        "--simulation",
        metavar="NAME", panel=_RECIPE,
    ),
]  # fmt: skip
DataOption = Annotated[
    Path | None,
    _option(
        "Videos with captions (NAME.txt beside each, or captions.csv), or a data set of latents. Default: "
        "clips of the world that the recipe names.", "--data", metavar="DIR", panel=_RECIPE,
    ),
]  # fmt: skip

# --- sample

FramesOption = Annotated[
    int | None,
    _option(
        "Frames per video, instead of the recipe's: 1, 5, 9, ... Causal models take any length.", "--frames",
        metavar="N",
    ),
]  # fmt: skip
SeedCountOption = Annotated[
    int,
    _option(
        "Seeds per prompt, counting from --seed.", "--count",
        min=1, max=10_000, metavar="K", show_default=True,
    ),
]  # fmt: skip
TeacherOption = Annotated[
    bool, _option("Sample the recipe's teacher with guidance: two evaluations per step.", "--teacher")
]
PreviewOption = Annotated[
    bool, _option("Sample at 2 steps; --refine later repeats it at more.", "--preview", panel=_STEPS)
]
RefineOption = Annotated[
    Path | None,
    _option(
        "Resample the videos of an earlier sampling (its directory, or one mp4) from the same noise, at 32 "
        "steps or those of --nfe.", "--refine", metavar="PATH", panel=_STEPS,
    ),
]  # fmt: skip
LatencyBudgetOption = Annotated[
    float | None,
    _option(
        "Take as many steps as fit into this time per video, from the measured time of a step.",
        "--latency-budget", min=0, max=86_400, metavar="SECONDS", panel=_STEPS,
    ),
]  # fmt: skip
ImageOption = Annotated[
    Path | None,
    _option(
        "Picture to use as the first frame, scaled and cropped to the recipe's size.", "--image",
        metavar="FILE", panel=_CAUSAL,
    ),
]  # fmt: skip
LastImageOption = Annotated[
    Path | None,
    _option(
        "Picture to use as the last frame (Wan FLF2V and I2V).", "--last-image", metavar="FILE", panel=_CAUSAL
    ),
]
VideoOption = Annotated[Path | None, _option("Video to continue.", "--video", metavar="FILE", panel=_CAUSAL)]
VideoFramesOption = Annotated[
    int | None,
    _option(
        "Frames of --video to condition on. Default: at most half of the frames of the result.",
        "--video-frames", min=1, metavar="N", panel=_CAUSAL,
    ),
]  # fmt: skip
ThenOption = Annotated[
    list[str] | None,
    _option("Prompt that takes over from this frame on; repeatable.", "--then",
            metavar="FRAME:TEXT", panel=_CAUSAL),
]  # fmt: skip
StreamOption = Annotated[
    bool,
    _option(
        "Write each chunk when it is finished, to NAME.part.mp4, which plays while it grows; with --out - to "
        "standard output, for a player.", "--stream", panel=_CAUSAL,
    ),
]  # fmt: skip

# --- evaluate

VideosOption = Annotated[
    Path | None,
    _option(
        "Score existing videos: PROMPT-K.mp4, or any names with captions.csv or NAME.txt.", "--videos",
        metavar="DIR",
    ),
]  # fmt: skip
PipelineOption = Annotated[
    Path | None,
    _option(
        "Sample with a text-to-video pipeline of diffusers (LTX, CogVideoX, HunyuanVideo, ...) in DIR, with "
        "its own scheduler and guidance.", "--pipeline", metavar="DIR",
    ),
]  # fmt: skip
SuiteOption = Annotated[
    Literal["shapes", "vbench", "vbench-i2v"] | None, _option("Suite, instead of the recipe's.", "--suite")
]
TaskOption = Annotated[
    Literal["t2v", "i2v"] | None,
    _option("Videos from text, or from text and a first frame (i2v).", "--task"),
]
LimitOption = Annotated[
    int | None,
    _option("Only the first K prompts; the scores are not comparable.", "--limit", min=1, metavar="K"),
]
CompareOption = Annotated[
    tuple[str, str] | None,
    _option(
        "Two models, or directories of finished evaluations: their difference, paired by prompt.",
        "--compare", metavar="RUN_A RUN_B",
    ),
]  # fmt: skip
FailBelowOption = Annotated[
    float | None,
    _option(
        "End with exit code 1 if Total is below X at any step count.", "--fail-below",
        min=0, max=100, metavar="X",
    ),
]  # fmt: skip
PruneOption = Annotated[
    bool, _option("Delete the videos and scores of earlier models.", "--prune", panel=_OUTPUT)
]
LeaderboardOption = Annotated[
    Path | None,
    _option(
        "Also write videos and scores in the format of VBench's leaderboard.", "--export",
        metavar="DIR", panel=_OUTPUT, callback=_check_directory,
    ),
]  # fmt: skip

# --- export, plan, doctor

ExportPathOption = Annotated[
    Path,
    _option(
        "Output: a directory, or a .safetensors file for merged and comfyui.", "--out",
        metavar="PATH", panel=_OUTPUT, callback=_check_output,
    ),
]  # fmt: skip
FormatOption = Annotated[
    Literal["diffusers", "merged", "comfyui", "adapter"],
    _option(
        "A pipeline folder; the network in one file; the same with ComfyUI's names; the LoRA (PEFT).",
        "--format", show_default=True,
    ),
]  # fmt: skip
DtypeOption = Annotated[
    Literal["fp32", "bf16", "fp16", "fp8"] | None,
    _option("Type of the stored weights; fp8: of the blocks' matrices, bf16 elsewhere.", "--dtype"),
]
GpusOption = Annotated[
    str | None,
    _option(
        "GPUs to plan for, e.g. 8x80GB or 8xH100. Default: this machine.", "--gpus",
        metavar="NxSIZE", panel=_MACHINE,
    ),
]  # fmt: skip
PeakOption = Annotated[
    float | None,
    _option(
        "Dense bf16 speed per GPU. Default: that of the named GPU, else of an H100.", "--peak",
        metavar="TFLOPS", min=0.001, max=1e6, panel=_MACHINE,
    ),
]  # fmt: skip
MfuOption = Annotated[
    float,
    _option(
        "Model FLOPs utilization: the share of the peak that is reached.", "--mfu",
        metavar="SHARE", min=0.01, max=1, panel=_MACHINE, show_default=True,
    ),
]  # fmt: skip
CalibrateOption = Annotated[
    Path | None,
    _option(
        "Take the speeds that `anyflow bench` measured, from its bench.json, instead of --peak and --mfu.",
        "--calibrate", metavar="FILE", panel=_MACHINE,
    ),
]  # fmt: skip
BenchPartOption = Annotated[
    Literal["load", "sampling", "training"] | None,
    _option("Measure only this. Default: everything.", "--only", panel=_MACHINE),
]
BenchBatchOption = Annotated[
    int | None,
    _option(
        "Samples per training iteration. Default: the recipe's micro batch, else an eighth of its batch.",
        "--batch", metavar="N", min=1, max=4096, panel=_MACHINE,
    ),
]  # fmt: skip
RepeatsOption = Annotated[
    int,
    _option(
        "Runs of which the median is taken.", "--repeats",
        metavar="N", min=1, max=1000, panel=_MACHINE, show_default=True,
    ),
]  # fmt: skip
BenchOutOption = Annotated[
    Path | None,
    _option(
        "File to write, instead of bench.json under --runs.", "--out",
        metavar="FILE", panel=_OUTPUT, callback=_check_output,
    ),
]  # fmt: skip
MemoryOption = Annotated[
    str | None,
    _option(
        "GiB of the device's memory to stay within; parts of the model are then freed, moved, streamed or "
        "stored in fp8, mildest first. Default: auto, all of a GPU's.", "--memory",
        metavar="auto|GIB", panel=_MACHINE,
    ),
]  # fmt: skip
FixOption = Annotated[
    Literal["vbench"] | None, _option("Create VBench's own environment: 2.2 GB, from PyPI.", "--fix")
]
PythonOption = Annotated[
    str | None, _option("Python 3.8 to 3.11 for that environment.", "--python", metavar="PATH")
]


def load_settings(
    recipe: str,
    assignments: Iterable[str] | None = None,
    options: Mapping[str, tuple[str, Any]] | None = None,
    defaults: Iterable[Override] = (),
) -> Recipe:
    """Load a recipe with the overrides of the command line.

    Args:
        recipe: The value of ``--recipe``.
        assignments: The values of ``--set``.
        options: Other options that set a key, as ``{"--nfe": ("sample.nfe", (1, 4))}``; None leaves the
            recipe's value. They win over ``--set``, and a bad value is reported under the option's name.
        defaults: Values that other options imply; ``--set`` wins over them.
    """
    from anyflow_cli.recipe.load import Override, load_recipe

    named = ((option, key, value) for option, (key, value) in (options or {}).items() if value is not None)
    overrides = [Override(key, value, option) for option, key, value in named]
    return load_recipe(recipe, [*defaults, *(assignments or ()), *overrides])


def read_preset(name: str | None, steps: object, others: Mapping[str, object]) -> SamplerPreset | None:
    """Read ``--sampler-preset``; refuse what it already says.

    Args:
        name: Its value.
        steps: The value of an option that says how many steps to take.
        others: Options that cannot be combined with it.
    """
    if name is None:
        return None

    from anyflow_cli.sample.presets import preset_of

    preset = preset_of(name)
    if preset is not None and preset.steps is not None:
        others = {**others, "a number of steps": steps}
    for option, value in others.items():
        if value is not None:
            raise UsageError(
                f"--sampler-preset {name} says how to sample, and so does {option}.", "Omit one of the two."
            )
    return preset


def parse_memory(text: str | None) -> str | float | None:
    """Parse ``--memory``; the recipe's schema checks the range of the number."""
    if text is None or text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        message = f"--memory takes auto or a number of GiB, not {shortened(repr(text))}."
        raise UsageError(message, "Write --memory 12.") from None


def with_placement(recipe: Recipe, command: str, model: str | None = None) -> Recipe:
    """Choose where the parts of the model are while a command samples, and say so.

    A CPU keeps everything in its memory, unless a limit is given.

    Args:
        recipe: Its section ``memory`` may be "auto" in part.
        command: "sample", "teacher", "stream", "evaluate" or "synthesize".
        model: Address of the model that is sampled; None: the recipe's teacher.
    """
    import torch

    if recipe.memory.weights == "int8":
        from anyflow_cli.model.base_storage import require_package

        require_package("int8")
    if recipe.memory.limit == "auto" and not torch.cuda.is_available():
        return recipe

    from anyflow_cli.plan.estimate import place

    placed, said = place(recipe, command, model)
    log.info("%s", said)
    return placed


def recipe_of_model(model: str | None) -> str:
    """Recipe for ``--model`` where ``--recipe`` is not given: the model's own, if it is known."""
    from anyflow_cli.runs.families import family_recipe

    if model is None:
        return DEFAULT_RECIPE
    found = family_recipe(model)
    if found is None:
        log.warning("%s belongs to no known family; recipe %s is used.", model, DEFAULT_RECIPE)
    return found or DEFAULT_RECIPE


def parse_steps(text: str | None) -> tuple[int, ...] | None:
    """Parse ``--nfe 1,4,32``; the recipe's schema checks the range of the numbers."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"--nfe takes step counts such as 1,4,32, not {shortened(repr(text))}."
        raise UsageError(message, "Write --nfe 1,4,32.") from None


def examples(*lines: str) -> str:
    """Format the examples at the end of a command's help."""
    return "\n\n".join(["[bold]Examples[/bold]", *(f"  [dim]$[/dim] {escape(line)}" for line in lines)])


def merge_lora_files(recipe: Recipe, files: list[str] | None, key: str) -> Recipe:
    """The recipe with the files of ``--lora`` merged into the model that a key names."""
    from anyflow_cli.recipe.compare import flat, with_values

    return with_values(recipe, {key: with_lora_files(flat(recipe)[key], files)}) if files else recipe


def with_lora_files(model: str | None, files: list[str] | None) -> str | None:
    """The address of ``--model`` with the files of ``--lora``."""
    if not files:
        return model
    if model is None:
        raise UsageError("--lora needs a model to be merged into.", "Name it with --model.")

    from anyflow_cli.model.lora_formats import split_loras, with_loras

    address = with_loras(model, files)
    _, found = split_loras(address)
    if len(found) != len(files):
        raise UsageError(
            f"--lora takes FILE or FILE:STRENGTH, not {', '.join(files)}.",
            "Files end with .safetensors or .pt; of a PEFT folder, name its adapter_model.safetensors.",
        )
    return address
