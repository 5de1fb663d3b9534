"""Folders round trip and sample the same video in diffusers; unusable ones are refused by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model import pipeline_io
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.pipeline_io import (
    FROZEN,
    component,
    load_network,
    pipeline_files,
    read_shift,
    resolve_pipeline,
    save_pipeline,
)
from anyflow_cli.recipe.load import load_recipe
from tests.model.helpers import distance, inputs, ours, theirs
from tests.tiny_pipeline import SHIFT

PROMPT = "a small red circle moving left"


def flow_map(source: Path) -> FlowMapTransformer:
    """A two-time network with two different embedders."""
    network = two_time_from(load_network(source))
    draw = torch.Generator().manual_seed(7)
    for parameter in network.condition_embedder.delta_embedder.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return network


def same(first: FlowMapTransformer, second: FlowMapTransformer) -> bool:
    weights, others = first.state_dict(), second.state_dict()
    return first.config == second.config and all(torch.equal(weights[name], others[name]) for name in others)


def test_a_wan_folder_is_read(wan_folder: Path) -> None:
    import diffusers

    network = load_network(wan_folder)
    reference = diffusers.WanTransformer3DModel.from_pretrained(wan_folder / "transformer")
    x = inputs()
    with torch.no_grad():
        v = reference(x.z.transpose(1, 2), 1000 * x.t[:, 0], x.text, return_dict=False)[0].transpose(1, 2)
    assert distance(network(x.z, x.t[:, 0], x.r[:, 0], x.text), v) < 1e-5
    assert same(load_network(wan_folder / "transformer"), network)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_saved_result_opens_in_diffusers_and_gives_the_same_video(wan_folder: Path, tmp_path: Path) -> None:
    from diffusers import AnyFlowPipeline

    network = flow_map(wan_folder)
    target = save_pipeline(tmp_path / "model", network, wan_folder, {"parent": "wan"})
    pipeline = AnyFlowPipeline.from_pretrained(target)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3):
        video = pipeline(
            PROMPT,
            latents=noise.transpose(1, 2),
            height=32,
            width=32,
            num_frames=9,
            num_inference_steps=steps,
            output_type="pt",
            max_sequence_length=16,
        ).frames
        assert distance(sampled(target, noise, steps), video) < 1e-4
        assert video.std() > 0.01


def sampled(model: Path, z: torch.Tensor, steps: int) -> torch.Tensor:
    """Flow-map Euler over the shifted grid, with our loaders of the folder."""
    network, text = load_network(model), TextEncoder.load(model).encode([PROMPT], 16)
    shift = read_shift(model)
    grid = torch.linspace(1, 0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid)
    for t, r in pairwise(grid):
        z = z - (t - r) * network(z, t.expand(1), r.expand(1), text)
    return VideoVAE.load(model).decode(z)


@pytest.mark.parametrize("name", ["tiny", "tiny-anyflow"])
def test_built_in_models_have_the_shift_of_their_recipe(name: str) -> None:
    assert read_shift(resolve_pipeline(name)) == load_recipe("tiny").model.shift


def test_built_in_models_share_one_copy_of_what_training_does_not_change() -> None:
    teacher, student = map(resolve_pipeline, pipeline_io.BUILT_IN)
    files = pipeline_files(student)
    for name in FROZEN:
        assert component(student, name) == component(teacher, name)
        assert files[f"{name}/config.json" if name != "tokenizer" else "tokenizer/tokenizer.json"].is_file()
    assert list(files) == sorted(files, key=lambda name: name.split("/"))
    assert component(student, "transformer") == student / "transformer"
    with pytest.raises(UsageError, match="has no image_encoder directory"):
        component(student, "image_encoder")


def test_a_folder_elsewhere_borrows_no_components(tmp_path: Path) -> None:
    (tmp_path / "tiny-anyflow").mkdir()
    with pytest.raises(UsageError, match="has no vae directory"):
        component(tmp_path / "tiny-anyflow", "vae")


def test_a_saved_folder_reads_back_to_the_bit(wan_folder: Path, tmp_path: Path) -> None:
    network = flow_map(wan_folder)
    target = save_pipeline(tmp_path / "a" / "model", network, wan_folder, {"seed": 3}, shift=2.5)
    assert same(load_network(target), network)
    assert read_shift(target) == 2.5
    assert json.loads((target / "lineage.json").read_text()) == {"seed": 3}
    assert os.listdir(target.parent) == ["model"]
    again = save_pipeline(
        tmp_path / "again", load_network(target), target, {}
    )  # an AnyFlow folder is a source too
    assert same(load_network(again), network)
    assert read_shift(again) == 2.5


def test_large_components_are_shared_not_copied(wan_folder: Path, tmp_path: Path) -> None:
    target = save_pipeline(tmp_path / "model", flow_map(wan_folder), wan_folder, {})
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (target / name).samefile(wan_folder / name)


def test_a_network_with_one_time_is_saved_as_a_wan_folder(wan_folder: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    network = load_network(wan_folder)
    target = save_pipeline(tmp_path / "teacher", network, wan_folder, {})
    assert same(load_network(target), network)
    assert WanPipeline.from_pretrained(target).scheduler.config.shift == SHIFT


def test_a_zero_init_network_is_saved_in_the_parameters_of_the_class(
    wan_folder: Path, tmp_path: Path
) -> None:
    network = two_time_from(load_network(wan_folder), conditioning="zero-init")
    torch.nn.init.normal_(network.condition_embedder.delta_proj.weight, std=0.1)
    back = load_network(save_pipeline(tmp_path / "model", network, wan_folder, {}))
    x = inputs()
    assert distance(back(x.z, x.t, x.r, x.text), network(x.z, x.t, x.r, x.text)) < 1e-6
    assert (back.config.class_name, back.config.delta) == ("AnyFlowTransformer3DModel", "t-r")


def test_a_causal_folder_round_trips(wan_folder: Path, tmp_path: Path) -> None:
    from diffusers import AnyFlowFARPipeline

    network = ours(theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=2, chunk_partition=(1, 2)))
    target = save_pipeline(tmp_path / "causal", network, wan_folder, {})
    assert same(load_network(target), network)
    opened = AnyFlowFARPipeline.from_pretrained(target)
    assert opened.transformer.config.chunk_partition == [1, 2]


def test_sharded_weights_are_written_and_read(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AnyFlowTransformer3DModel

    monkeypatch.setattr(pipeline_io, "SHARD_BYTES", 40_000)
    network = flow_map(wan_folder)
    target = save_pipeline(tmp_path / "model", network, wan_folder, {})
    assert len(list((target / "transformer").glob("*.safetensors"))) > 2
    assert same(load_network(target), network)
    AnyFlowTransformer3DModel.from_pretrained(target / "transformer")
    (sorted((target / "transformer").glob("*.safetensors"))[1]).unlink()
    with pytest.raises(UsageError, match=r"00002-of-.* is missing"):
        load_network(target)


def test_weights_are_saved_and_read_in_another_type(wan_folder: Path, tmp_path: Path) -> None:
    target = save_pipeline(tmp_path / "half", flow_map(wan_folder), wan_folder, {}, dtype=torch.bfloat16)
    kinds = {parameter.dtype for parameter in load_network(target, dtype=None).parameters()}
    assert kinds == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_network(target).parameters()} == {torch.float32}


# --- what cannot be used


def broken(wan_folder: Path, target: Path, change: Callable[[Path], Any]) -> Path:
    """A copy of the transformer's folder with a defect."""
    shutil.copytree(wan_folder / "transformer", target)
    change(target)
    return target


