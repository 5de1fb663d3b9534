"""``anyflow recipes``: what it prints, and that it overwrites nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.recipe.load import load_recipe, recipe_names, recipes_dir

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_list_shows_each_recipe_with_its_description(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == recipe_names()
    for name, line in zip(recipe_names(), shown, strict=True):
        assert load_recipe(name).description in line


def test_list_as_json(capsys: Capture) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        name: load_recipe(name).description for name in recipe_names()
    }


def test_show_prints_a_recipe_that_can_be_used(capsys: Capture) -> None:
    assert main(["recipes", "show", "tiny-long", "--set", "distill.steps=9"]) == 0
    Path("shown.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe("shown.yaml") == load_recipe("tiny-long", ["distill.steps=9"])


def test_show_as_json_has_every_value(capsys: Capture) -> None:
    assert main(["recipes", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("tiny").model_dump(mode="json")


def test_copy_makes_a_recipe_of_its_own_name(capsys: Capture) -> None:
    assert main(["recipes", "copy", "tiny-long", "mine.yaml"]) == 0
    assert capsys.readouterr().out == "mine.yaml\n"
    copied, original = load_recipe("./mine.yaml"), load_recipe("tiny-long")
    assert copied == original.model_copy(update={"name": "mine"})


def test_copy_never_overwrites(capsys: Capture) -> None:
    Path("mine.yaml").write_text("precious", encoding="utf-8")
    assert main(["recipes", "copy", "tiny", "mine.yaml"]) == 2
    assert Path("mine.yaml").read_text(encoding="utf-8") == "precious"
    assert "error: mine.yaml exists and was not changed." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "words"), [("mine", "Name it mine.yaml."), ("none/mine.yaml", "There is no directory none.")]
)
def test_copy_to_a_place_that_cannot_be_is_refused(target: str, words: str, capsys: Capture) -> None:
    assert main(["recipes", "copy", "tiny", target]) == 2
    assert words in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_validate_says_all_that_is_wrong_with_all(capsys: Capture) -> None:
    Path("a.yaml").write_text("smaple: {}\nsample: {sede: 1}", encoding="utf-8")
    Path("b.yaml").write_text("sample: {seed: 1.5}", encoding="utf-8")
    assert main(["recipes", "validate", "tiny", "a.yaml", "b.yaml"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in [
        "a.yaml:1: smaple",
        "a.yaml:2: sample.sede",
        "b.yaml:1: sample.seed must be a whole number",
    ]:
        assert words in shown.err


def test_validate_all_shipped(capsys: Capture) -> None:
    assert main(["recipes", "validate", *recipe_names()]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: valid" for name in recipe_names()]


def test_recipes_lie_beside_or_inside_the_package() -> None:
    assert (recipes_dir() / "tiny.yaml").is_file()
