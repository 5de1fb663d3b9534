"""The command line: the table of verbs, and ``main``, where exceptions become messages and exit codes.

No verb does its work here and no heavy module is imported: ``anyflow --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, NoReturn

import typer

from anyflow_cli import __version__
from anyflow_cli.cli import (
    bench,
    distill,
    doctor,
    evaluate,
    export,
    finetune,
    inspect,
    plan,
    recipes,
    sample,
    synthesize,
    train_flowmap,
)
from anyflow_cli.cli.console import debugging, print_error, start_logging, stderr
from anyflow_cli.cli.errors import failure_of
from anyflow_cli.cli.launch import command_line
from anyflow_cli.cli.options import examples
from anyflow_cli.errors import ExitCode
from anyflow_cli.utils.environment import check_environment
from anyflow_cli.utils.signals import ignore_signals, interruptible

TRAIN = "Data and training, in order"
USE = "Sample and evaluate"
TOOLS = "Tools"


class Verb(NamedTuple):
    """A command: its name, its function, and the panel and the examples of its help."""

    name: str
    function: Callable[..., None]
    panel: str
    examples: str


VERBS: tuple[Verb, ...] = (
    Verb("synthesize", synthesize.synthesize, TRAIN, examples(
        "anyflow synthesize",
        "anyflow synthesize --prompts prompts.txt --out data/mine",
        "anyflow synthesize --from-videos clips/ --out data/clips",
        "anyflow synthesize --verify",
        "torchrun --nproc-per-node 8 --no-python anyflow synthesize -r bidirectional1b --prompts prompts.txt",
    )),
    Verb("train-flowmap", train_flowmap.train_flowmap, TRAIN, examples(
        "anyflow train-flowmap",
        "anyflow train-flowmap --set train_flowmap.steps=1000",
        "anyflow train-flowmap --objective flow-matching   (tunes the teacher)",
        "anyflow train-flowmap -r bidirectional1b --nproc 8",
    )),
    Verb("distill", distill.distill, TRAIN, examples(
        "anyflow distill",
        "anyflow distill --simulation consistency",
        "anyflow distill --set distill.step_budgets=[2,4,8] --set distill.joint=false",
        "anyflow distill -r bidirectional1b --nproc 8",
    )),
    Verb("finetune", finetune.finetune, TRAIN, examples(
        "anyflow finetune --data clips/",
        "anyflow finetune --data data/mine --model runs/tiny/distill --steps 300",
        "anyflow finetune --data clips/ --set finetune.optimizer.lr=2e-5",
    )),
    Verb("sample", sample.sample, USE, examples(
        'anyflow sample --prompt "a small red circle moving left"',
        'anyflow sample -p "a large blue square moving up" --nfe 1,2,4,32 --count 3',
        "anyflow sample --prompts prompts.txt --model runs/tiny/distill --out samples",
        'anyflow sample -p "a green triangle" --teacher',
        'anyflow sample -p "a cat" --model self_forcing_dmd.pt --sampler-preset self-forcing',
        'anyflow sample -p "a red circle" --model nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers --image first.png',
        'anyflow sample -p "a red circle" --then "81: a blue square" --frames 161 --nfe 4,8:2 --model far',
        'anyflow sample -p "a red circle" --nfe 2 --model far --stream --out - | mpv -',
    )),
    Verb("evaluate", evaluate.evaluate, USE, examples(
        "anyflow evaluate",
        "anyflow evaluate --nfe 1,2,4,8,16,32",
        "anyflow evaluate --model runs/tiny/train-flowmap --limit 8",
        "anyflow evaluate --task i2v --model nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
        "anyflow evaluate --nfe 4 --fail-below 85",
        "anyflow evaluate --suite vbench --nfe 4,32 --recipe bidirectional1b",
        "anyflow evaluate --suite vbench --videos my-videos/",
        "anyflow evaluate --suite vbench --model self_forcing_dmd.pt --sampler-preset self-forcing",
        "anyflow evaluate --suite vbench --pipeline LTX-Video/",
        "anyflow evaluate --compare runs/tiny/train-flowmap runs/tiny/distill",
    )),
    Verb("export", export.export, TOOLS, examples(
        "anyflow export --out my-model",
        "anyflow export --model runs/tiny/distill/checkpoints/step-000040 --format merged --out s40",
        "anyflow export --model runs/mine/distill --format comfyui --dtype bf16 --out mine.safetensors",
    )),
    Verb("plan", plan.plan, TOOLS, examples(
        "anyflow plan --recipe bidirectional1b --gpus 8x80GB",
        "anyflow plan -r bidirectional14b --gpus 8xH200 --set distill.micro_batch=1",
        "anyflow plan -r bidirectional1b --gpus 64xH100 --mfu 0.3 --json",
        "anyflow plan -r bidirectional1b --calibrate runs/bidirectional1b/bench.json",
        "anyflow plan   (tiny, on this machine)",
    )),
    Verb("bench", bench.bench, TOOLS, examples(
        "anyflow bench",
        "anyflow bench -r causal1b --only sampling",
        "anyflow bench -r bidirectional1b --batch 2 --set model.compile=true --json",
    )),
    Verb("inspect", inspect.inspect, TOOLS, examples(
        "anyflow inspect tiny-anyflow",
        "anyflow inspect wan2.1_t2v_1.3B_fp8_scaled.safetensors",
        "anyflow inspect runs/tiny/distill --json",
    )),
    Verb("doctor", doctor.doctor, TOOLS, examples(
        "anyflow doctor", "anyflow doctor --recipe mine.yaml --json", "anyflow doctor --fix vbench",
    )),
)  # fmt: skip

app = typer.Typer(
    help="Turn a pretrained video diffusion model into one that samples at any number of steps, and use it.",
    epilog=examples("anyflow recipes", "anyflow recipes copy tiny mine.yaml"),
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in VERBS:
    app.command(_verb.name, epilog=_verb.examples, rich_help_panel=_verb.panel)(_verb.function)
app.add_typer(recipes.recipes_app, name="recipes", rich_help_panel=TOOLS)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"anyflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` default to those of the process."""
    start_logging()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command_line.set(given)
    command: Any = typer.main.get_command(app)
    try:
        check_environment()
        with interruptible():
            code = command.main(given, prog_name="anyflow", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # a file that ends early, which click takes for Ctrl-D
            return _flushed(_report(error.__cause__))
        code = ExitCode.INTERRUPTED
    except Exception as error:
        return _flushed(_report(error))
    if code == ExitCode.INTERRUPTED:
        # Where the signal came in code that a library executes from a string, as dataclasses does on import,
        # `python -m` would end by SIGINT instead of with this code; CPython forgets that as it executes.
        exec("")
        print_error("Interrupted.")
    return _flushed(code if isinstance(code, int) else ExitCode.DONE)


def run_command_line() -> NoReturn:
    """Run the command of this process and end it; a signal that comes after its work changes nothing."""
    code = main()
    ignore_signals()
    sys.exit(code)


def _flushed(code: int) -> int:
    """Flush stdout and return the exit code; at the interpreter's end a full disk would choose its own."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still buffered
        gone = isinstance(error, BrokenPipeError)  # a reader like `head`; rich ends with 1 as well
        return code or (ExitCode.FAILED if gone else _report(error))
    return code


def _report(error: BaseException) -> int:
    """Print what went wrong and return the exit code; only a bug, or ``--debug``, shows the traceback."""
    failure = failure_of(error)
    if failure is None or debugging():
        stderr.print("".join(traceback.format_exception(error)).rstrip(), soft_wrap=True)
    if failure is None:
        print_error(
            f"Unexpected {type(error).__name__}: {error}", "This is a bug in anyflow; please report it."
        )
        return ExitCode.FAILED
    if not failure.silent:
        print_error(failure.message, failure.hint)
    return failure.code


if __name__ == "__main__":
    run_command_line()
