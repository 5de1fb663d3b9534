"""What each command needs, and that what is there is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_cli.plan.requirements import missing_facts, requirements_of
from anyflow_cli.recipe.schema import DataSection, DistillSection, ModelSection, Recipe, SynthesizeSection
from anyflow_cli.runs.paths import RunPaths


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    return RunPaths(tmp_path / "runs", "t")


def states(recipe: Recipe, paths: RunPaths, command: str) -> dict[str, str]:
    return {need.what: need.state for need in requirements_of(recipe, paths, command)}


def test_everything_is_missing_at_first_and_there_at_last(paths: RunPaths) -> None:
    recipe = Recipe(name="t")
    assert states(recipe, paths, "train-flowmap") == {"teacher": "there", "data": "missing"}
    assert states(recipe, paths, "distill")["start"] == "missing"
    paths.data.mkdir(parents=True)
    assert states(recipe, paths, "train-flowmap")["data"] == "missing"  # begun, not complete
    (paths.data / "manifest.json").touch()
    (paths.stage_1() / "model").mkdir(parents=True)
    assert missing_facts(recipe, paths, "train-flowmap") == {}
    assert missing_facts(recipe, paths, "distill") == {}  # the tuned teacher may be left out


def test_a_tuned_teacher_is_seen(paths: RunPaths) -> None:
    assert states(Recipe(name="t"), paths, "distill")["real score"] == "not there, and not needed"
    (paths.stage_1("flow-matching") / "model").mkdir(parents=True)
    assert states(Recipe(name="t"), paths, "distill")["real score"] == "there"


def test_a_named_start_that_is_nowhere_is_missing(paths: RunPaths) -> None:
    recipe = Recipe(name="t", distill=DistillSection(init_from="./nowhere", real_score="some/model"))
    found = states(recipe, paths, "distill")
    assert (found["start"], found["real score"]) == ("missing", "fetched at the start")


def test_prompts_and_the_other_teacher_of_synthesis(paths: RunPaths, tmp_path: Path) -> None:
    recipe = Recipe(name="t", data=DataSection(prompts="p.txt"), synthesize=SynthesizeSection(teacher="a/b"))
    assert states(recipe, paths, "synthesize") == {"prompts": "missing", "teacher": "fetched at the start"}
    (tmp_path / "p.txt").touch()
    assert states(recipe, paths, "synthesize")["prompts"] == "there"
    assert states(Recipe(name="t"), paths, "synthesize") == {"teacher": "there"}


def test_sampling_takes_the_trained_model_before_the_shipped_one(paths: RunPaths) -> None:
    shipped = Recipe(name="t", model=ModelSection(shipped="tiny-anyflow"))
    assert requirements_of(shipped, paths, "sample")[0].place == "tiny-anyflow"
    assert states(Recipe(name="t"), paths, "sample") == {"model": "missing"}
    (paths.stage_2() / "model").mkdir(parents=True)
    assert requirements_of(shipped, paths, "sample")[0].place == str(paths.stage_2() / "model")


def test_the_source_is_said_only_where_something_is_missing(paths: RunPaths) -> None:
    data = requirements_of(Recipe(name="t"), paths, "train-flowmap")[1]
    assert str(data).endswith("data: missing (anyflow synthesize -r t)")
    assert str(data._replace(state="there")).endswith("data: there")


def test_commands_without_needs_have_none(paths: RunPaths) -> None:
    assert requirements_of(Recipe(name="t"), paths, "doctor") == []
