"""Model folders that are damaged or hostile are refused in one sentence: no traceback, no hang, no escape."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model import pipeline_io
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import (
    load_adapter,
    load_network,
    read_shift,
    save_adapter,
    save_pipeline,
)
from tests.model.hostile import fresh_copy, mutate

SECONDS = 20  # that one use of a mutant may take on a busy machine
FAST, SLOW = range(40), range(40, 2000)
FOUND = (45, 124, 3230, 3606, 3689, 4781)  # seeds that ended in a traceback once


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


def network(folder: Path) -> None:
    loaded = load_network(folder)
    channels, width = loaded.config.in_channels, loaded.config.text_dim
    loaded(torch.zeros(1, 1, channels, 4, 4), torch.ones(1), torch.ones(1), torch.zeros(1, 3, width))


def export(folder: Path) -> None:
    save_pipeline(folder.parent / "export", load_network(folder), folder, {}, replace=True)


USES: dict[str, list[Callable[[Path], Any]]] = {
    "text_encoder": [text, check_folder],
    "tokenizer": [text, check_folder],
    "vae": [video, check_folder],
    "transformer": [network, check_folder],
    "scheduler": [read_shift, export, check_folder],
    "adapter": [
        lambda folder: load_adapter(folder / "adapter"),
        lambda folder: check_folder(folder / "adapter"),
    ],
}


@pytest.fixture
def watched() -> Iterator[None]:
    """Ends what hangs, such as the reading of a FIFO."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    "seeds", [FAST, FOUND, pytest.param(SLOW, marks=pytest.mark.slow)], ids=["fast", "found", "slow"]
)
def test_mutants_are_used_or_refused_in_one_sentence(
    sound: Path, tmp_path: Path, seeds: Sequence[int]
) -> None:
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    refused, failures = 0, []
    for seed in seeds:
        folder = fresh_copy(sound, tmp_path / "model")
        file, done = mutate(folder, seed)
        part = file.relative_to(folder).parts[0]
        for use in USES.get(part, [network, export, check_folder]):
            signal.alarm(SECONDS)
            try:
                found = use(folder)
                if use is check_folder and any("\n" in problem for problem in found):
                    failures.append((seed, f"{file.name} {done}", str(found)))
            except AnyflowError as error:
                refused += 1
                if "\n" in error.message or not error.hint:
                    failures.append((seed, f"{file.name} {done}", error.message))
            except Exception as error:
                failures.append((seed, f"{file.name} {done}", repr(error)))
            signal.alarm(0)
    assert failures == []
    assert refused > len(seeds) / 3
    assert canary.read_text() == "untouched"


def test_an_index_does_not_lead_out_of_its_folder(sound: Path, tmp_path: Path) -> None:
    folder = fresh_copy(sound, tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    shard = next((folder / "transformer").glob("*00001-of*.safetensors"))
    shard.rename(outside)
    index = next((folder / "transformer").glob("*.index.json"))
    index.write_text(index.read_text().replace(shard.name, "../../outside.safetensors"))
    with pytest.raises(UsageError, match="not a file inside that directory"):
        load_network(folder)
    assert "not a file inside that directory" in check_folder(folder)[0]


def test_a_tokenizer_of_another_model_is_refused(sound: Path, tmp_path: Path) -> None:
    folder = fresh_copy(sound, tmp_path / "model")
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"circle": 9', '"circle": 5000'))
    assert '"circle": 5000' in file.read_text()
    with pytest.raises(UsageError, match=r"token 5000, but the text encoder has \d+ embeddings"):
        text(folder)


def test_loops_and_special_files_beside_a_component_are_not_copied(sound: Path, tmp_path: Path) -> None:
    folder = fresh_copy(sound, tmp_path / "model")
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
