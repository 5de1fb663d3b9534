"""``anyflow evaluate`` as its users see it; videos are drawn, except where the whole path is the point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.cli import app
from anyflow_cli.evaluate import run
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from tests.evaluate.drawn import Drawn, make_folder
from tests.tiny_pipeline import make_wan_folder

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command with models that draw."""
    monkeypatch.setattr(run, "_open", Drawn().open)
    make_folder(tmp_path / "wan", b"old")
    make_folder(tmp_path / "any", b"new", "AnyFlow")
    return arguments(tmp_path, tmp_path / "wan", tmp_path / "any")


def arguments(root: Path, teacher: Path, model: Path) -> list[str]:
    values = {
        "model.teacher": teacher, "model.pretrained_any_step": model, "model.precision": "fp32",
        "sample.teacher_steps": 3, "evaluate.prompts": 8, "evaluate.nfe": "[1,2]",
    }  # fmt: skip
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["evaluate", *settings, "--runs", str(root / "runs")]


def test_scores_are_shown_and_a_report_is_written(
    command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert app.main(command) == 0
    shown = capsys.readouterr()
    assert "suite shapes, 8 prompts, one video a prompt" in shown.out
    assert "teacher 3x2" in shown.out
    assert f"Model: {tmp_path / 'any'} (the recipe's pretrained model" in shown.err
    out = tmp_path / "runs" / "tiny" / "evaluate"
    assert (out / "report.html").stat().st_size > 50_000
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        ".lock", "report.html", "results.json", "scores.md", "scores.png", "scores.tex",
    }  # fmt: skip


def test_json_is_the_result_alone(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--nfe", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in found["scores"]] == [4, 3]
    assert found["card"]["comparable"] is True
    assert Path(found["files"]["report.html"]).is_file()


def test_a_dry_run_counts_and_writes_nothing(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert app.main([*command, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["videos"], facts["to make"], facts["comparable"]) == (24, 24, True)
    assert not (tmp_path / "runs").exists()


def test_a_limit_is_marked(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--limit", "3", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert card["comparable"] is False
    assert card["deviations"] == ["only the first 3 of 8 prompts"]
    assert app.main([*command, "--limit", "99", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparable"] is True


def test_own_prompts_are_marked(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.txt").write_text("a small red circle\na <b>blue</b> square\n")
    assert app.main([*command, "--prompts", str(tmp_path / "mine.txt"), "--nfe", "2"]) == 0
    shown = capsys.readouterr()
    assert "not comparable (own prompts from" in shown.out
    assert "No Total, since these are missing: " in shown.out


def test_fail_below_is_for_machines(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "one.txt").write_text("a small red circle\n")
    assert app.main([*command, "--fail-below", "10"]) == 0
    assert app.main([*command, "--fail-below", "95"]) == 1
    assert "below 95" in capsys.readouterr().err
    assert app.main([*command, "--fail-below", "10", "--prompts", str(tmp_path / "one.txt")]) == 2
    assert "there is no Total for --fail-below to judge" in capsys.readouterr().err


def test_every_step_count_that_is_too_low_is_named(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--fail-below", "99.5"]) == 1
    shown = capsys.readouterr().err
    assert "at 1 step, " in shown
    assert "at 2 steps: below 99.5." in shown


def test_older_variants_are_said_and_pruned_on_request(
    command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert app.main([*command, "--nfe", "2"]) == 0
    assert app.main([*command, "--nfe", "1"]) == 0
    assert "1 variants of earlier models or settings" in capsys.readouterr().err
    out = tmp_path / "runs" / "tiny" / "evaluate"
    (out / "mine").mkdir()
    assert app.main([*command, "--nfe", "1", "--prune"]) == 0
    assert "Deleted 1 variants" in capsys.readouterr().err
    left = sorted(path.name.rpartition("-")[0] or path.name for path in out.iterdir() if path.is_dir())
    assert left == ["mine", "model-1", "teacher-3x2"]


def test_two_models_are_compared(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    make_folder(tmp_path / "other", b"newer", "AnyFlow")
    finished = tmp_path / "finished"
    assert app.main([*command, "--out", str(finished)]) == 0
    capsys.readouterr()
    both = [str(finished), str(tmp_path / "other")]
    assert app.main([*command, "--compare", *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == both
    assert [one["finding"] for one in found["differences"]] == ["no difference"] * 2
    assert Path(found["files"]["comparison.json"]).is_file()
    assert app.main([*command, "--compare", *both, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[both[1]]["to make"] == 0
    assert app.main([*command, "--compare", *both, "--model", both[1]]) == 2
    assert "--model cannot be used together with --compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--nfe", "0"], "--nfe"),
        (["--nfe", "four"], "--nfe takes step counts"),
        (["--limit", "0"], "--limit"),
        (["--suite", "shape"], "shapes"),
        (["--model", "nowhere"], "There is no model at nowhere"),
        (["--prompts", "none.txt"], "none.txt does not exist"),
        (["--fail-below", "101"], "--fail-below"),
        (["--compare", "nowhere", "nowhere"], "There is no model at nowhere"),
        (["--set", "evaluate.prompt=3"], "prompts"),
    ],
)
def test_wrong_use_is_named_and_writes_nothing(
    command: list[str], tmp_path: Path, capsys: Capture, wrong: list[str], said: str
) -> None:
    assert app.main([*command, *wrong]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert not shown.out
    assert not (tmp_path / "runs").exists()


def test_a_model_of_other_clips_is_refused_before_it_is_loaded(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--set", "model.height=480"]) == 2
    shown = capsys.readouterr().err
    assert "The suite shapes scores 33 frames of 64x64" in shown.replace("\n", " ")
    assert "hint:" in shown


@pytest.mark.slow
def test_models_with_random_weights_go_the_whole_way(tmp_path: Path, capsys: Capture) -> None:
    wan = make_wan_folder(tmp_path / "wan")
    save_pipeline(tmp_path / "any", two_time_from(load_network(wan)), wan, {})
    command = [*arguments(tmp_path, wan, tmp_path / "any"), "--limit", "2", "--json"]
    assert app.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["evaluations"] for entry in found["scores"]] == [1, 2, 6]
    assert all(entry["quality"] < 40 for entry in found["scores"])
    assert all(
        0 < entry["seconds"]["network"] < entry["seconds"]["with decoding"] for entry in found["scores"]
    )
