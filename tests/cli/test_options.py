"""Options that stand for a key of the recipe, and the printing of results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.cli.console import print_dry_run, print_result
from anyflow_cli.cli.options import load_settings
from anyflow_cli.errors import UsageError

Capture = pytest.CaptureFixture[str]


def test_an_option_wins_over_set_and_none_leaves_the_recipe() -> None:
    options = {"--seed": ("sample.seed", 5), "--nfe": ("sample.nfe", None)}
    recipe = load_settings("tiny", ["sample.seed=1"], options)
    assert recipe.sample.seed == 5
    assert recipe.sample.nfe == load_settings("tiny").sample.nfe


def test_a_bad_option_is_named_as_it_was_given() -> None:
    with pytest.raises(UsageError, match=r"^--nfe: sample.nfe\[0\] must be a number of at least 1, got 0\.$"):
        load_settings("tiny", None, {"--nfe": ("sample.nfe", (0,))})


def test_results_are_words_or_json_and_never_markup(capsys: Capture) -> None:
    values: dict[str, object] = {"prompt": "a [red]circle[/red] :smile:", "path": Path("a") / ("long" * 60)}
    print_result(values, as_json=True)
    assert json.loads(capsys.readouterr().out) == {name: str(value) for name, value in values.items()}
    print_result({"prompt": values["prompt"]}, as_json=False)
    assert str(values["prompt"]) in capsys.readouterr().out
    print_result(values, as_json=False, text=str(values["path"]))
    assert capsys.readouterr().out == f"{values['path']}\n"  # one line, whatever the width


def test_a_plan_says_that_nothing_was_done(capsys: Capture) -> None:
    print_dry_run("distill", {"steps": 4}, as_json=False)
    shown = capsys.readouterr().out
    assert "nothing was loaded or written" in shown
    assert "steps  4" in shown
    print_dry_run("distill", {"steps": 4}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "command": "distill", "dry_run": True, "steps": 4, "needs": [],
    }  # fmt: skip
