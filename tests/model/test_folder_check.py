"""Folders are checked from headers; every problem is named, and a sound folder has none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_cli.model import weights_io
from anyflow_cli.model.encoders import TextEncoderConfig
from anyflow_cli.model.folder_check import check_folder, umt5_shapes
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.pipeline_io import BUILT_IN, resolve_pipeline, save_adapter, shapes_of

VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def folder(wan_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wan_folder, tmp_path / "model"))


def without(name: str) -> Callable[[Path], Any]:
    """Drop a tensor of the text encoder."""

    def change(folder: Path) -> None:
        weights = load_file(folder / TEXT)
        del weights[name]
        save_file(weights, folder / TEXT)

    return change


def config(component: str, **changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        file = folder / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_models_are_sound(name: str) -> None:
    assert check_folder(resolve_pipeline(name)) == []


def test_a_sound_folder_has_no_problem_and_no_weight_is_read(
    wan_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_io, "read_tensors", None)
    assert check_folder(wan_folder) == []
    assert check_folder(wan_folder / "transformer") == []


def cut_and_incomplete(folder: Path) -> None:
    os.truncate(folder / VAE, 0)
    shutil.rmtree(folder / "scheduler")


PROBLEMS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "text encoder cut": (lambda p: os.truncate(p / TEXT, 9000), ["model.safetensors is damaged"]),
    "text encoder of LFS": (lambda p: (p / TEXT).write_text(LFS), ["is a Git LFS pointer"]),
    "text encoder in part": (without("shared.weight"), ["shared.weight is missing"]),
    "wider text": (config("text_encoder", d_ff=96), ["wi_0.weight has shape (64, 32) instead of (96, 32)"]),
    "no tokenizer": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), ["holds none of tokenizer.json"]),
    "another VAE": (
        config("vae", _class_name="AutoencoderKL"),
        ["_class_name: Input should be 'AutoencoderKLWan'"],
    ),
    "wider VAE": (config("vae", base_dim=16), ["vae do not fit config.json"]),
    "fewer means": (config("vae", latents_mean=[0.0]), ["latents_mean has 1 values for 8 channels"]),
    "odd VAE": (config("vae", dim_mult="x"), ["config.json is damaged: dim_mult"]),
    "no VAE": (config("vae", temperal_downsample=[]), ["does not describe a VAE"]),
    "original Wan": (config("transformer", _class_name="WanModel"), ["'WanModel', which anyflow cannot run"]),
    "shift": (
        lambda p: (p / "scheduler/scheduler_config.json").write_text('{"shift": "x"}'),
        ["scheduler_config.json is damaged: shift"],
    ),
    "two at once": (
        cut_and_incomplete,
        ["has no scheduler directory", "vae/diffusion_pytorch_model.safetensors is damaged"],
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_named(folder: Path, case: str) -> None:
    change, words = PROBLEMS[case]
    change(folder)
    found = check_folder(folder)
    for expected in words:
        assert any(expected in problem for problem in found), found
    assert not any("\n" in problem for problem in found)


def test_an_adapter_is_checked(tmp_path: Path) -> None:
    weights = {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 32)}
    pair = weights | {"blocks.0.attn1.to_q.lora_B.weight": torch.ones(32, 4)}
    save_adapter(tmp_path / "sound", pair, LoraSize(4, 8), "base")
    assert check_folder(tmp_path / "sound") == []
    save_adapter(tmp_path / "half", weights, LoraSize(4, 8), "base")
    assert "is not one of a pair" in check_folder(tmp_path / "half")[0]
    save_adapter(tmp_path / "rank", pair, LoraSize(2, 8), "base")
    assert "is not an adapter of rank 2" in check_folder(tmp_path / "rank")[0]


def test_shapes_of_a_text_encoder_are_those_of_its_class() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 31, "d_model": 24, "d_kv": 4, "d_ff": 20, "num_layers": 3, "num_heads": 5}
    expected = shapes_of(UMT5EncoderModel(UMT5Config(**sizes)).state_dict())
    del expected["encoder.embed_tokens.weight"]
    assert umt5_shapes(TextEncoderConfig(**sizes)) == expected
