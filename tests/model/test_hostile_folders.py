"""Model folders that are damaged or hostile are refused in one sentence: no traceback, no escape."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model import pipeline_io
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import (
    load_network,
    save_adapter,
    save_pipeline,
)

ENCODER_CONFIG = "text_encoder/config.json"
GONE = object()  # a key that is removed


@pytest.fixture(scope="module")
def sound(wan_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a sharded transformer, and an adapter beside it."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_io, "SHARD_BYTES", 40_000)
        save_pipeline(folder, two_time_from(load_network(wan_folder)), wan_folder, {})
    pair = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}
    weights = {f"blocks.0.attn1.to_q.lora_{side}.weight": value for side, value in pair.items()}
    save_adapter(folder / "adapter", weights, LoraSize(4, 8), "base")
    return folder


def text(folder: Path) -> None:
    TextEncoder.load(folder).encode(["a red circle"], 8)


def video(folder: Path) -> None:
    vae = VideoVAE.load(folder)
    vae.decode(torch.zeros(1, 1, vae.channels, 2, 2))
    vae.encode(torch.zeros(1, 1, 3, *(2 * vae.spatial_factor,) * 2))


EDITS: dict[str, tuple[str, tuple[str, ...], Any, Callable[[Path], None]]] = {
    "no padding token": ("tokenizer/tokenizer_config.json", ("pad_token",), GONE, text),
    "no end token": ("tokenizer/tokenizer.json", ("post_processor", "special_tokens", "</s>"), GONE, text),
    "a negative distance": (ENCODER_CONFIG, ("relative_attention_max_distance",), -1, text),
    "a distance of its exact part": (ENCODER_CONFIG, ("relative_attention_max_distance",), 8, text),
    "two buckets": (ENCODER_CONFIG, ("relative_attention_num_buckets",), 2, text),
    "no deviations": ("vae/config.json", ("latents_std",), GONE, video),
    "a patch that is no number": ("vae/config.json", ("patch_size",), float("nan"), video),
    "a patch that is a list": ("vae/config.json", ("patch_size",), [1], video),
}


@pytest.mark.parametrize(("name", "keys", "value", "use"), EDITS.values(), ids=EDITS)
def test_settings_that_a_library_trips_over_are_refused(
    sound: Path, tmp_path: Path, name: str, keys: tuple[str, ...], value: Any, use: Callable[[Path], None]
) -> None:
    file = Path(shutil.copytree(sound, tmp_path / "model")) / name
    document = json.loads(file.read_text())
    inner = document
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    if value is not GONE:
        inner[keys[-1]] = value
    file.write_text(json.dumps(document))
    with pytest.raises(UsageError) as refused:
        use(tmp_path / "model")
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_a_tokenizer_without_its_settings_is_used_or_refused(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UsageError):
        text(folder)


def test_an_index_does_not_lead_out_of_its_folder(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    outside = tmp_path / "outside.safetensors"
    shard = next((folder / "transformer").glob("*00001-of*.safetensors"))
    shard.rename(outside)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text(index.read_text().replace(shard.name, "../../outside.safetensors"))
    with pytest.raises(UsageError, match="not a file inside that directory"):
        load_network(folder)
    assert "not a file inside that directory" in check_folder(folder)[0]


def test_a_tokenizer_of_another_model_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"circle": 9', '"circle": 5000'))
    assert '"circle": 5000' in file.read_text()
    with pytest.raises(UsageError, match=r"token 5000, but the text encoder has \d+ embeddings"):
        text(folder)


def test_loops_and_special_files_beside_a_component_are_not_copied(sound: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound, tmp_path / "model"))
    tokenizer = folder / "tokenizer"
    (tokenizer / "loop").symlink_to(".")
    (tokenizer / "self").symlink_to("self")
    (tokenizer / "zero").symlink_to("/dev/zero")
    os.mkfifo(tokenizer / "fifo")
    (tokenizer / "linked.json").symlink_to("tokenizer.json")
    copy = save_pipeline(tmp_path / "copy", load_network(folder), folder, {}) / "tokenizer"
    expected = {file.name for file in (sound / "tokenizer").iterdir()} | {"linked.json"}
    assert {file.name for file in copy.iterdir()} == expected
    assert not any(file.is_symlink() for file in copy.iterdir())
