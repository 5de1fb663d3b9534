"""The two streams: logs, progress and errors on stderr, results on stdout.

Nothing printed here is read as markup, since prompts and paths are data. Colour follows the terminal and
``NO_COLOR``. Of several processes only the first speaks; errors come from any.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from anyflow_cli.runs.resources import Resource

from anyflow_cli.utils.distributed import is_main_process

PACKAGE = "anyflow_cli"  # the parent of every module's logger
WIDE = 200  # columns of a table that goes to a file or pipe

stderr = Console(stderr=True, highlight=False, markup=False, emoji=False)


class _Handler(logging.Handler):
    """Prints through the console of the progress bars, so that a line stands above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; anything above info is named."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        stderr.print(
            f"{prefix}{self.format(record)}", style="dim" if not prefix else "yellow", soft_wrap=True
        )


def start_logging() -> None:
    """Send what the package logs to stderr: infos of the first process, warnings of all."""
    logger = logging.getLogger(PACKAGE)
    logger.handlers = [_Handler()]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def set_debug(on: bool) -> bool:
    """Switch debug messages, and with them tracebacks, on (the callback of ``--debug``)."""
    if on:
        logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    return on


def debugging() -> bool:
    """Whether ``--debug`` was given."""
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
    stdout = Console(highlight=False, markup=False, emoji=False)
    if as_json:
        return stdout.print(json.dumps(values, indent=2, ensure_ascii=False, default=str), soft_wrap=True)
    if not stdout.is_terminal:
        stdout.width = WIDE
    stdout.print(facts_table(values) if text is None else text, soft_wrap=isinstance(text, str))


def facts_table(values: Mapping[str, Any]) -> Table:
    """Lay out names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(str(value)))
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
