"""The program accepts every command in the README, and every file that it names exists."""

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
    """Calls of the program in the code blocks of the README, without comments and pipes."""
    blocks = re.findall(r"```(?:sh|text)\n(.*?)```", README, flags=re.DOTALL)
    lines = [re.split(r"  #| \| ", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [found[1] for line in lines if (found := CALL.search(line))]


def test_the_readme_shows_the_chain() -> None:
    verbs = {command.split()[0] for command in commands()}
    assert verbs >= {"synthesize", "train-flowmap", "distill", "finetune", "sample", "evaluate"}


@pytest.mark.parametrize("command", commands())
def test_a_command_parses(command: str) -> None:
    verb, *arguments = shlex.split(command)
    group: Any = typer.main.get_command(app)
    group.commands[verb].make_context(verb, arguments)  # a UsageError names an unknown option


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_the_target_of_a_link_exists(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/\w+\.sh", README))))
def test_a_script_exists_and_is_executable(script: str) -> None:
    assert (ROOT / script).stat().st_mode & 0o100
