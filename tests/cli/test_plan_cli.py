"""The command plan, on a small model and without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.plan.hardware import RESERVE
from tests.tiny_pipeline import make_wan_folder

RECIPE = """
model:
  teacher: {teacher}
  lora: {{rank: 4, alpha: 4}}
  height: 32
  width: 32
  frames: 9
  max_text_tokens: 8
data: {{prompts: prompts.txt}}
synthesize: {{count: 10}}
train_flowmap: {{global_batch: 4, preview_every: 0}}
distill: {{global_batch: 4, preview_every: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests, so that what was rehearsed for one of them serves the others."""
    return make_wan_folder(tmp_path_factory.mktemp("plan") / "wan")


@pytest.fixture
def recipe(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a plan must not fetch anything")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.format(teacher=folder))
    return path


def values(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_values_agree_with_one_another(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = values(capsys, "-r", recipe, "--gpus", "1x24GB", "--peak", 100, "--mfu", 0.5)
    assert found["hardware"]["usable"] == found["hardware"]["memory"] - RESERVE
    assert list(found["stages"]) == ["synthesize", "tune", "train-flowmap", "distill", "sample"]
    for stage in found["stages"].values():
        assert stage["peak"] == sum(stage["memory"].values())
        assert stage["fits"]
        assert "advice" not in stage
        assert stage["seconds"] == pytest.approx(stage["flops"] / 50e12)
    assert found["roles"]["student"]["trainable"] > 0 == found["roles"]["real"]["trainable"]
    assert found["stages"]["distill"]["rollout"] > 0
    assert (
        found["stages"]["distill"]["activations"]["without checkpointing"]
        > (found["stages"]["distill"]["activations"]["with checkpointing"])
    )
    states = {need["name"]: need["state"] for need in found["needs"]["synthesize"]}
    assert states == {"prompt file": "missing", "teacher": "ready"}


def test_people_see_every_stage_and_what_would_help(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_cli.plan.hardware.RESERVE", 0)
    peaks = {
        name: stage["peak"]
        for name, stage in values(capsys, "-r", recipe, "--gpus", "1x1GB")["stages"].items()
    }
    too_small = 0.9 * peaks["distill"] / 2**30
    options = ["--gpus", f"1x{too_small:.6f}GB", "--set", "model.compile=true"]
    assert main(["plan", "-r", str(recipe), *options]) == 0
    shown = capsys.readouterr().out
    for word in ("teacher tuning", "stage 1", "stage 2", "sampling", "frozen base", "activations", "Disk"):
        assert word in shown
    assert "stage 2: the peak is at" in shown
    assert "It fits with --set" in shown
    assert "model.compile is not counted" in shown
    assert "anyflow synthesize -r small" in shown


def test_a_bad_machine_is_a_wrong_use(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-r", str(recipe), "--gpus", "eight"]) == 2
    assert "8x80GB" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train-flowmap", "distill"])
def test_a_dry_run_names_what_is_missing_and_fetches_nothing(
    recipe: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is on the Hub, data and models are missing: the dry run lists both and ends with 0."""
    hub = "model.teacher=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert main([command, "-r", str(recipe), "--set", hub, "--dry-run", "--json"]) == 0
    needs = {need["name"]: need for need in json.loads(capsys.readouterr().out)["needs"]}
    assert needs["teacher"]["state"] == "to download"
    assert needs["data set"]["how_to_get_it"] == "run `anyflow synthesize -r small`"
    if command == "distill":
        assert needs["stage-1 model"]["how_to_get_it"] == "run `anyflow train-flowmap -r small`"
        assert needs["tuned teacher"]["state"] == "optional"
