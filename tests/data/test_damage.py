"""Damaged and hostile data sets: never a traceback, never a silent pass through ``verify``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.shards import (
    LatentSample,
    read_manifest,
    read_shard_record,
    shard_path,
    write_shard,
)
from anyflow_cli.data.verify import verify
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import write_json
from tests.data.datasets import SHAPE, TEXT_DIM, make_data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_data(tmp_path_factory.mktemp("data") / "d", count=6, size=2)
    write_json(directory / "provenance.json", {"seed": 0})
    assert verify(directory).problems == ()
    return directory


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "d")
    return tmp_path / "d"


def use_everything(directory: Path) -> list[AnyflowError]:
    """Read a data set in every way; return the sentences, let anything else pass."""
    problems = []
    for use in (
        lambda: read_manifest(directory),
        lambda: [read_shard_record(shard_path(directory, number)) for number in range(3)],
        lambda: LatentData(directory, 8).batch(range(6)),
        lambda: LatentData(directory, 8).negative,
    ):
        try:
            use()
        except AnyflowError as error:
            problems.append(error)
    return problems


def change_manifest(data: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((data / "manifest.json").read_text())
    change(content)
    write_json(data / "manifest.json", content)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no shards": (lambda m: m.update(shards=[]), "lists no shards"),
    "a wrong count": (lambda m: m.update(count=7), "states 7 samples, and its shards 6"),
    "a doubled shard": (lambda m: m["shards"].append(m["shards"][0]), "lists shards twice: 00000.tar"),
    "another shape": (lambda m: m.update(latent_shape=[9, 3, 4, 4]), "another shape than its shard"),
    "another width": (lambda m: m.update(text_dim=9), "another shape than its shard"),
    "a path": (lambda m: m["shards"][0].update(name="../../00000.tar"), "shards.0.name"),
    "an absolute path": (lambda m: m["shards"][0].update(name="/etc/00000.tar"), "shards.0.name"),
    "another file": (lambda m: m.update(negative="../negative.safetensors"), "negative"),
}


@pytest.mark.parametrize(("change", "said"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_cannot_be_true_is_refused_and_reported(
    data: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    change_manifest(data, change)
    with pytest.raises(UsageError, match=r"manifest\.json") as error:
        LatentData(data, 8)
    assert said in error.value.message
    try:
        problems = " ".join(verify(data).problems)
    except UsageError as refused:
        problems = refused.message
    assert said in problems


def rewrite(data: Path, sample: LatentSample) -> None:
    """Put a sample into shard 1 whose records, hashes and index all agree."""
    first = LatentSample(2, "a", torch.zeros(SHAPE), torch.zeros(1, TEXT_DIM))
    record = write_shard(data / "00001.tar", [first, sample])
    entry = json.loads((data / "00001.json").read_text())
    assert entry["sha256"] == record.sha256
    entry |= {"latent_shape": list(SHAPE), "text_dim": TEXT_DIM}
    write_json(data / "00001.json", entry)
    change_manifest(data, lambda manifest: manifest["shards"].__setitem__(1, entry))


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "bf16 latents": ({"latents": torch.zeros(SHAPE).bfloat16()}, "1 as bfloat16 and float32"),
    "integer latents": (
        {"latents": torch.zeros(SHAPE, dtype=torch.int64)},
        "has a tensor of type torch.int64",
    ),
    "flat text": ({"text": torch.zeros(TEXT_DIM)}, "has a tensor of shape"),
    "deep text": ({"text": torch.zeros(1, 1, TEXT_DIM)}, "has a tensor of shape"),
    "empty text": ({"text": torch.zeros(0, TEXT_DIM)}, "has a tensor of shape"),
    "no caption": ({"caption": None}, "has no caption"),
    "another index": ({"index": True}, "is sample True"),
    "infinite values": ({"latents": torch.full(SHAPE, float("inf"))}, "not finite"),
}


@pytest.mark.parametrize(("change", "said"), ODD.values(), ids=ODD)
def test_samples_are_looked_at_behind_right_hashes(data: Path, change: dict[str, Any], said: str) -> None:
    sample = {"index": 3, "caption": "b", "latents": torch.zeros(SHAPE), "text": torch.zeros(1, TEXT_DIM)}
    facts = {key: value for key, value in change.items() if key in ("index", "caption")}
    tensors = {key: value for key, value in change.items() if key not in facts}
    rewrite(data, LatentSample(**sample | tensors, facts=facts))  # type: ignore[arg-type]  # facts win in JSON
    assert any(said in problem for problem in verify(data).problems), verify(data).problems


def test_every_bit_of_the_negative_prompt_counts(data: Path) -> None:
    path = data / "negative.safetensors"
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 37):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert any("negative.safetensors" in problem for problem in verify(data).problems)


def test_a_negative_prompt_of_another_width_is_found_without_its_hash(data: Path) -> None:
    change_manifest(data, lambda manifest: manifest.pop("negative_sha256"))
    safetensors.torch.save_file({"text": torch.zeros(1, 9)}, data / "negative.safetensors")
    (problem,) = verify(data).problems
    assert "has text of width 9" in problem


def test_an_index_may_not_lead_outside_its_archive(data: Path) -> None:
    rows = np.load(data / "00001.npy")
    rows["offset"][1] = 2**63
    np.save(data / "00001.npy", rows)
    with pytest.raises(UsageError, match="damaged or belongs to another shard"):
        LatentData(data, 8).batch([2])


def test_indexes_are_read_in_threads(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Python 3.11.8 two threads that parse Python text at once can fail (CPython issue 106905)."""

    def fail(text: str) -> None:
        raise SystemError("AST constructor recursion depth mismatch (before=33, after=29)")

    monkeypatch.setattr("ast.literal_eval", fail)  # as NumPy parses the header of an npy file
    assert verify(data).problems == ()
    assert len(LatentData(data, 8).batch([0, 2]).latents) == 2


def test_an_index_is_one_list_of_rows(data: Path) -> None:
    path = data / "00001.npy"
    rows, written = np.load(path), path.read_bytes()
    for wrong in (rows[None], rows["crc"], np.asfortranarray(np.stack([rows, rows]))):
        np.save(path, wrong)
        with pytest.raises(UsageError, match="damaged or belongs to another shard"):
            LatentData(data, 8).batch([2])
    for other in (written[:-1], written[:8] + b"\x00\x00" + written[10:], b""):
        path.write_bytes(other)
        with pytest.raises(UsageError, match="damaged or belongs to another shard"):
            LatentData(data, 8).batch([2])


@pytest.mark.parametrize("name", ["manifest.json", "00001.npy", "00001.tar", "negative.safetensors"])
def test_pipes_and_loops_in_place_of_files_end_in_sentences(data: Path, name: str) -> None:
    (data / name).unlink()
    os.mkfifo(data / name)
    assert use_everything(data)
    (data / name).unlink()
    (data / name).symlink_to(data / name)
    assert use_everything(data)


def test_a_huge_manifest_is_refused_unread(data: Path) -> None:
    with (data / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UsageError, match="larger than 512 MiB"):
        read_manifest(data)
