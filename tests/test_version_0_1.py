"""Files of version 0.1 open, resume and sample with equal numbers; `fixtures/v0.1/make.py` wrote them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import yaml

from anyflow_cli.cli.app import main
from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.shards import read_manifest
from anyflow_cli.data.verify import verify
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.load import load_recorded_recipe

FIXTURE = Path(__file__).parent / "fixtures" / "v0.1"
WRITTEN_AT = "/tmp/anyflow-0.1"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())
SAME_ARITHMETIC = (EXPECTED["torch"], EXPECTED["cpu"]) == (
    torch.__version__,
    torch.backends.cpu.get_cpu_capability(),
)


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what the old version left, whose records name the place of the copy."""
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.rglob("*"):
        if file.suffix in (".json", ".yaml"):
            file.write_text(file.read_text().replace(WRITTEN_AT, str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def translated_recipe(run: Path) -> Path:
    """The recipe that the run recorded, as today's user writes it."""
    file = Path(f"{run.parent.name}-today.yaml")
    file.write_text(dump(load_recorded_recipe(run / "recipe.yaml")))
    return file


def rows(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in lines]


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the bit where torch and the CPU are those that the expectation comes from."""
    if SAME_ARITHMETIC:
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("verb", "run"), [("train-flowmap", "runs/killed/train-flowmap"), ("distill", "runs/causal/distill")]
)
def test_a_killed_run_resumes_with_equal_losses(old: Path, verb: str, run: str) -> None:
    assert [path.name for path in Path(run, "checkpoints").iterdir()] == ["step-000004"]
    assert main([verb, "-r", str(translated_recipe(Path(run)))]) == 0
    found, expected = rows(Path(run)), EXPECTED[run]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["whole", "causal"])
def test_a_finished_model_samples_the_same_video(old: Path, name: str) -> None:
    recipe = translated_recipe(Path(f"runs/{name}/train-flowmap"))
    prompt = ["--prompt", "a red circle moves left", "--nfe", "2", "--seed", "3"]
    assert main(["sample", "-r", str(recipe), *prompt, "--out", "samples"]) == 0
    (file,) = Path("samples").glob("*.mp4")
    raw = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(file), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    pixels = subprocess.run(raw, check=True, capture_output=True).stdout
    frames = np.frombuffer(pixels, np.uint8).reshape(9, 32, 32, 3)
    means = frames.mean((1, 2)).flatten()
    assert_same([float(value) for value in means], EXPECTED[f"sample of {name}"])


def test_a_data_set_opens(old: Path) -> None:
    data = LatentData("runs/whole/data", 8)
    assert len(data) == 12
    assert len(read_manifest("runs/whole/data").shards) == 2
    assert data.batch([0]).captions == ["a red circle moves left"]
    assert not verify(Path("runs/whole/data")).problems


def test_old_keys_are_refused_in_a_recipe_and_read_in_the_record_of_a_run(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train-flowmap", "-r", "whole.yaml", "--dry-run"]) == 2
    message = capsys.readouterr().err
    for new in ("global_batch", "optimizer"):
        assert new in message
    record = yaml.safe_load(Path("runs/killed/train-flowmap/recipe.yaml").read_text())
    recipe = load_recorded_recipe(Path("runs/killed/train-flowmap/recipe.yaml"))
    assert record["train_flowmap"]["optimiser"]["warmup"] == recipe.train_flowmap.optimizer.warmup_steps == 3
    assert record["train_flowmap"]["alarms"]["then"] == recipe.train_flowmap.alarms.action == "stop"
