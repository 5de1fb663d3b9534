"""``--dry-run`` of every verb of every shipped recipe, on a machine without any model, data or prompts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.recipe.load import recipe_names

VERBS = {
    "synthesize": (), "train-flowmap": (), "distill": (), "finetune": (), "sample": (), "evaluate": (),
    "export": ("--out", "exported"),
}  # fmt: skip
SECONDS = 5.0


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_needs_nothing_and_names_the_way_to_everything(
    verb: str,
    recipe: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    before = os.times()
    assert main([verb, *VERBS[verb], "--recipe", recipe, "--dry-run", "--json"]) == 0, capsys.readouterr().err
    after = os.times()
    assert after.user + after.system - before.user - before.system < SECONDS
    found = json.loads(capsys.readouterr().out)
    assert (found["command"], found["dry_run"]) == (verb, True)
    assert found["needs"]
    for need in found["needs"]:
        assert need["state"] in ("ready", "to download", "missing", "optional")
        assert need["state"] == "ready" or need["how_to_get_it"], need
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
