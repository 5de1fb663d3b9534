"""The two streams: logs, progress and errors on stderr, results on stdout.

Prompts, paths and keys are data: nothing printed here is read as markup, and control characters, which a
terminal would obey, are escaped. Color follows the terminal and ``NO_COLOR``. Of several processes only the
first prints results; errors come from any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anyflow_cli.runs.resources import Resource

from anyflow_cli.utils.distributed import is_main_process
from anyflow_cli.utils.user_text import CONTROL, escaped

PACKAGE = "anyflow_cli"  # the parent of every module's logger
WIDE = 200  # columns of a table in a file or pipe


class SafeConsole(Console):
    """A console that shows control characters instead of sending them to the terminal."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as usual, with the control characters of texts escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escaped(segment.text), segment.style)


stderr = SafeConsole(stderr=True)


class _Handler(logging.Handler):
    """Prints through the console of the progress bars, so that a line appears above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, with its level if above info."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        stderr.print(
            f"{prefix}{self.format(record)}", style="dim" if not prefix else "yellow", soft_wrap=True
        )


def start_logging() -> None:
    """Send the package's logs to stderr: infos of the first process, warnings of all."""
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [_Handler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def set_debug(on: bool) -> bool:
    """Enable debug messages and tracebacks (the callback of ``--debug``)."""
    if on:
        logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    return on


def debugging() -> bool:
    """Whether ``--debug`` is set."""
    return logging.getLogger(PACKAGE).isEnabledFor(logging.DEBUG)


def print_error(message: str, hint: str | None = None) -> None:
    """Print ``error:`` and ``hint:`` on stderr."""
    stderr.print(Text.assemble(("error:", "bold red"), " ", message), soft_wrap=True)
    if hint:
        stderr.print(Text.assemble(("hint:", "bold cyan"), " ", hint), soft_wrap=True)


def print_result(values: Mapping[str, Any], *, as_json: bool, text: RenderableType | None = None) -> None:
    """Print a command's result on stdout: as JSON, or for people as ``text`` or a table of the values."""
    if not is_main_process():
        return
    stdout = SafeConsole()
    if as_json:
        written = json.dumps(values, indent=2, ensure_ascii=False, default=str)
        return stdout.print(CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", written), soft_wrap=True)
    if not stdout.is_terminal:
        stdout.width = WIDE
    stdout.print(facts_table(values) if text is None else text, soft_wrap=isinstance(text, str))


def facts_table(values: Mapping[str, Any]) -> Table:
    """Lay out names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        listed = isinstance(value, list | tuple) and not hasattr(value, "_fields")
        table.add_row(Text(name), Text(", ".join(map(str, value)) if listed else str(value)))
    return table


def print_dry_run(
    command: str, facts: Mapping[str, Any], resources: Sequence[Resource] = (), *, as_json: bool
) -> None:
    """Print what ``--dry-run`` found: everything resolved and checked, nothing loaded or written.

    What the command starts from may be missing; what is there and cannot be used is refused.
    """
    from anyflow_cli.runs.resources import check_usable

    check_usable(resources)
    values = {"command": command, "dry_run": True, **facts, "needs": [one._asdict() for one in resources]}
    title = f"anyflow {command} would do this; nothing was loaded or written."
    table = facts_table({**facts, **{f"needs {one.name}": one for one in resources}})
    print_result(values, as_json=as_json, text=Group(Text(title), table))
