from __future__ import annotations

import errno
import io
import json
import os
import resource
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load

from anyflow_cli.data.shard_index import index_members, read_index, scan
from anyflow_cli.data.shards import (
    MANIFEST,
    PROVENANCE,
    CorruptSampleError,
    LatentSample,
    Rejection,
    read_manifest,
    read_negative,
    read_sample,
    read_shard_record,
    shard_path,
    shard_ranges,
    write_manifest,
    write_shard,
)
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import atomic_write, file_sha256
from tests.data.datasets import SHAPE, TEXT_DIM, make_data, make_sample, rejecting


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (10, 4), (12, 1), (3, 100)])
def test_shards_cover_every_index_once(count: int, size: int) -> None:
    ranges = shard_ranges(count, size)
    assert [index for indices in ranges for index in indices] == list(range(count))
    assert all(indices.start == number * size for number, indices in enumerate(ranges))


def test_a_sample_comes_back_as_it_was(tmp_path: Path) -> None:
    text = torch.randn(3, TEXT_DIM).bfloat16()
    sample = LatentSample(
        12, "a 'caption' with ü", torch.randn(SHAPE), text, {"seed": 5, "fps": 16}, b"not really mp4"
    )
    record = write_shard(tmp_path / "00000.tar", [sample])
    members = index_members(tmp_path / "00000.tar")
    assert set(members) == {"00000012"}
    assert set(members["00000012"]) == {"safetensors", "json", "mp4"}
    storage = Storage.at(tmp_path)
    (row,) = read_index(storage, "00000.tar", 1, record.bytes)
    back = read_sample(storage, "00000.tar", row)
    assert torch.equal(back.latents, sample.latents)
    assert torch.equal(back.text, text)
    assert back.text.dtype == torch.bfloat16
    assert (back.index, back.caption, back.facts) == (12, sample.caption, {"seed": 5, "fps": 16})
    assert record.latent_shape == SHAPE
    assert record == read_shard_record(tmp_path / "00000.tar")


def test_a_shard_is_a_plain_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", [make_sample(0), make_sample(1)])
    with tarfile.open(tmp_path / "00000.tar") as archive:
        names = archive.getnames()
        handle = archive.extractfile("00000001.json")
        assert handle is not None
        assert json.load(handle)["caption"] == "caption 1"
    assert names == [f"0000000{i}.{ending}" for i in (0, 1) for ending in ("safetensors", "json")]


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    write_shard(tmp_path / "00000.tar", [make_sample(0), make_sample(1)])
    with (tmp_path / "00000.tar").open("rb") as file:
        members = tariterators.tar_file_expander([{"stream": file, "url": "00000.tar"}])
        found = list(tariterators.group_by_keys(members))
    assert [sample["__key__"] for sample in found] == ["00000000", "00000001"]
    assert [json.loads(sample["json"])["caption"] for sample in found] == ["caption 0", "caption 1"]
    assert torch.equal(load(found[1]["safetensors"])["latents"], make_sample(1).latents)


def test_an_index_is_small_and_that_of_the_archive(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, [make_sample(index) for index in range(100)])
    rows = read_index(Storage.at(tmp_path), "00000.tar", 100, path.stat().st_size)
    assert np.array_equal(rows, scan(path))
    assert rows["sample"].tolist() == list(range(100))
    assert rows.nbytes <= 32 * 100


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "twice"])
def test_an_index_that_cannot_be_is_named(tmp_path: Path, damage: str) -> None:
    for name, first in (("00000.tar", 0), ("00001.tar", 4)):
        write_shard(tmp_path / name, [make_sample(first + index) for index in range(2 + first)])
    path = tmp_path / "00000.npy"
    if damage == "gone":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "other":
        path.write_bytes((tmp_path / "00001.npy").read_bytes())
    if damage == "twice":
        np.save(path, np.load(path)[[0, 0]])
    with pytest.raises(UsageError, match=r"00000\.npy") as error:
        read_index(Storage.at(tmp_path), "00000.tar", 2, (tmp_path / "00000.tar").stat().st_size)
    assert error.value.hint is not None
    assert "anyflow synthesize" in error.value.hint


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name, [make_sample(3)]) for name in ("00000.tar", "00001.tar"))
    assert first.sha256 == second.sha256 == file_sha256(tmp_path / "00001.tar")
    assert write_shard(tmp_path / "00002.tar", [make_sample(4)]).sha256 != first.sha256


def test_rejections_stand_in_the_record_and_the_manifest(tmp_path: Path) -> None:
    record = write_shard(tmp_path / "00000.tar", [make_sample(0), rejecting(1), make_sample(2)])
    assert (record.samples, record.rejected) == (2, (Rejection(1, "seed 1", "black"),))
    write_manifest(tmp_path, [record], {"seed": 0})
    assert read_manifest(tmp_path).shards == (record,)
    assert read_manifest(tmp_path).count == 2


