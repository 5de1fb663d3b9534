"""Names, paths and texts that cannot work or that a terminal would obey: sentences, in a dry run too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.table import Table

from anyflow_cli.cli.app import main
from anyflow_cli.cli.console import print_error, print_result

Capture = pytest.CaptureFixture[str]
LONG = "n" * 300


@pytest.fixture(autouse=True)
def _in_an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("mine")


@pytest.mark.parametrize("verb", ["synthesize", "sample", "evaluate"])
@pytest.mark.parametrize(
    ("out", "words"),
    [
        (LONG, "--out must have names of at most 255 bytes"),
        (f"a/{'b/' * 2100}c", "--out must be at most 4096 bytes long"),
        ("~nosuchuser/x", "--out must name a user that exists, not ~nosuchuser"),
        ("s3://bucket/x", "is not a local directory"),
        ("a-file", "a-file is not a directory"),
        ("a-file/below", "a-file is not a directory"),
        ("a\udcffb", r"--out must not contain the character \udcff"),
        ("a\x1bb", r"--out must not contain the character \x1b"),
    ],
)
def test_an_output_directory_that_cannot_be_made_is_refused_at_the_dry_run(
    verb: str, out: str, words: str, capsys: Capture
) -> None:
    assert main([verb, "--dry-run", "--out", out]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error, hint = shown.err.splitlines()
    assert words in error
    assert hint.startswith("hint: ")
    assert Path("a-file").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--model", LONG], ["sample", "--model", "~nosuchuser/m"], ["sample", "--prompts", LONG],
        ["sample", "--image", f"{LONG}.png"], ["sample", "--refine", LONG], ["distill", "--model", LONG],
        ["finetune", "--data", LONG], ["synthesize", "--from-videos", "~nosuchuser"],
        ["evaluate", "--videos", LONG], ["evaluate", "--compare", LONG, "b"], ["export", "--out", "a-file/x"],
        ["export", "--out", "x", "--model", "/dev/null"], ["recipes", "copy", "tiny", f"{LONG}.yaml"],
        ["recipes", "copy", "tiny", "\udcff.yaml"], ["distill", "--set", "distill.real_score=/dev/zero"],
        ["export", "--out", LONG], ["train-flowmap", "--runs", "a-file"],
        ["train-flowmap", "--recipe", f"./{LONG}.yaml"], ["recipes", "validate", "~nosuchuser/r.yaml"],
        ["recipes", "show", "x" * 5000], ["train-flowmap", "--nproc", "99999999999"],
        ["sample", "--nfe", "1000000000"], ["sample", "--nfe", "9" * 5000], ["sample", "--frames", "1000001"],
        ["sample", "--then", f"{'9' * 5000}:a circle"], ["sample", "--latency-budget", "inf"],
        ["sample", "--count", "1000000000"], ["sample", "--seed", "-1"], ["evaluate", "--seed", str(2**64)],
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_sentence_and_a_hint(arguments: list[str], capsys: Capture) -> None:
    dry_run = ["--dry-run"] if arguments[0] != "recipes" else []
    assert main([*arguments, *dry_run]) == 2
    *_, error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert len(error) < 600
    assert hint.startswith("hint: ")


def test_a_recipe_with_a_long_name_is_a_mistake_of_the_recipe(capsys: Capture) -> None:
    Path("long.yaml").write_text(f"extends: tiny\nname: {LONG}")
    assert main(["sample", "-r", "long.yaml", "--dry-run"]) == 2
    assert "long.yaml:2: name must be text of at most 100 characters" in capsys.readouterr().err


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\x7f\udcff"


def test_whatever_is_printed_holds_no_control_characters(capsys: Capture) -> None:
    table = Table("head")
    table.add_row(ESCAPES)
    print_error(f"No {ESCAPES}.", ESCAPES)
    print_result({"name": ESCAPES}, as_json=False)
    print_result({"name": ESCAPES}, as_json=False, text=ESCAPES)
    print_result({}, as_json=False, text=table)
    shown = capsys.readouterr()
    for stream in (shown.out, shown.err):
        assert r"\x1b[2J" in stream
        assert not any(character in stream for character in ESCAPES if not character.isprintable())


def test_json_keeps_the_text_and_has_no_control_characters(capsys: Capture) -> None:
    print_result({"name": ESCAPES}, as_json=True)
    shown = capsys.readouterr().out
    assert not any(character in shown for character in ESCAPES if not character.isprintable())
    assert json.loads(shown) == {"name": ESCAPES}


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipes", "show", "--set", "\x1b[31m=1"], ["recipes", "show", "\x1b[31m"],
        ["sample", "--model", "\x1b[31m/x", "--dry-run"], ["sample", "--\x1b[31m"], ["\x1b[31m"],
    ],
)  # fmt: skip
def test_arguments_are_shown_without_control_characters(arguments: list[str], capsys: Capture) -> None:
    assert main(arguments) == 2
    assert "\x1b" not in capsys.readouterr().err
