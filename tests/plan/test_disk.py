"""Planned sizes on disk against files that the program really writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyflow_cli.data.shards import LatentSample, shard_path, write_shard
from anyflow_cli.model.lora import MergedNetwork
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import save_adapter, save_pipeline
from anyflow_cli.plan.estimate import checkpoint_usage, data_usage, model_usage, target_of
from anyflow_cli.plan.hardware import parse_hardware
from anyflow_cli.plan.networks import Setup
from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint
from tests.plan.small import CONFIG, backbone, setup, trainer
from tests.tiny_pipeline import make_wan_folder


def size_of(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


def test_a_data_set_takes_what_its_shards_take(tmp_path: Path) -> None:
    recipe = schema.Recipe(
        name="t",
        model=schema.ModelSection(teacher="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", frames=9, max_text_tokens=64),
        synthesize=schema.SynthesizeSection(count=3),
    )
    target = target_of(recipe, parse_hardware("1x80GB"))
    text = torch.zeros(64, 4096, dtype=torch.bfloat16)
    latents = torch.zeros(target.setup(None, None).latent, dtype=torch.bfloat16)
    facts = {"seed": 1, "source": "teacher", "fps": 16, "frames": 9}
    write_shard(
        shard_path(tmp_path, 0), [LatentSample(i, "a caption", latents, text, facts) for i in range(3)]
    )
    planned = sum(data_usage(target).values())
    assert planned == pytest.approx(size_of(tmp_path, "*.tar"), rel=0.01)
    assert data_usage(target)["latents"] == 3 * latents.nbytes


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_take_what_the_trainer_saves(lora: bool, tmp_path: Path) -> None:
    wanted = setup("flow-matching", lora=lora)
    run = trainer(wanted, tmp_path)
    for phase in run.optimizers:
        for parameter in phase.weights:
            parameter.grad = torch.zeros_like(parameter)
        phase.update(1, norm=0.0)
    saved = checkpoint.save(tmp_path / "checkpoints", run.state(), keep=2)
    planned = checkpoint_usage(wanted)
    state = checkpoint.load(saved)
    tensors = [tensor for group in state.tensors.values() for tensor in group.values()]
    for optimizer in state.optimizers.values():
        tensors += [value for own in optimizer["state"].values() for value in own.values() if value.dim()]
    assert planned == 3 * sum(tensor.nbytes for tensor in tensors) < 3 * size_of(saved)


@pytest.mark.parametrize(
    "wanted",
    [
        setup("flow-map"),
        setup("flow-map", precision="bf16"),
        setup("flow-map", lora=False),
        setup("on-policy", scores=replace(CONFIG, layers=4)),
    ],
    ids=["adapter", "on a bf16 base", "all weights", "beside another score's base"],
)
def test_a_finished_model_takes_its_network_and_its_adapter(wanted: Setup, tmp_path: Path) -> None:
    roles = backbone(wanted)
    source = make_wan_folder(tmp_path / "wan")
    start = FlowMapTransformer(roles.network_of("student").config)
    merged = MergedNetwork(start, roles.state_dict_of("student"), roles.lora)
    folders = [save_pipeline(tmp_path / "model", merged, source, {}, shift=5.0) / "transformer"]
    if roles.lora:
        folders.append(tmp_path / "adapter")
        save_adapter(folders[-1], roles.state_dict_of("student"), roles.lora, str(source))
    written = sum(size_of(path, "*.safetensors") for path in folders)
    assert model_usage(wanted) == pytest.approx(written, rel=0.05)
