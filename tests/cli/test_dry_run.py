"""``--dry-run`` of every verb of every shipped recipe, on a machine without any model, data or prompts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyflow_cli.cli.app import main
from anyflow_cli.recipe.load import recipe_names

Capture = pytest.CaptureFixture[str]

VERBS = {
    "synthesize": (), "train-flowmap": (), "distill": (), "finetune": (), "sample": (), "evaluate": (),
    "evaluate --suite vbench": ("--suite", "vbench"), "export": ("--out", "exported"),
}  # fmt: skip
SECONDS = 5.0  # of the processor, since the machine may be busy


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_needs_nothing_and_names_the_way_to_everything(
    verb: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("ANYFLOW_VBENCH", str(tmp_path / "vbench"))
    assert main([verb.split()[0], *VERBS[verb], "--recipe", recipe, "--dry-run", "--json"]) == 0, (
        capsys.readouterr().err
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["dry_run"]) == (verb.split()[0], True)
    assert found["needs"]
    for need in found["needs"]:
        assert need["state"] in ("ready", "to download", "missing", "optional")
        assert need["state"] == "ready" or need["how_to_get_it"], need
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


@pytest.mark.parametrize("verb", ["distill", "evaluate"])
def test_a_dry_run_answers_in_five_seconds(verb: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anyflow_cli", verb, "-r", "causal14b", "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HOME": str(tmp_path)}
    before = os.times()
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < SECONDS


@pytest.mark.parametrize("verb", ["sample", "synthesize", "train-flowmap", "distill", "evaluate"])
def test_an_attention_that_cannot_run_here_is_refused_by_a_dry_run(
    verb: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_cli.runs.resources.default_device", lambda: torch.device("cuda"))
    prompt = ["--prompt", "a circle"] if verb == "sample" else []
    assert main([verb, *prompt, "--set", "model.attention=flash3", "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert "needs the Python package flash_attn_interface, which is not installed" in shown
    assert "set model.attention to auto" in shown
