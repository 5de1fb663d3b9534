"""``anyflow doctor``: what on this machine would stop a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from anyflow_cli.cli import options
from anyflow_cli.cli.console import print_result
from anyflow_cli.errors import ExitCode

if TYPE_CHECKING:
    from rich.table import Table

    from anyflow_cli.doctor import Finding

STATE_COLORS = {"ok": "green", "note": "yellow", "stop": "bold red"}


def doctor(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
    fix: options.FixOption = None,
    python: options.PythonOption = None,
) -> None:
    """Check versions, devices, disk, memory, models and data for what would stop a run.

    Ends with exit code 1 if something would. Installs nothing without --fix.
    """
    settings = options.load_settings(recipe, assignments)

    from anyflow_cli.doctor import examine, vbench

    if fix is not None:
        from anyflow_cli.evaluate.vbench.environment import create_environment, environment_directory

        create_environment(environment_directory(settings.evaluate.vbench.environment), python)
    findings = list(examine(settings, runs)) if fix is None else [vbench(settings)]
    stopped = any(finding.state == "stop" for finding in findings)
    values = {"ready": not stopped, "findings": [asdict(finding) for finding in findings]}
    print_result(values, as_json=as_json, text=_table(findings))
    if stopped:
        raise typer.Exit(ExitCode.FAILED)


def _table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = Text(finding.text)
        if finding.hint and finding.state != "ok":
            text.append(f"\nhint: {finding.hint}", style="cyan")
        table.add_row(Text(finding.state, style=STATE_COLORS[finding.state]), Text(finding.name), text)
    return table
