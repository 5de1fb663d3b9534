"""All commands on small random models of every kind that takes pictures, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyflow_cli.cli.app import main
from anyflow_cli.data.dataset import LatentData
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.schema import Recipe
from tests.tiny_pipeline import (
    CLIP_DIM,
    CLIP_TOKENS,
    I2V_A14B,
    PICTURE_SETTINGS,
    make_i2v_folder,
    make_ti2v_folder,
)
from tests.train.stage import make_data, make_recipe

Capture = pytest.CaptureFixture[str]
CAUSAL = {"partition": (1, 1, 1), "full_chunks": 2}
KINDS: dict[str, dict[str, Any]] = {
    "2.1 I2V": {"pictures": "first"},
    "2.1 FLF2V": {"pictures": "first-last"},
    "2.2 I2V": {"pictures": "first"},
    I2V_A14B: {"pictures": "first"},
    "5B": {"pictures": "optional-first", "vae_scale": 16, "height": 64, "width": 64},
    "causal 5B": {"vae_scale": 16, "height": 64, "width": 64, "causal": CAUSAL},
}
TABLE = "prompts.csv"


class Chain:
    """A recipe of a kind, with its teacher, pictures and a table of prompts beside it."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self.kind, self.runs = directory, kind, directory / "runs"
        place = directory / "teacher"
        teacher = make_ti2v_folder(place) if "5B" in kind else make_i2v_folder(place, kind)
        rows = ["prompt,image,last_image"]
        for number in range(3):
            for name in (f"{number}.png", f"{number}-last.png"):
                pixels = np.random.default_rng(len(rows)).integers(0, 256, (48, 64, 3), np.uint8)
                Image.fromarray(pixels).save(directory / name)
            rows.append(f"circle {number},{number}.png,{number}-last.png")
        (directory / TABLE).write_text("\n".join(rows))
        given = {"flow_map": {"conditioning_prob": 0.5}} if "5B" in kind else {}
        made = make_recipe(
            teacher, "unused", model=KINDS[kind], data={"path": None, "prompts": str(directory / TABLE)},
            train_flowmap=given | {"preview_every": 2, "preview_prompts": 1}, distill=given,
            finetune=given | {"world": "shapes", "clips": 2},
            synthesize={"steps": 1, "shard_size": 2, "batch_size": 2},
        )  # fmt: skip
        (directory / "test.yaml").write_text(dump(Recipe.model_validate(made)))

    @property
    def needs(self) -> bool:
        return "I2V" in self.kind or "FLF" in self.kind

    def command(self, *arguments: object) -> list[str]:
        recipe = str(self.directory / "test.yaml")
        return [*map(str, arguments), "-r", recipe, "--runs", str(self.runs)]

    def images(self) -> list[object]:
        last = ["--last-image", self.directory / "0-last.png"] if "FLF" in self.kind else []
        return ["--image", self.directory / "0.png", *last]


@pytest.fixture(params=KINDS)
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> Chain:
    return Chain(tmp_path, request.param)


