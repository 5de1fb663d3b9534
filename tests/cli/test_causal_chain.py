"""The causal chain from the command line: every verb on what the one before it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.recipe.compare import dump
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, make_data, make_recipe

CAUSAL = {"partition": (1, 1, 1), "full_chunks": 2, "bidirectional": 1.0}
Capture = pytest.CaptureFixture[str]


class Chain:
    """A recipe, and the directory in which all training verbs have been run once."""

    def __init__(self, directory: Path, lora: bool) -> None:
        teacher, self.data = make_wan_folder(directory / "wan"), make_data(directory / "data")
        model = {"causal": CAUSAL, "lora": LORA if lora else None}
        given = {"flow_map": {"conditioning_prob": 0.5}, "preview_every": 2, "preview_prompts": 1}
        recipe = make_recipe(teacher, self.data, model=model, distill=given, finetune=given)
        self.recipe, self.runs = directory / "test.yaml", directory / "runs"
        self.recipe.write_text(dump(recipe))
        self.home = self.runs / "test"
        for verb in ("train-flowmap", "distill"):
            assert main(self.command(verb)) == 0

    def command(self, *arguments: object) -> list[str]:
        return [*map(str, arguments), "-r", str(self.recipe), "--runs", str(self.runs)]


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"), request.param)


def result(capsys: Capture, command: list[str]) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.parametrize("stage", ["train-flowmap", "distill"])
def test_each_stage_leaves_a_causal_pipeline(chain: Chain, stage: str) -> None:
    model = chain.home / stage / "model"
    assert json.loads((model / "model_index.json").read_text())["_class_name"] == "AnyFlowFARPipeline"
    config = json.loads((model / "transformer" / "config.json").read_text())
    assert (config["chunk_partition"], config["full_chunk_limit"]) == ([1, 1, 1], 2)


def test_previews_are_written(chain: Chain) -> None:
    assert (chain.home / "distill" / "previews" / "step-000002.png").exists()


@pytest.mark.parametrize("place", ["distill", "distill/checkpoints/step-000002"])
def test_a_model_and_a_checkpoint_are_sampled_alike(chain: Chain, place: str, capsys: Capture) -> None:
    given = ["sample", "-p", "a circle", "--nfe", "2:1", "--model", chain.home / place]
    found = result(capsys, chain.command(*given))
    assert found["samples"][0]["nfe"] == [2, 1]


def test_finetune_reports_the_error_before_and_after(chain: Chain, capsys: Capture) -> None:
    found = result(capsys, chain.command("finetune", "--data", chain.data))
    assert Path(found["model"]) == chain.home / "finetune" / "model"
    assert found["before"]["flow-map error"] != found["after"]["flow-map error"]


def test_a_model_of_the_other_kind_is_refused(chain: Chain, tmp_path: Path, capsys: Capture) -> None:
    command = chain.command("finetune", "--data", chain.data, "--model", chain.home / "distill")
    command[command.index("--runs") + 1] = str(tmp_path)
    assert main([*command, "--set", "model.causal=null", "--set", "finetune.flow_map.conditioning_prob=0.0",
                 "--set", "distill.flow_map.conditioning_prob=0.0"]) == 2  # fmt: skip
    assert "is a causal model, and recipe test is bidirectional" in capsys.readouterr().err


def test_data_of_another_length_are_refused(chain: Chain, tmp_path: Path, capsys: Capture) -> None:
    data = make_data(tmp_path / "long", shape=(5, 4, 4))
    command = chain.command("train-flowmap", "--set", f"data.path={data}")
    command[command.index("--runs") + 1] = str(tmp_path)
    assert main(command) == 2
    assert "latents of 5 frames of 4x4" in capsys.readouterr().err


@pytest.mark.slow
def test_tiny_causal_runs_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    short: dict[str, Any] = {
        "synthesize.count": 4, "synthesize.steps": 1, "synthesize.batch_size": 4, "finetune.clips": 4,
        "sample.nfe": [1], "evaluate.prompts": 2, "evaluate.teacher": "false", "model.precision": "fp32",
    }  # fmt: skip
    for stage in ("train_flowmap", "distill", "finetune"):
        short |= {
            f"{stage}.{key}": 2 for key in ("steps", "global_batch", "checkpoint_every", "preview_every")
        }
    values = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
    verbs = (
        ["synthesize"], ["train-flowmap"], ["train-flowmap", "--objective", "consistency-ode"], ["distill"],
        ["distill", "--simulation", "consistency"], ["finetune"], ["sample", "-p", "a large red circle"],
    )  # fmt: skip
    for verb in verbs:
        assert main([*verb, "-r", "tiny-causal", *values]) == 0, verb
    capsys.readouterr()
    found = result(capsys, ["evaluate", "-r", "tiny-causal", "--nfe", "1", *values])
    assert found
