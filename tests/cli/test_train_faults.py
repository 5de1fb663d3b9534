"""What stops a training from the command line, in a sentence: a read-only directory, files of the future.

Nothing is lost by it: the same command goes on when the cause is gone.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.runs.checkpoint import CHECKPOINT_FORMAT
from tests.train.small import same_run


@pytest.fixture(scope="module")
def three_steps(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert train(recipe, directory, 3) == 0
    return run_in(directory)


@pytest.fixture
def begun(recipe: Path, tmp_path: Path) -> Path:
    """A run of two steps."""
    assert train(recipe, tmp_path / "runs", 2) == 0
    return run_in(tmp_path / "runs")


def train(recipe: Path, runs: Path, steps: int, *more: str) -> int:
    return main(["train-flowmap", "-r", str(recipe), "--runs", str(runs), "--steps", str(steps), *more])


def run_in(runs: Path) -> Path:
    return runs / "test" / "train-flowmap"


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """The sentence and the hint; there is nothing else but what is announced at the start."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["error", "hint"]
    assert not [line for line in lines if "Traceback" in line or line.startswith("  ")]
    return lines[-2], lines[-1]


def only_reading(below: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """As the system's function does on a disk mounted for reading."""

    def refuse(path: Any, *rest: Any, **options: Any) -> Any:
        if str(path).startswith(str(below)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return function(path, *rest, **options)

    return refuse


def mount_for_reading(patch: pytest.MonkeyPatch, directory: Path) -> None:
    for name in ("mkdir", "replace", "rename"):
        patch.setattr(os, name, only_reading(directory, getattr(os, name)))


def refuse_writing(patch: pytest.MonkeyPatch, below: Path) -> None:
    """What is there can be read, and nothing be added, as once a disk is remounted so."""
    opened = io.open
    refused = only_reading(below, opened)

    def chosen(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return (refused if set(mode) & set("aw") else opened)(path, mode, *rest, **options)

    patch.setattr("io.open", chosen)


def test_a_directory_that_can_only_be_read_is_found_before_anything_is_loaded(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mount_for_reading(patch, tmp_path)
        patch.setattr("anyflow_cli.train.prepare.load_backbone", None)  # to be called, it would be a bug
        assert train(recipe, tmp_path / "runs", 2) == 1
    sentence, _ = said(capsys)
    assert f"Cannot write {run_in(tmp_path / 'runs')}/.lock: Read-only file system" in sentence
    assert train(recipe, tmp_path / "runs", 2) == 0


def test_a_run_that_can_only_be_read_is_kept_and_goes_on_later(
    recipe: Path, begun: Path, three_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mount_for_reading(patch, begun)
        assert train(recipe, begun.parents[1], 3) == 1
    sentence, hint = said(capsys)
    assert sentence == f"error: Cannot write {begun}/metrics.jsonl: Read-only file system."
    assert "permissions" in hint
    assert train(recipe, begun.parents[1], 3) == 0
    same_run(begun, three_steps)


@pytest.mark.parametrize("last", ["metrics.jsonl", "tensorboard", "checkpoints"])
def test_a_disk_that_becomes_read_only_within_a_run_keeps_what_was_reported(
    recipe: Path, begun: Path, three_steps: Path, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    """By the system's hand the first of these; the others if it happens between them."""
    board = "train_flowmap.tensorboard=true"
    with pytest.MonkeyPatch.context() as patch:
        refuse_writing(patch, begun / last)
        assert train(recipe, begun.parents[1], 3, "--set", board) == 1
    sentence, hint = said(capsys)
    assert sentence.endswith(": Read-only file system.")
    assert str(begun / last) in sentence
    assert "permissions" in hint
    assert train(recipe, begun.parents[1], 3) == 0
    same_run(begun, three_steps)


def test_a_checkpoint_of_a_newer_program_is_left_alone(
    recipe: Path, begun: Path, three_steps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = begun / "checkpoints" / "step-000002"
    ours = (newest / "state.json").read_text()
    (newest / "state.json").write_text(json.dumps(json.loads(ours) | {"format": CHECKPOINT_FORMAT + 1}))
    assert train(recipe, begun.parents[1], 3) == 2
    sentence, hint = said(capsys)
    assert sentence == f"error: {newest} was written by a newer anyflow."
    assert "pip install -U anyflow" in hint
    assert main(["sample", "-r", str(recipe), "--model", str(newest), "--runs", str(begun.parents[1])]) == 2
    assert said(capsys) == (sentence, hint)
    (newest / "state.json").write_text(ours)  # as if updated
    assert train(recipe, begun.parents[1], 3) == 0
    same_run(begun, three_steps)


def test_a_run_of_another_version_whose_recipe_is_unknown_names_that_version(
    recipe: Path, begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of the future would else be taken for the user's mistakes."""
    text = (begun / "recipe.yaml").read_text()
    (begun / "recipe.yaml").write_text(f"{text}\nfuture: 1\n")
    assert train(recipe, begun.parents[1], 3) == 2
    assert "future" in capsys.readouterr().err  # of the same version: someone wrote it there
    lineage = json.loads((begun / "lineage.json").read_text())
    lineage["versions"]["anyflow"] = "9.9.9"
    (begun / "lineage.json").write_text(json.dumps(lineage))
    before = shutil.copytree(begun, begun.parent / "before")
    assert train(recipe, begun.parents[1], 3) == 2
    sentence, hint = said(capsys)
    assert "was started by anyflow 9.9.9" in sentence
    assert "pip install anyflow==9.9.9" in hint
    assert {p.name for p in begun.rglob("*")} == {p.name for p in before.rglob("*")}
