"""The command line as a whole: the table of verbs, and ``main``, where every error becomes a sentence.

No verb does its work here and no heavy module is imported: ``anyflow --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from anyflow_cli import __version__
from anyflow_cli.cli import (
    distill,
    doctor,
    evaluate,
    export,
    finetune,
    plan,
    recipes,
    sample,
    synthesize,
    train_flowmap,
)
from anyflow_cli.cli.console import debugging, print_error, start_logging, stderr
from anyflow_cli.cli.errors import INTERRUPTED, failure_of
from anyflow_cli.cli.launch import command_line
from anyflow_cli.cli.options import examples

CHAIN = "The chain, in its order"
USE = "Use and measure"
AROUND = "Around it"


class Verb(NamedTuple):
    """A command: its name, its function, the examples of its help, the panel it stands in."""

    name: str
    function: Callable[..., None]
    examples: str
    panel: str


VERBS: tuple[Verb, ...] = (
    Verb("synthesize", synthesize.synthesize, synthesize.EXAMPLES, CHAIN),
    Verb("train-flowmap", train_flowmap.train_flowmap, train_flowmap.EXAMPLES, CHAIN),
    Verb("distill", distill.distill, distill.EXAMPLES, CHAIN),
    Verb("finetune", finetune.finetune, finetune.EXAMPLES, CHAIN),
    Verb("sample", sample.sample, sample.EXAMPLES, USE),
    Verb("evaluate", evaluate.evaluate, evaluate.EXAMPLES, USE),
    Verb("export", export.export, export.EXAMPLES, AROUND),
    Verb("plan", plan.plan, plan.EXAMPLES, AROUND),
    Verb("doctor", doctor.doctor, doctor.EXAMPLES, AROUND),
)

app = typer.Typer(
    help="Turn a pretrained video diffusion model into one that samples at any number of steps, and use it.",
    epilog=examples("anyflow recipes", "anyflow recipes copy tiny mine.yaml"),
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _verb in VERBS:
    app.command(_verb.name, epilog=_verb.examples, rich_help_panel=_verb.panel)(_verb.function)
app.add_typer(recipes.app, name="recipes", rich_help_panel=AROUND)


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
    """Run one command and give its exit code; ``arguments`` default to those of the process."""
    start_logging()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    command_line.set(given)
    command: Any = typer.main.get_command(app)
    try:
        code = command.main(given, prog_name="anyflow", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        return _flushed(_report(error))
    if code == INTERRUPTED:
        print_error("Interrupted.")
    return _flushed(code if isinstance(code, int) else 0)


def _flushed(code: int) -> int:
    """The exit code once stdout has taken all that was printed.

    Left to the interpreter's end, a full disk there would end with a code of its own.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left finds room there
        gone = isinstance(error, BrokenPipeError)  # a reader like `head`; rich ends with 1 then, too
        return code or (1 if gone else _report(error))
    return code


def _report(error: Exception) -> int:
    """Print what went wrong; only a bug, or ``--debug``, shows the traceback."""
    failure = failure_of(error)
    if failure is None or debugging():
        stderr.print("".join(traceback.format_exception(error)).rstrip(), soft_wrap=True)
    if failure is None:
        print_error(
            f"Unexpected {type(error).__name__}: {error}", "This is a bug in anyflow; please report it."
        )
        return 1
    if not failure.said:
        print_error(failure.message, failure.hint)
    return failure.code


if __name__ == "__main__":
    sys.exit(main())