def test_a_crash_while_writing_leaves_no_shard(tmp_path: Path) -> None:
    def crashing() -> Iterator[LatentSample]:
        yield make_sample(0)
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        write_shard(tmp_path / "00000.tar", crashing())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_no_shard(tmp_path: Path) -> None:
    write_shard(tmp_path / "00000.tar", [make_sample(0)])
    os.rename(tmp_path / "00000.tar", tmp_path / ".00000.0.tmp.tar")  # killed between record and shard
    assert read_shard_record(tmp_path / "00000.tar") is None
    write_shard(tmp_path / "00000.tar", [make_sample(0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000.json", "00000.npy", "00000.tar"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_said_and_the_old_file_survives(tmp_path: Path, code: int) -> None:
    path = tmp_path / "00000.tar"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise OSError(code, os.strerror(code))

    with pytest.raises(AnyflowError, match="Cannot write") as error:
        write_half()
    assert os.strerror(code) in error.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["00000.tar"]
    assert path.read_text() == "old"


def test_a_shard_that_outgrows_what_may_be_written_leaves_nothing(tmp_path: Path) -> None:
    """A real refusal by the system, in the middle of a shard, not an error made up by the test."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            write_shard(tmp_path / "00000.tar", [make_sample(index) for index in range(10)])
        except AnyflowError as error:
            os._exit(7 if "File too large" in error.message else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a") as temporary:
        temporary.write_text((tmp_path / "absent").read_text())


@pytest.mark.parametrize("left", [0, 100, 700, 1536, 2000, 3000, 3072])
def test_a_shard_cut_short_anywhere_is_named(tmp_path: Path, left: int) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, [make_sample(0), make_sample(1)])
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UsageError, match=rf"00000\.tar has {left:,} bytes") as error:
        read_shard_record(path)
    assert error.value.hint is not None
    assert "--verify" in error.value.hint
    with pytest.raises(UsageError, match="damaged"):
        index_members(path)


def test_a_broken_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, [make_sample(0), make_sample(1)])
    last = max(span.offset for parts in index_members(path).values() for span in parts.values())
    with path.open("r+b") as handle:
        handle.seek(last - 512)
        handle.write(b"#")
    with pytest.raises(UsageError, match="damaged"):
        index_members(path)


def test_names_in_an_archive_are_not_paths(tmp_path: Path) -> None:
    path = tmp_path / "in" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name in ("../../evil.json", "/etc/evil.json"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    members = index_members(path)
    assert "link" not in members
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "00000.tar"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("nan", "not finite"),
        ("bit", "checksum differs"),
        ("cut", "checksum differs"),
        ("json", "cannot be read"),
        ("tensors", "cannot be read"),
        ("part", "cannot be read"),
        ("other", "is sample 3"),
    ],
)
def test_a_corrupt_sample_is_named(tmp_path: Path, damage: str, said: str) -> None:
    path = tmp_path / "00000.tar"
    write_shard(path, [make_sample(3, float("nan") if damage == "nan" else None)])
    rows = scan(path)
    with path.open("r+b") as handle:
        if damage in ("json", "tensors"):  # written so: the checksum is that of the damage
            handle.seek(rows[0]["offset"] + (rows[0]["length"] - 8 if damage == "json" else 0))
            handle.write(b"#" * 8)
            handle.flush()
            rows = scan(path)
        if damage == "bit":
            handle.seek(rows[0]["offset"] + 200)  # in the tensors, which stay readable and finite
            handle.write(b"#")
        if damage == "cut":
            handle.truncate(rows[0]["offset"] + 100)
    if damage == "part":
        rows[0]["facts"] = 0
    if damage == "other":
        rows[0]["sample"] = 4
    with pytest.raises(CorruptSampleError, match=rf"Sample 0000000[34] of .*00000\.tar .*{said}"):
        read_sample(Storage.at(tmp_path), "00000.tar", rows[0])


def test_mixed_shapes_are_refused(tmp_path: Path) -> None:
    other = LatentSample(1, "b", torch.zeros(9, 3, 4, 4), torch.zeros(1, TEXT_DIM))
    records = [write_shard(shard_path(tmp_path, n), [s]) for n, s in enumerate((make_sample(0), other))]
    with pytest.raises(UsageError, match=r"several shapes.*00001\.tar"):
        write_manifest(tmp_path, records, {})


def test_a_data_set_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnyflowError, match="No sample"):
        write_manifest(tmp_path, [write_shard(tmp_path / "00000.tar", [rejecting(0)])], {})


def test_a_missing_incomplete_broken_or_newer_manifest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a data set"):
        read_manifest(tmp_path)
    (tmp_path / PROVENANCE).write_text("{}")
    with pytest.raises(UsageError, match="not complete yet"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=r"manifest\.json is not valid JSON|damaged"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"version": 99}')
    with pytest.raises(UsageError, match="version 99"):
        read_manifest(tmp_path)


def test_the_negative_prompt(tmp_path: Path) -> None:
    make_data(tmp_path)
    assert torch.equal(read_negative(tmp_path), torch.full((2, TEXT_DIM), 7.0))
    (tmp_path / "negative.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"negative\.safetensors"):
        read_negative(tmp_path)