def refusal(capsys: Capture, command: list[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    return capsys.readouterr().err


def test_a_data_set_holds_the_pictures_of_its_samples(tmp_path: Path, capsys: Capture) -> None:
    chain = Chain(tmp_path, "2.1 I2V")
    assert main(chain.command("synthesize")) == 0
    assert main(chain.command("synthesize", "--verify")) == 0
    data = LatentData(chain.runs / "test" / "data", 8)
    condition = data.batch([0, 2]).condition
    assert condition.channels is not None
    assert condition.picture is not None
    assert condition.channels.shape == (2, 3, 12, 4, 4)
    assert condition.picture.shape == (2, CLIP_TOKENS, CLIP_DIM)
    mask = condition.channels[:, :, :4]
    assert mask[:, 0].eq(1).all()
    assert not mask[:, 1:].any()
    assert (condition.picture[0] - condition.picture[1]).abs().max() > 1e-3

    assert "is not a data set" not in refusal(capsys, chain.command("synthesize", "--set", "model.shift=4"))
    (tmp_path / TABLE).write_text("prompt\na circle")
    said = refusal(capsys, chain.command("synthesize", "--out", tmp_path / "other"))
    assert "prompts.csv has no column 'image'" in said
    (tmp_path / TABLE).write_text("prompt,image\na circle,gone.png")
    assert "gone.png, which is missing" in refusal(
        capsys, chain.command("synthesize", "--out", tmp_path / "other")
    )
    plain = make_data(tmp_path / "plain")
    said = refusal(capsys, chain.command("train-flowmap", "--set", f"data.path={plain}", "--dry-run"))
    assert "has pictures of the kind none; the recipe's model.pictures is first" in said


def test_missing_and_needless_pictures_are_refused_before_a_model_loads(
    tmp_path: Path, capsys: Capture
) -> None:
    chain = Chain(tmp_path, "2.1 FLF2V")
    asked = ["sample", "-p", "a circle", "--dry-run"]
    assert "makes videos from pictures" in refusal(capsys, chain.command(*asked[:-1]))
    assert "between two pictures" in refusal(capsys, chain.command(*asked, "--image", tmp_path / "0.png"))
    both = ["--image", tmp_path / "0.png", "--last-image", tmp_path / "0.png"]
    said = refusal(capsys, chain.command(*asked, *both, "--set", "model.pictures=none"))
    assert "takes no last frame" in said


@pytest.mark.slow
def test_every_command_runs_on_a_model_that_takes_pictures(chain: Chain, capsys: Capture) -> None:
    home = chain.runs / "test"
    for verb in (["synthesize"], ["train-flowmap", "--objective", "flow-matching"], ["train-flowmap"],
                 ["distill"], ["finetune"]):  # fmt: skip
        assert main(chain.command(*verb)) == 0, verb
    for model in ("teacher", "train-flowmap", "distill", "finetune"):
        place = home / model / "model"
        teacher = ["--teacher"] if model == "teacher" else []
        capsys.readouterr()
        asked = ["sample", "-p", "a circle", "--model", place, "--json", *chain.images(), *teacher]
        if chain.kind != "causal 5B" or not teacher:
            assert main(chain.command(*asked)) == 0, model
            made = json.loads(capsys.readouterr().out)
            assert (Path(made["out"]) / made["samples"][0]["file"]).is_file()
        assert main(["inspect", str(place), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["usable"]
    if not chain.needs:
        assert main(chain.command("sample", "-p", "a circle")) == 0
    assert main(chain.command("plan", "--json")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2.1 I2V", "5B"])
def test_a_bidirectional_model_is_evaluated_from_first_frames(
    tmp_path: Path, capsys: Capture, kind: str
) -> None:
    chain = Chain(tmp_path, kind)
    long = ["--set", "model.frames=33", "--set", "model.height=64", "--set", "model.width=64"]
    for verb in ("synthesize", "train-flowmap"):
        assert main(chain.command(verb)) == 0
    capsys.readouterr()
    asked = ["evaluate", "--task", "i2v", "--limit", 2, "--json", *long]
    assert main(chain.command(*asked)) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["teacher"] for one in found["scores"]] == [False, False, True]  # two step counts
    if chain.needs:
        said = refusal(capsys, chain.command("evaluate", "--limit", 2, *long))
        assert "makes videos from pictures, and shapes has only prompts" in said


def test_diffusers_opens_the_teacher_that_was_tuned(tmp_path: Path) -> None:
    import diffusers

    from anyflow_cli.model.pipeline_io import load_network, save_pipeline

    for kind in PICTURE_SETTINGS:
        folder = make_i2v_folder(tmp_path / kind, kind)
        saved = save_pipeline(tmp_path / f"{kind} saved", load_network(folder), folder, {})
        pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(saved)
        assert (pipeline.image_encoder is None) == (not PICTURE_SETTINGS[kind])
    folder = make_ti2v_folder(tmp_path / "5B")
    saved = save_pipeline(tmp_path / "5B saved", load_network(folder), folder, {})
    assert diffusers.WanPipeline.from_pretrained(saved).config.expand_timesteps
    first = load_network(folder).state_dict()
    torch.testing.assert_close(load_network(saved).state_dict(), first, rtol=0, atol=0)
