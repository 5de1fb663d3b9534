"""The training verbs from the command line: the chain, what it prints, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.data.dataset import LatentData
from tests.train.stage import make_data


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole chain has been run once."""
    directory = tmp_path_factory.mktemp("runs")
    for verb in (["train-flowmap", "--objective", "flow-matching"], ["train-flowmap"], ["distill"]):
        assert main([*verb, "-r", str(recipe), "--runs", str(directory)]) == 0
    return directory


def result(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = result(
        capsys, "train-flowmap", "-r", recipe, "--runs", tmp_path / "runs", "--steps", 9, "--dry-run"
    )
    assert (plan["steps"], plan["objective"], plan["trains"]) == (9, "flow-map", "all weights")
    assert not (tmp_path / "runs").exists()


def test_distill_says_what_it_found(recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = result(capsys, "distill", "-r", recipe, "--runs", runs, "--dry-run")
    assert plan["start"] == str(runs / "test" / "train-flowmap" / "model")
    assert plan["real score"] == str(runs / "test" / "teacher" / "model")
    assert plan["continues from"].endswith("step-000002")


def test_a_result_names_its_files(recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "distill", "-r", recipe, "--runs", runs)
    assert Path(found["model"], "model_index.json").exists()
    assert Path(found["metrics"]).exists()
    assert found["steps"] == 2


def test_finetune_reports_the_error_before_and_after(
    recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = recipe.parent / "data"
    found = result(capsys, "finetune", "-r", recipe, "--runs", runs, "--data", data)
    assert found["before"]["clips"] == found["after"]["clips"] == 1
    assert found["before"]["flow-map error"] != found["after"]["flow-map error"]


def test_finetune_encodes_videos_first(
    recipe: Path, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    from anyflow_cli.data.video import write_mp4

    (tmp_path / "clips").mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
        write_mp4(tmp_path / "clips" / f"{index}.mp4", noise, 16)
        (tmp_path / "clips" / f"{index}.txt").write_text(f"noise {index}")
    arguments = ["finetune", "-r", recipe, "--runs", tmp_path / "runs", "--data", tmp_path / "clips"]
    arguments += ["--model", runs / "test" / "distill"]
    plan = result(capsys, *arguments, "--dry-run")
    assert plan["latents"] == str(tmp_path / "runs" / "test" / "finetune-data")
    found = result(capsys, *arguments)
    assert (found["after"]["clips"], found["after"]["held out"]) == (2, False)
    assert (tmp_path / "runs" / "test" / "finetune-data" / "manifest.json").exists()


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """Two latents with captions of the shifted world."""
    from anyflow_cli.data.shapes_world import WORLDS

    captions = [WORLDS["shapes-shifted"].scene(seed).caption for seed in range(2)]
    return make_data(tmp_path / "shifted", 2, shape=(9, 8, 8), captions=captions)


LARGE = ("model.height=64", "model.width=64", "model.frames=33")  # the size of the shapes world


def test_captions_tell_their_world(recipe: Path, shifted: Path) -> None:
    from anyflow_cli.cli.finetune import _world_of
    from anyflow_cli.cli.options import load_settings

    large = load_settings(str(recipe), LARGE)
    small = load_settings(str(recipe))
    assert _world_of(large, LatentData(shifted, 8)) == "shapes-shifted"
    assert _world_of(small, LatentData(shifted, 8)) is None  # the suite cannot score clips of this size
    assert _world_of(large, LatentData(recipe.parent / "data", 8)) is None  # captions of no world


@pytest.mark.slow
def test_finetune_reports_scores_where_the_suite_can_judge(
    recipe: Path, runs: Path, shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [word for value in (*LARGE, "evaluate.prompts=2") for word in ("--set", value)]
    start = runs / "test" / "distill"
    where = ["-r", recipe, "--runs", tmp_path / "runs"]
    found = result(capsys, "finetune", *where, "--data", shifted, "--model", start, *values)
    for side in ("before", "after"):
        assert found[side].keys() == {"total at 4 steps", "total at 32 steps"}
        assert all(0 <= total <= 100 for total in found[side].values())


def test_another_setting_in_the_same_directory_is_refused(
    recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "distill", "-r", recipe, "--runs", runs, "--set", "distill.real_guidance=2.0")
    assert "distill.real_guidance (4.0 there, 2.0 now)" in said
    assert "hint:" in said


def test_a_missing_stage_is_named_with_its_command(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "anyflow train-flowmap -r test" in refusal(capsys, "distill", "-r", recipe, "--runs", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train-flowmap", "--objective", "flow-mapp"], "did you mean flow-map"),
        (["train-flowmap", "--steps", "0"], "at least 1"),
        (["distill", "--simulation", "flow"], "distill.simulation"),
        (["finetune"], "finetune needs videos"),
        (["finetune", "--data", "nowhere"], "nowhere"),
    ],
)
def test_wrong_use(
    recipe: Path, runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refusal(capsys, *arguments, "-r", recipe, "--runs", runs)
