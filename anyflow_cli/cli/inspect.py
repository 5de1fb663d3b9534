"""``anyflow inspect``: what a model file, folder or address is, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result


def inspect(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="A file, folder, training run, checkpoint or model name.")
    ],
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Say what a file or folder is: model family, sizes, types, and what is missing to run it.

    Only headers are read; nothing is downloaded.
    """
    from anyflow_cli.inspection import inspect_address

    facts = inspect_address(address)
    shown = {
        name.replace("_", " "): _in_words(value) for name, value in facts.items() if value not in ([], None)
    }
    print_result(facts if as_json else shown, as_json=as_json)


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value > 9999:
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {share:.1%}" for name, share in value.items())
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
