"""Data sets that are not on a local disk: in fsspec's memory, and on an HTTP server of this process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import read_manifest
from anyflow_cli.data.storage import RETRY_PAUSES, Storage
from anyflow_cli.data.verify import verify
from anyflow_cli.errors import AnyflowError, UsageError
from tests.data.datasets import make_data

TOKENS = 6
ADDRESS = "memory://bucket/data"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return make_data(tmp_path / "d", nan=(5,))


@pytest.fixture
def remote(local: Path) -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for path in local.iterdir():
        files.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    yield ADDRESS
    files.rm("/bucket", recursive=True)


def test_batches_are_the_same_from_anywhere(local: Path, remote: str) -> None:
    near, far = (Batches(LatentData(where, TOKENS), 4, seed=1) for where in (local, remote))
    assert torch.equal(near.data.negative, far.data.negative)
    for one, other in islice(zip(near.stream(0), far.stream(0, workers=2), strict=True), 6):
        assert torch.equal(one.latents, other.latents)
        assert (one.captions, one.replaced) == (other.captions, other.replaced)


def test_only_what_is_needed_is_read(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One small read for a shard's index, then one range a sample."""
    data = LatentData(remote, TOKENS)
    read: list[tuple[str, int]] = []
    cat_file = data.storage.files.cat_file

    def counted(path: str, start: int, stop: int | None) -> bytes:
        content: bytes = cat_file(path, start, stop)
        read.append((path.rpartition("/")[2], len(content)))
        return content

    monkeypatch.setattr(type(data.storage.files), "cat_file", lambda self, *given: counted(*given))
    data.batch([0, 1, 0])
    assert [name for name, _ in read] == ["00000.npy", "00000.tar", "00000.tar", "00000.tar"]
    assert max(size for _, size in read) < read_manifest(remote).shards[0].bytes / 4


def test_damage_elsewhere_is_named(remote: str) -> None:
    (problem,) = verify(remote).problems
    assert "Sample 00000005 of memory://bucket/data/00001.tar" in problem
    files = fsspec.filesystem("memory")
    content = files.cat_file("/bucket/data/00001.tar")
    files.pipe_file("/bucket/data/00001.tar", content[:-512])
    with pytest.raises(UsageError, match=r"memory://bucket/data/00001\.tar has"):
        LatentData(remote, TOKENS)
    files.rm_file("/bucket/data/00001.tar")
    with pytest.raises(UsageError, match=r"memory://bucket/data/00001\.tar is missing"):
        LatentData(remote, TOKENS)
    with pytest.raises(UsageError, match="is not a data set"):
        LatentData("memory://bucket/elsewhere", TOKENS)


def failing(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the next reads from memory fail as a network does; the pauses that follow."""
    pauses: list[float] = []
    monkeypatch.setattr("anyflow_cli.data.storage.time.sleep", pauses.append)
    files = type(fsspec.filesystem("memory"))
    cat_file, left = files.cat_file, iter(range(times))

    def unreliable(self: Any, *given: Any) -> Any:
        if next(left, None) is not None:
            raise ConnectionError("reset by peer")
        return cat_file(self, *given)

    monkeypatch.setattr(files, "cat_file", unreliable)
    return pauses


def test_a_network_may_fail_for_a_moment(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = failing(3, monkeypatch)
    assert LatentData(remote, TOKENS).batch([0]).captions == ["caption 0"]
    assert pauses == list(RETRY_PAUSES)


def test_a_network_that_is_gone_is_said(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(4, monkeypatch)
    with pytest.raises(AnyflowError, match=r"manifest\.json cannot be read: reset by peer") as error:
        LatentData(remote, TOKENS)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere://x/y", "Nothing can read nowhere"), ("gs://x/y", "needs a package")],
)
def test_addresses_that_nothing_reads_are_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        Storage.at(address)
    assert error.value.hint is not None


def test_a_server_without_ranges_is_named(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = LatentData(remote, TOKENS)
    files = type(data.storage.files)
    cat_file = files.cat_file
    monkeypatch.setattr(files, "cat_file", lambda self, path, start, stop: cat_file(self, path))
    with pytest.raises(UsageError, match=r"00000\.tar is not served by ranges"):
        data.batch([0])
