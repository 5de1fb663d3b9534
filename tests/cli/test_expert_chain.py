"""All commands on a small random model of the shape of Wan 2.2 A14B, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from tests.tiny_pipeline import make_expert_folder, make_wan_folder

Capture = pytest.CaptureFixture[str]
GUIDANCE = "{high: 4.0, low: 3.0}"
RECIPE = f"""
extends: tiny
model:
  {{teacher: TEACHER, pretrained_any_step: null, lora: {{rank: 4, alpha: 4}}, shift: 12.0, precision: fp32}}
synthesize: {{count: 4, batch_size: 2, shard_size: 2, steps: 4, guidance: {GUIDANCE}}}
train_flowmap: {{steps: 3, global_batch: 2, preview_every: 3, preview_prompts: 1, flow_map: {{guidance: 2}}}}
distill: {{steps: 2, global_batch: 2, preview_every: 2, preview_prompts: 1, real_guidance: {GUIDANCE}}}
finetune: {{steps: 2, clips: 4, global_batch: 2, preview_every: 2, preview_prompts: 1}}
sample: {{nfe: [2], teacher_steps: 3, teacher_guidance: {GUIDANCE}, teacher_sampler: unipc, batch_size: 2}}
evaluate: {{nfe: [2], prompts: 2, batch_size: 2}}
"""


def write_recipe(directory: Path, teacher: Path) -> Path:
    file = directory / "mine.yaml"
    file.write_text(RECIPE.replace("TEACHER", str(teacher)))
    return file


def result(capsys: Capture, *command: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, command), "--json"]) == 0, command
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


@pytest.mark.slow
def test_all_commands_run_on_two_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, make_expert_folder(tmp_path / "teacher"))
    assert result(capsys, "synthesize", "-r", recipe)["complete"]
    for command in ("train-flowmap", "distill", "finetune"):
        model = Path(result(capsys, command, "-r", recipe)["model"])
        index = json.loads((model / "model_index.json").read_text())
        assert (index["boundary_ratio"], index["transformer_2"][1]) == (0.875, "AnyFlowTransformer3DModel")
    assert result(capsys, "sample", "-r", recipe, "-p", "a circle")["samples"]
    teacher = result(capsys, "sample", "-r", recipe, "-p", "a circle", "--teacher")
    record = json.loads((Path(teacher["out"]) / "samples.json").read_text())
    assert record["guidance"] == {"high": 4.0, "low": 3.0}
    offloaded = ["--set", "memory.network=alternating", "--model", "runs/mine/distill"]
    assert result(capsys, "sample", "-r", recipe, "-p", "a circle", *offloaded)["samples"]
    assert result(capsys, "evaluate", "-r", recipe)
    assert set(result(capsys, "plan", "-r", recipe)["stages"]) >= {"synthesize", "distill", "sample"}
    assert main(["doctor", "-r", str(recipe)]) == 0
    assert result(capsys, "export", "--model", "runs/mine/distill", "--format", "adapter", "--out", "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {"high", "low"}


def test_a_dry_run_names_what_two_experts_lack(tmp_path: Path, capsys: Capture) -> None:
    recipe = write_recipe(tmp_path, make_expert_folder(tmp_path / "teacher"))
    (tmp_path / "teacher" / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    assert main(["synthesize", "-r", str(recipe), "--dry-run", "--runs", str(tmp_path)]) == 2
    assert "transformer_2 holds no diffusion_pytorch_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["sample", "--teacher", "-p", "a circle"], "sample.teacher_guidance"),
        (["synthesize"], "synthesize.guidance"),
        (["evaluate", "--limit", "1", "--model", "{teacher}"], "sample.teacher_guidance"),
        (["train-flowmap", "--set", "train_flowmap.flow_map.guidance={{high: 2, low: 3}}"],
         "train_flowmap.flow_map.guidance"),
        (["distill"], "distill.real_guidance"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)  # fmt: skip
def test_guidance_per_expert_is_refused_for_one_network(
    tmp_path: Path, capsys: Capture, command: list[str], key: str
) -> None:
    teacher = make_wan_folder(tmp_path / "teacher")
    recipe = write_recipe(tmp_path, teacher)
    named = [part.format(teacher=teacher) for part in command]
    assert main([*named, "--dry-run", "-r", str(recipe), "--runs", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{key} has a scale for each of two experts" in said
    assert f"{teacher} is one network" in said


def test_guidance_of_stage_1_is_no_matter_in_stage_2(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, make_wan_folder(tmp_path / "teacher"))
    stage_1 = ["--set", "train_flowmap.flow_map.guidance={high: 2, low: 3}"]
    asked = ["--set", "distill.real_guidance=1.5", *stage_1, "--dry-run", "--runs", str(tmp_path)]
    assert main(["distill", "-r", str(recipe), *asked]) == 0


def test_guidance_per_expert_is_no_matter_where_nothing_is_guided(tmp_path: Path, capsys: Capture) -> None:
    folder = make_wan_folder(tmp_path / "teacher")
    recipe = write_recipe(tmp_path, folder)
    any_step = save_pipeline(tmp_path / "any-step", two_time_from(load_network(folder)), folder, {})
    asked = ["sample", "-p", "a circle", "--dry-run", "-r", str(recipe), "--runs", str(tmp_path)]
    assert main([*asked, "--model", str(any_step)]) == 0
    assert main([*asked, "--model", str(folder), "--sampler", "consistency"]) == 0
    assert main([*asked, "--model", str(folder)]) == 2
