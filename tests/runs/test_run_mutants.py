"""Damaged files of a training run: every mutant is read or refused in a sentence, and no file is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_cli.runs.checkpoint import newest
from anyflow_cli.runs.lineage import RunInputs, begin_run, check_run, run_of
from anyflow_cli.runs.open import describe, open_model
from tests.mutants import COUNTS, check
from tests.tiny_pipeline import make_wan_folder
from tests.train.small import trainer
from tests.train.stage import inputs_of, make_data, make_recipe, paths, train


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template") / "run"
    trainer(directory, "on-policy", lora=True, steps=2, log_every=1).run()
    return directory


@pytest.fixture
def directory(template: Path, tmp_path: Path) -> Path:
    """A run of two steps, of student and fake score."""
    return shutil.copytree(template, tmp_path / "run")


def resume(directory: Path) -> Callable[[], None]:
    """Take up the run as the next start would."""
    run = trainer(directory, "on-policy", lora=True, steps=4, log_every=1)
    return run.resume


@pytest.mark.parametrize("cases", COUNTS)
@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("state.json", 0.25), ("student.safetensors", 0.2), ("ema.safetensors", 0.2),
        ("optimiser-student.pt", 0.2), ("optimiser-fake.pt", 0.2),
    ],
)  # fmt: skip
def test_files_of_a_checkpoint(directory: Path, cases: int, name: str, refused: float) -> None:
    path = newest(directory / "checkpoints")
    assert path is not None
    before = tree(directory)
    check(path / name, resume(directory), cases, seed=1, refused=refused)
    assert tree(directory) == before


@pytest.mark.parametrize("cases", COUNTS)
def test_metrics(directory: Path, cases: int) -> None:
    check(directory / "metrics.jsonl", resume(directory), cases, seed=2, refused=0.1)


@pytest.fixture(scope="module")
def began(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunInputs, Path]:
    """Inputs of a stage, and the directory of its run of two steps."""
    place = tmp_path_factory.mktemp("stage")
    wan, data = make_wan_folder(place / "wan"), make_data(place / "data")
    recipe = make_recipe(wan, data)
    inputs = inputs_of("train-flowmap", recipe, paths(place))
    train(recipe, inputs)
    return inputs, wan


@pytest.mark.parametrize("cases", COUNTS)
@pytest.mark.parametrize("name", ["lineage.json", "recipe.yaml"])
def test_records_of_a_run(began: tuple[RunInputs, Path], cases: int, name: str) -> None:
    inputs, wan = began
    recipe = make_recipe(wan, inputs.data)
    checkpoint = newest(inputs.directory / "checkpoints")
    assert checkpoint is not None

    def use() -> None:
        begin_run(recipe, inputs, "fp32", 1)
        check_run(recipe, inputs)
        run_of(checkpoint)
        describe(str(checkpoint), recipe)
        open_model(str(checkpoint), recipe)

    before = tree(inputs.directory)
    check(inputs.directory / name, use, cases, seed=3)
    assert tree(inputs.directory) == before
