"""VBench-I2V on models that start from pictures: its prompts and images, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from anyflow_cli.cli.app import main
from anyflow_cli.model.pictures import PictureConditioner
from tests.evaluate.vbench.stand_in import PROMPTS, install
from tests.tiny_pipeline import make_i2v_folder, make_ti2v_folder

SMALL = ["--set=evaluate.samples=1", "--set=evaluate.teacher=false", "--nfe=1", "--set=model.precision=fp32"]
SIZE = ["--set=model.height=32", "--set=model.width=64", "--set=model.frames=5"]


@pytest.mark.parametrize("kind", ["2.1 I2V", "2.2 I2V", "5B"])
def test_each_video_starts_from_the_image_of_its_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    given: list[Tensor] = []

    class Watched(PictureConditioner):
        def __call__(self, first: Tensor, last: Tensor | None = None) -> dict[str, Tensor]:
            given.extend(first)
            return super().__call__(first, last)

    monkeypatch.setattr("anyflow_cli.sample.sampler.PictureConditioner", Watched)
    answers, options = install(monkeypatch, tmp_path / "vbench")
    if kind == "5B":
        model = make_ti2v_folder(tmp_path / "model")
        takes = ["--set=model.pictures=optional-first", "--set=model.vae_scale=16"]
    else:
        model, takes = make_i2v_folder(tmp_path / "model", kind), ["--set=model.pictures=first"]
    command = ["evaluate", "-r", "tiny", "--suite", "vbench-i2v", "--model", str(model)]
    command += [*options, *SMALL, *SIZE]
    command += [*takes, f"--set=model.teacher={model}", "--runs", str(tmp_path / "runs")]
    assert main([*command, "--dry-run", "--json"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["teacher"] for one in found["scores"]] == [False]
    assert [picture.shape for picture in given] == [(3, 32, 64)] * 2
    colors = [picture.mean((1, 2)).tolist() for picture in given]
    assert colors == [[1, 0, 0], [0, 0, 1]]
    assert dict(answers.asked).keys() == {"subject_consistency", "i2v_subject"}
    for place, entry in enumerate(answers.entries["i2v_subject"]):
        assert entry["prompt_en"] == PROMPTS[place]
        assert entry["image_name"] == str(tmp_path / "vbench" / "crops" / f"{place}.png")
        (video,) = entry["video_list"]
        assert Path(video).is_file()


def test_a_model_between_two_pictures_has_no_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, options = install(monkeypatch, tmp_path / "vbench")
    model = make_i2v_folder(tmp_path / "model", "2.1 FLF2V")
    command = ["evaluate", "-r", "tiny", "--suite", "vbench-i2v", "--model", str(model)]
    command += [*options, *SMALL, *SIZE]
    command += ["--set=model.pictures=first-last", f"--set=model.teacher={model}", "--runs", str(tmp_path)]
    assert main([*command, "--dry-run"]) == 2
    assert "makes no videos from text and a first frame" in " ".join(capsys.readouterr().err.split())
