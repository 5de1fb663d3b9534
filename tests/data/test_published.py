"""Published data sets: the samples are those of the files, in our order, from anywhere; damage is named."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.published import PublishedData, recognize
from anyflow_cli.data.shards import CorruptSampleError
from anyflow_cli.data.verify import verify
from anyflow_cli.errors import UsageError
from tests.data.published import (
    CHANNELS,
    FRAMES,
    HEIGHT,
    NEGATIVE,
    TOKENS,
    WIDTH,
    add_member,
    embedded,
    fastvideo_row,
    make_fastvideo,
    make_lmdb,
    make_own,
    make_rcm,
    model_side,
    pickled,
    stored_latents,
    stored_text,
    write_parquet,
)

MAKERS: dict[str, Callable[[Path], Path]] = {"rcm": make_rcm, "fastvideo": make_fastvideo}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def opened(address: str | Path, cache: Path, **options: Any) -> LatentData:
    return LatentData(address, TOKENS, model_side(cache), **options)


def test_batches_equal_those_of_the_same_samples_in_our_format(kind: str, tmp_path: Path) -> None:
    theirs = opened(MAKERS[kind](tmp_path / "theirs"), tmp_path / "cache")
    ours = LatentData(make_own(tmp_path / "ours", kind), TOKENS)
    assert theirs.latent_shape == ours.latent_shape == (FRAMES, CHANNELS, HEIGHT, WIDTH)
    assert (len(theirs), theirs.text_dim) == (len(ours), ours.text_dim)
    assert torch.equal(theirs.negative, ours.negative)
    for step in range(5):
        one, other = (Batches(data, 4, seed=3).load(step) for data in (theirs, ours))
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(one.condition.text, other.condition.text)
        assert one.captions == other.captions


def test_the_index_is_built_once_and_outside_the_data_set(kind: str, tmp_path: Path) -> None:
    directory, cache = MAKERS[kind](tmp_path / "d"), tmp_path / "cache"
    before = sorted(directory.rglob("*"))
    first = opened(directory, cache).batch([5])
    (folder,) = cache.glob("index-*")
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert torch.equal(opened(directory, cache).batch([5]).latents, first.latents)
    assert times == {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert sorted(directory.rglob("*")) == before


def test_a_data_set_that_grew_is_indexed_again(tmp_path: Path) -> None:
    directory = make_rcm(tmp_path / "d", count=5)
    before = recognize(directory)
    assert len(opened(directory, tmp_path / "cache")) == 5
    make_rcm(tmp_path / "more", count=10)
    (tmp_path / "more" / "shard_000001.tar").rename(directory / "shard_000001.tar")
    assert len(opened(directory, tmp_path / "cache")) == 10
    after = recognize(directory)
    assert before is not None
    assert after is not None
    assert before.sha256 != after.sha256


def test_samples_are_read_from_another_machine(kind: str, tmp_path: Path) -> None:
    local = MAKERS[kind](tmp_path / "d")
    files = fsspec.filesystem("memory")
    for path in local.rglob("*.*"):
        files.pipe_file(f"/published/{path.relative_to(local)}", path.read_bytes())
    try:
        near, far = (opened(where, tmp_path / "cache") for where in (local, "memory://published"))
        assert torch.equal(near.batch([0, 7, 11]).latents, far.batch([0, 7, 11]).latents)
    finally:
        files.rm("/published", recursive=True)


def test_longer_samples_are_cut_where_that_is_wanted(kind: str, tmp_path: Path) -> None:
    directory = MAKERS[kind](tmp_path / "d")
    whole, cut = (opened(directory, tmp_path / "cache", max_frames=n) for n in (None, 2))
    assert cut.latent_shape == (2, CHANNELS, HEIGHT, WIDTH)
    assert torch.equal(cut.batch([3]).latents, whole.batch([3]).latents[:, :2])


def test_samples_of_several_shapes_are_buckets(tmp_path: Path) -> None:
    make_rcm(tmp_path / "d" / "long", count=5)
    make_rcm(tmp_path / "d" / "short", count=3, frames=1)
    data = opened(tmp_path / "d", tmp_path / "cache")
    assert [(bucket.shape[0], list(bucket.positions)) for bucket in data.buckets] == [
        (FRAMES, [0, 1, 2, 3, 4]),
        (1, [5, 6, 7]),
    ]


def test_a_sound_data_set_is_verified(kind: str, tmp_path: Path) -> None:
    found = verify(MAKERS[kind](tmp_path / "d"))
    assert (found.samples, found.problems) == (12, ())


def rcm_sample(path: Path, **changes: bytes) -> None:
    members = {
        "latent.pt": pickled(stored_latents(0, torch.bfloat16)), "embed.pt": pickled(stored_text(0)),
        "prompt.txt": b"clip",
    }  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in (members | {k.replace("_", "."): v for k, v in changes.items()}).items():
            add_member(archive, f"000000000.{name}", content)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


NOT_FINITE = stored_latents(0, torch.bfloat16).fill_(float("nan"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"latent_pt": b"nonsense"}, r"shard_9\.tar: latent\.pt is not a pickled tensor"),
        ({"latent_pt": pickled(NOT_FINITE)}, "latent.pt contains values that are not finite"),
        ({"latent_pt": pickled(torch.zeros(3, 4))}, r"has a tensor of shape \(3, 4\)"),
        ({"latent_pt": pickled(stored_latents(0).long())}, r"has a tensor of type torch\.int64"),
        ({"latent_pt": pickled(torch.zeros(1).expand(8, 3, 4000, 4000))}, "more numbers than it stores"),
        ({"embed_pt": pickled(Hostile())}, r"embed\.pt is not a pickled tensor"),
        ({"embed_pt": pickled({"text": torch.zeros(2)})}, "holds a dict instead of a tensor"),
        ({"prompt_txt": b"\xff\xfe"}, "a caption that is not UTF-8"),
    ],
)
def test_a_damaged_sample_is_named_and_replaced(
    changes: dict[str, bytes], problem: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = make_rcm(tmp_path / "d", count=4)
    rcm_sample(directory / "shard_9.tar", **changes)
    (found,) = verify(directory).problems
    assert "Sample 000000000 of" in found
    data = opened(directory, tmp_path / "cache")
    with pytest.raises(CorruptSampleError, match=problem):
        data.sample(4)
    batch = data.batch([4])
    assert (batch.captions, batch.replaced) == (["clip 0"], [0])
    assert "executed" not in capfd.readouterr().out


def parquet_row(**changes: Any) -> dict[str, Any]:
    return fastvideo_row(0, stored_latents(0), stored_text(0)) | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vae_latent_bytes": b"1234"}, "a vae_latent of 4 bytes"),
        ({"vae_latent_dtype": "int64"}, "a vae_latent of the type int64"),
        ({"text_embedding_bytes": None}, "a text_embedding of 0 bytes"),
        ({"caption": None}, "has no caption"),
    ],
)
def test_a_damaged_row_is_named(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "d" / "a.parquet", [parquet_row(), parquet_row(**changes)])
    (found,) = verify(tmp_path / "d").problems
    assert f"Row 1 of {tmp_path}/d/a.parquet" in found
    assert problem in found


def test_text_with_an_axis_of_one_sample_is_read(tmp_path: Path) -> None:
    row = parquet_row(text_embedding_shape=[1, *stored_text(0).shape])
    write_parquet(tmp_path / "d" / "a.parquet", [row])
    assert torch.equal(opened(tmp_path / "d", tmp_path).sample(0).text, stored_text(0))


def test_files_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    columns = {"trajectory_latents_bytes": b"", "caption": "a"}
    write_parquet(tmp_path / "ode" / "a.parquet", [columns])
    with pytest.raises(UsageError, match=r"a\.parquet holds ODE trajectories"):
        verify(tmp_path / "ode")
    (tmp_path / "tar").mkdir()
    with tarfile.open(tmp_path / "tar" / "x.tar", "w") as archive:
        add_member(archive, "0.jpg", b"")
    with pytest.raises(UsageError, match=r"x\.tar has no members NAME\.latent\.pt"):
        verify(tmp_path / "tar")
    (tmp_path / "tar" / "x.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UsageError, match=r"x\.tar is damaged"):
        verify(tmp_path / "tar")
    (tmp_path / "ode" / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read as parquet"):
        verify(tmp_path / "ode")


def test_a_sample_without_all_its_members_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d" / "x.tar", "w") as archive:
        add_member(archive, "000000007.latent.pt", pickled(stored_latents(0)))
    with pytest.raises(UsageError, match=r"Sample 000000007 of .*x\.tar lacks embed\.pt, prompt\.txt"):
        verify(tmp_path / "d")


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    directory = make_rcm(tmp_path / "d")
    opened(directory, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("index-*")
    (folder / "rows.npy").write_bytes(b"")
    with pytest.raises(UsageError, match=f"The index {folder} is damaged"):
        opened(directory, tmp_path / "cache")


def test_latents_of_another_vae_are_refused(tmp_path: Path) -> None:
    row = fastvideo_row(0, torch.zeros(16, 3, 4, 4), stored_text(0))
    write_parquet(tmp_path / "d" / "a.parquet", [row])
    with pytest.raises(UsageError, match="latents of 16 channels, and the model's VAE has 8"):
        opened(tmp_path / "d", tmp_path / "cache").sample(0)


def test_captions_without_text_are_embedded_once(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    calls: list[int] = []

    def counted(captions: Any) -> Any:
        calls.append(len(captions))
        return embedded(captions)

    directory = make_lmdb(tmp_path / "d")
    for _ in range(2):
        data = LatentData(directory, TOKENS, model_side(tmp_path / "cache", counted))
        assert isinstance(data.source, PublishedData)
        data.source.prepare()
        batch = data.batch([2, 10])
    assert calls == [1, 12]  # the negative prompt, then the captions
    assert batch.captions == ["clip 2", "clip 10"]
    expected = stored_latents(2, torch.float16).transpose(0, 1)
    assert torch.equal(batch.latents[0], expected.float())
    assert torch.equal(batch.condition.text[1, :2], embedded(["clip 10"])[0])
    assert torch.equal(data.negative[:2], NEGATIVE)
    assert verify(directory).problems == ()


def test_an_lmdb_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data.mdb").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(UsageError, match="needs the package lmdb") as error:
        opened(tmp_path / "d", tmp_path / "cache")
    assert "pip install" in (error.value.hint or "")


def test_a_pickle_is_never_executed() -> None:
    """The test above would not notice if it were."""
    assert torch.load(io.BytesIO(pickled(Hostile())), weights_only=False) is None
