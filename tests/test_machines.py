"""Every command in the tables of docs/machines.md is one that its command line and recipe accept."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from anyflow_cli.recipe.load import load_recipe

PAGE = (Path(__file__).parents[1] / "docs" / "machines.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\|[^\n]*`(anyflow [^`]*)`", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_settings_of_a_row_resolve(command: str) -> None:
    words = shlex.split(command)
    values = {name: [b for a, b in pairwise(words) if a == name] for name in words}
    limits = [f"memory.limit={limit}" for limit in values.get("--memory", [])]
    settings = load_recipe(values["-r"][0], [*values.get("--set", []), *limits])
    assert limits == [] or settings.memory.limit != "auto"


def test_there_are_rows_for_sampling_and_for_both_stages_of_training() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"sample", "train-flowmap", "distill"}
