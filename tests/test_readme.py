"""Every command in the README is one that the program understands, and every file it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from anyflow_cli.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CALL = re.compile(r"(?:^|\$ |-m )(?:anyflow|anyflow_cli) ([a-z].*)$")


def commands() -> list[str]:
    """The lines of the README's code blocks that call the program, without comments and pipes."""
    blocks = re.findall(r"```(?:sh|text)\n(.*?)```", README, flags=re.DOTALL)
    lines = [re.split(r"  #| \| ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [found[1] for line in lines if (found := CALL.search(line))]


def test_the_readme_shows_the_chain() -> None:
    verbs = {command.split()[0] for command in commands()}
    assert verbs >= {"synthesize", "train-flowmap", "distill", "finetune", "sample", "evaluate"}


@pytest.mark.parametrize("command", commands())
def test_a_command_is_understood(command: str) -> None:
    verb, *arguments = shlex.split(command)
    group: Any = typer.main.get_command(app)
    group.commands[verb].make_context(verb, arguments)  # a UsageError names an unknown option


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_a_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/\w+\.sh", README))))
def test_a_script_is_there_and_can_be_run(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o100