def rewrite(name: str, **changes: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | changes))

    return change


WEIGHT_FILE = "diffusion_pytorch_model.safetensors"
BROKEN = {
    "no weights": (lambda p: (p / WEIGHT_FILE).unlink(), "holds no diffusion_pytorch_model.safetensors"),
    "other format": (lambda p: (p / WEIGHT_FILE).rename(p / "diffusion_pytorch_model.bin"), "holds no"),
    "truncated": (lambda p: os.truncate(p / WEIGHT_FILE, 5000), "is damaged"),
    "empty file": (lambda p: os.truncate(p / WEIGHT_FILE, 0), "is damaged"),
    "no config": (lambda p: (p / "config.json").unlink(), "not a multiple of 128"),
    "bad config": (lambda p: (p / "config.json").write_text("{"), "Invalid JSON"),
    "config of a list": (lambda p: (p / "config.json").write_text("[]"), "config.json is damaged"),
    "other class": (rewrite("config.json", _class_name="CogVideoXTransformer3DModel"), "CogVideoX"),
    "more layers": (rewrite("config.json", num_layers=3), "blocks.2.* missing"),
    "fewer layers": (rewrite("config.json", num_layers=1), "blocks.1.* unexpected"),
    "wider": (rewrite("config.json", ffn_dim=48), r"has shape \(64, 32\) instead of \(48, 32\)"),
    "size that is no number": (rewrite("config.json", num_layers="two"), "num_layers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_sentence(wan_folder: Path, tmp_path: Path, case: str) -> None:
    change, words = BROKEN[case]
    path = broken(wan_folder, tmp_path / "model", change)
    with pytest.raises(UsageError, match=words) as caught:
        load_network(path)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_addresses(wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_pipeline(str(wan_folder)) == wan_folder
    monkeypatch.setattr(pipeline_io, "ASSETS", tmp_path)
    (tmp_path / "tiny").mkdir()
    assert resolve_pipeline("tiny") == tmp_path / "tiny"
    with pytest.raises(AnyflowError, match="tiny-anyflow is not part of this installation"):
        resolve_pipeline("tiny-anyflow")
    (tmp_path / "file").touch()
    assert resolve_pipeline(str(tmp_path / "file")) == tmp_path / "file"
    for name in ("nothing", "/no/where", "./a/b", "a/b/c", ""):
        with pytest.raises(UsageError, match="There is no model at"):
            resolve_pipeline(name)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("Cannot reach the Hub.\nMore lines.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(AnyflowError, match=r"not a local folder .*Cannot reach the Hub\.\)") as caught:
        resolve_pipeline("someone/some-model")
    assert caught.value.exit_code == 1
    assert caught.value.hint


def test_nothing_is_overwritten_unless_asked(wan_folder: Path, tmp_path: Path) -> None:
    network = flow_map(wan_folder)
    target = save_pipeline(tmp_path / "model", network, wan_folder, {"n": 1})
    with pytest.raises(UsageError, match="exists already"):
        save_pipeline(target, network, wan_folder, {"n": 2})
    assert json.loads((target / "lineage.json").read_text()) == {"n": 1}
    save_pipeline(target, network, wan_folder, {"n": 2}, replace=True)
    assert json.loads((target / "lineage.json").read_text()) == {"n": 2}


@pytest.mark.parametrize("where", [(pipeline_io, "write_transformer"), (shutil, "copyfile")])
def test_a_full_disk_leaves_nothing_behind(
    wan_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: tuple[Any, str]
) -> None:
    """While writing the network or, where files cannot be shared, while copying a component."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(*where, full)
    with pytest.raises(AnyflowError, match=r"Cannot write .*: No space left on device"):
        save_pipeline(tmp_path / "model", flow_map(wan_folder), wan_folder, {})
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_its_parts_is_named(wan_folder: Path, tmp_path: Path) -> None:
    bare = wan_folder / "transformer"
    with pytest.raises(UsageError, match="has no vae directory"):
        save_pipeline(tmp_path / "model", flow_map(wan_folder), bare, {})
    assert list(tmp_path.iterdir()) == []
