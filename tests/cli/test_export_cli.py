"""``anyflow export`` as its users see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.cli import app
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from tests.tiny_pipeline import make_wan_folder

Run = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    wan = make_wan_folder(folder / "wan")
    return save_pipeline(folder / "any", two_time_from(load_network(wan)), wan, {"recipe": "tiny"})


@pytest.mark.parametrize(
    ("kind", "made"),
    [("diffusers", "out"), ("merged", "out/model.safetensors"), ("comfyui", "out/model.safetensors")],
)
def test_a_model_in_each_format(model: Path, tmp_path: Path, capsys: Run, kind: str, made: str) -> None:
    given = ["export", "--model", str(model), "--format", kind, "--out", str(tmp_path / "out"), "--json"]
    assert app.main(given) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"model": str(model), "format": kind, "out": str(tmp_path / made)}
    assert (tmp_path / made).exists()
    assert ("ComfyUI" in err) == (kind == "comfyui")
    assert app.main(given) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_model_with_one_time_needs_no_other_node_of_comfyui(
    model: Path, tmp_path: Path, capsys: Run
) -> None:
    wan = model.with_name("wan")
    assert (
        app.main(["export", "--model", str(wan), "--format", "comfyui", "--out", str(tmp_path / "out")]) == 0
    )
    assert "ComfyUI" not in capsys.readouterr().err


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path, capsys: Run) -> None:
    given = ["export", "--model", str(model), "--out", str(tmp_path / "out"), "--dry-run"]
    assert app.main(given) == 0
    assert not (tmp_path / "out").exists()
    assert "(given with --model)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model", "no/where/at/all"], "There is no model at no/where/at/all."),
        (["--format", "onnx"], "--format"),
        (["--set", "model.pretrained_any_step=null"], "There is no any-step model at"),
    ],
)
def test_wrong_use_ends_with_2(tmp_path: Path, capsys: Run, given: list[str], message: str) -> None:
    assert app.main(["export", "--runs", str(tmp_path), "--out", str(tmp_path / "out"), *given]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "hint: " in err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_an_adapter_says_so(model: Path, tmp_path: Path, capsys: Run) -> None:
    given = ["export", "--model", str(model), "--format", "adapter", "--out", str(tmp_path / "out")]
    assert app.main(given) == 2
    assert "has no adapter" in capsys.readouterr().err
