"""``--lora``: merged into the model of sample, evaluate and export, and recorded with what was made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anyflow_cli.cli import app
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline

LAYER = "blocks.0.attn1.to_q"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    rows, columns = load_network(resolve_pipeline("tiny-anyflow")).get_parameter(f"{LAYER}.weight").shape
    pair = {f"transformer.{LAYER}.lora_A.weight": torch.ones(1, columns)}
    save_file(pair | {f"transformer.{LAYER}.lora_B.weight": torch.ones(rows, 1)}, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def test_export_writes_the_merged_model(lora: Path, tmp_path: Path) -> None:
    given = ["--model", "tiny-anyflow", "--lora", f"{lora}:0.5", "--out", str(tmp_path / "merged")]
    assert app.main(["export", *given]) == 0
    before = load_network(resolve_pipeline("tiny-anyflow")).get_parameter(f"{LAYER}.weight")
    after = load_network(tmp_path / "merged").get_parameter(f"{LAYER}.weight")
    torch.testing.assert_close(after - before, torch.full_like(before, 0.5), atol=1e-2, rtol=0)
    lineage = json.loads((tmp_path / "merged" / "lineage.json").read_text())
    assert lineage["loras"] == [[str(lora), 0.5]]


def test_sample_records_the_file_and_its_strength(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-p", "a small red circle", "--nfe", "1", "--frames", "5", "--model", "tiny-anyflow"]
    assert app.main(["sample", *given, "--lora", str(lora), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["address"] == f"tiny-anyflow+{lora}"


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_wrong_files_are_refused_before_anything_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"sample": ["-p", "x"], "evaluate": [], "export": ["--out", str(tmp_path / "x")]}[command]
    for given, words in (
        (["--lora", "gone.safetensors", "--model", "tiny-anyflow"], "no LoRA file"),
        (["--lora", "gone.safetensors"], "--lora needs a model"),
        (["--lora", "words", "--model", "tiny-anyflow"], "FILE or FILE:STRENGTH"),
    ):
        assert app.main([command, *more, *given, "--dry-run"]) == 2
        assert words in capsys.readouterr().err
