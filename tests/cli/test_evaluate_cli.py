"""``anyflow evaluate`` as a user runs it; videos are rendered, except in the end-to-end test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.cli import app
from anyflow_cli.evaluate import run
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from tests.evaluate.drawn import Drawn
from tests.tiny_pipeline import make_wan_folder

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and two any-step models with random weights."""
    root = tmp_path_factory.mktemp("models")
    wan = make_wan_folder(root / "wan")
    save_pipeline(root / "any", two_time_from(load_network(wan)), wan, {})
    save_pipeline(root / "other", two_time_from(load_network(make_wan_folder(root / "wan-1", 1))), wan, {})
    return root


@pytest.fixture
def command(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command with models that render their videos."""
    monkeypatch.setattr(run, "_open_sampler", Drawn().open)
    return arguments(tmp_path, models / "wan", models / "any")


def arguments(root: Path, teacher: Path, model: Path) -> list[str]:
    values = {
        "model.teacher": teacher, "model.pretrained_any_step": model, "model.precision": "fp32",
        "sample.teacher_steps": 3, "evaluate.prompts": 8, "evaluate.nfe": "[1,2]",
    }  # fmt: skip
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["evaluate", *settings, "--runs", str(root / "runs")]


def test_scores_are_shown_and_a_report_is_written(
    command: list[str], models: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert app.main(command) == 0
    shown = capsys.readouterr()
    assert "suite shapes, 8 prompts, one video per prompt" in shown.out
    assert "teacher 3x2" in shown.out
    assert f"Model: {models / 'any'} (the recipe's pretrained model" in shown.err
    out = tmp_path / "runs" / "tiny" / "evaluate"
    assert (out / "report.html").stat().st_size > 50_000
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        ".anyflow-evaluation.json", ".lock", "report.html", "results.json",
        "scores.md", "scores.png", "scores.tex",
    }  # fmt: skip


def test_json_prints_only_the_result(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--nfe", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in found["scores"]] == [4, 3]
    assert found["card"]["comparable"] is True
    assert Path(found["files"]["report.html"]).is_file()


def test_a_dry_run_counts_and_writes_nothing(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert app.main([*command, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["videos"], facts["to sample"], facts["comparable"]) == (24, 24, True)
    assert not (tmp_path / "runs").exists()


def test_a_limit_is_a_deviation(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--limit", "3", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)["card"]
    assert card["comparable"] is False
    assert card["deviations"] == ["only the first 3 of 8 prompts"]
    assert app.main([*command, "--limit", "99", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparable"] is True


def test_own_prompts_are_a_deviation(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine.txt").write_text("a small red circle\na <b>blue</b> square\n")
    assert app.main([*command, "--prompts", str(tmp_path / "mine.txt"), "--nfe", "2"]) == 0
    shown = capsys.readouterr()
    assert "not comparable (own prompts from" in shown.out
    assert "There is no Total, because some dimensions are missing: " in shown.out


def test_fail_below_sets_the_exit_code(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "one.txt").write_text("a small red circle\n")
    assert app.main([*command, "--fail-below", "10"]) == 0
    assert app.main([*command, "--fail-below", "95"]) == 1
    assert "below 95" in capsys.readouterr().err
    assert app.main([*command, "--fail-below", "10", "--prompts", str(tmp_path / "one.txt")]) == 2
    assert "--fail-below needs a Total" in capsys.readouterr().err


def test_each_step_count_with_a_low_total_is_named(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--fail-below", "99.5"]) == 1
    shown = capsys.readouterr().err
    assert "at 1 step, " in shown
    assert "at 2 steps: below 99.5." in shown


def test_variants_of_other_settings_are_reported_and_pruned_on_request(
    command: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert app.main([*command, "--nfe", "2"]) == 0
    assert app.main([*command, "--nfe", "1"]) == 0
    assert "1 variants of other models or settings" in capsys.readouterr().err
    out = tmp_path / "runs" / "tiny" / "evaluate"
    (out / "mine").mkdir()
    assert app.main([*command, "--nfe", "1", "--prune"]) == 0
    assert "Deleted 1 variants" in capsys.readouterr().err
    left = sorted(path.name.rpartition("-")[0] or path.name for path in out.iterdir() if path.is_dir())
    assert left == ["mine", "model-1", "teacher-3x2"]


def test_two_models_are_compared(command: list[str], models: Path, tmp_path: Path, capsys: Capture) -> None:
    finished = tmp_path / "finished"
    assert app.main([*command, "--out", str(finished)]) == 0
    capsys.readouterr()
    both = [str(finished), str(models / "other")]
    assert app.main([*command, "--compare", *both, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == both
    assert [one["finding"] for one in found["differences"]] == ["no difference"] * 2
    assert Path(found["files"]["comparison.json"]).is_file()
    assert app.main([*command, "--compare", *both, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[both[1]]["to sample"] == 0
    assert app.main([*command, "--compare", *both, "--model", both[1]]) == 2
    assert "--model cannot be combined with --compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
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
def test_wrong_use_is_named_and_nothing_is_written(
    command: list[str], tmp_path: Path, capsys: Capture, wrong: list[str], message: str
) -> None:
    assert app.main([*command, *wrong]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out
    assert not (tmp_path / "runs").exists()


def test_a_model_of_another_size_is_refused_before_it_is_loaded(command: list[str], capsys: Capture) -> None:
    assert app.main([*command, "--set", "model.height=480"]) == 2
    shown = capsys.readouterr().err
    assert "The suite shapes scores videos of 33 frames at 64x64" in shown.replace("\n", " ")
    assert "hint:" in shown


@pytest.mark.slow
def test_models_with_random_weights_are_evaluated_end_to_end(
    tmp_path: Path, models: Path, capsys: Capture
) -> None:
    command = [*arguments(tmp_path, models / "wan", models / "any"), "--limit", "2", "--json"]
    assert app.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["evaluations"] for entry in found["scores"]] == [1, 2, 6]
    assert all(entry["quality"] < 40 for entry in found["scores"])
    assert all(
        0 < entry["seconds"]["network"] < entry["seconds"]["with_decoding"] for entry in found["scores"]
    )


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without models, weights or VBench's environment."""
    monkeypatch.setenv("ANYFLOW_VBENCH", str(tmp_path / "no environment"))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "no weights"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("options", "prompts", "videos", "complete"),
    [
        (["--suite", "vbench"], 944, 6220, True),
        (["--suite", "vbench", "--set", "evaluate.vbench.flickering=5"], 944, 4720, True),
        (["--suite", "vbench", "--set", "evaluate.vbench.dimensions=[scene,color]"], 171, 855, True),
        (["--suite", "vbench", "--limit", "20"], 20, 100, False),
        (["--suite", "vbench", "--set", "evaluate.samples=1"], 944, 944, False),
        (["--suite", "vbench-i2v"], 1118, 5590, True),
    ],
)
def test_a_dry_run_of_vbench_needs_neither_environment_nor_model(
    bare_machine: Path, capsys: Capture, options: list[str], prompts: int, videos: int, complete: bool
) -> None:
    command = ["evaluate", "-r", "causal14b", *options, "--nfe", "4"]
    assert app.main([*command, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    beside = "vbench-i2v" not in options  # a teacher cannot be conditioned on images
    assert (facts["prompts"], facts["comparable"]) == (prompts, complete)
    assert facts["videos"] == videos * (1 + beside)
    assert len(facts["dimensions"]) == (9 if "vbench-i2v" in options else 16)
    needs = {need["name"]: need for need in facts["needs"]}
    assert needs["VBench environment"]["state"] == "missing"
    assert "anyflow doctor --fix vbench" in needs["VBench environment"]["how_to_get_it"]
    assert needs["VBench weights"]["state"] == "optional"
    assert ("teacher" in needs) == beside
    assert needs.keys() >= ({"VBench-I2V prompts", "VBench-I2V images"} if "vbench-i2v" in options else set())
    assert list(bare_machine.iterdir()) == []


def test_without_an_environment_vbench_is_refused_with_the_next_step(
    bare_machine: Path, capsys: Capture
) -> None:
    assert app.main(["evaluate", "--suite", "vbench"]) == 2
    shown = capsys.readouterr().err.replace("\n", " ")
    assert "There is no VBench environment at" in shown
    assert "Create it with `anyflow doctor --fix vbench`" in shown
    assert app.main(["evaluate", "--suite", "vbench", "--compare", "a", "b", "--dry-run"]) == 0
    assert list(bare_machine.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "evaluate.samples=1000000000"],
        ["--set", "evaluate.prompts=1000000000"],
        ["--suite", "vbench", "--set", "evaluate.samples=1000000000"],
        ["--seed", str(2**63 - 5)],
    ],
)
def test_more_videos_or_seeds_than_there_can_be_are_refused_at_once(
    bare_machine: Path, capsys: Capture, options: list[str]
) -> None:
    assert app.main(["evaluate", *options, "--dry-run"]) == 2
    assert "evaluate" in capsys.readouterr().err


def test_a_model_without_a_recipe_is_evaluated_as_its_own_run_was_trained(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run's record still has the old names of keys."""
    monkeypatch.chdir(Path(__file__).parents[1] / "fixtures/v0.1")
    command = ["evaluate", "--model", "runs/whole/train-flowmap", "--dry-run", "--json"]
    assert app.main([*command, "--set", "evaluate.suite=vbench"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert Path(shown["out"]).parts[:2] == ("runs", "whole")
