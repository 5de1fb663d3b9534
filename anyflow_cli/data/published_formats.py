"""Formats of latent data sets that other projects publish: which files they are, and how a sample is read.

=====================  ===========================================================  ==========  =====
format                 files                                                        normalized  text
=====================  ===========================================================  ==========  =====
rCM (WebDataset)       ``*.tar``: ``NAME.latent.pt``, ``.embed.pt``, ``.prompt.txt``  yes         yes
FastVideo (parquet)    ``*.parquet``: ``vae_latent_{bytes,shape,dtype}``, ...       no          yes
CausVid (LMDB)         ``data.mdb``: ``latents_N_data``, ``prompts_N_data``         yes         no
=====================  ===========================================================  ==========  =====

Sources: NVlabs/rcm ``datasets/webdataset.py``, hao-ai-lab/FastVideo ``dataset/dataloader/schema.py`` and
``record_schema.py``, tianweiy/CausVid and thu-ml/Causal-Forcing (LMDB). Latents that are not normalized are
the means that the VAE states. Other columns and members are ignored: FastVideo's ``num_frames`` counts latent
frames, and its ``width`` and ``height`` are swapped, so sizes come from the tensors alone.

Files are of unknown origin: pickled tensors are read with ``weights_only``, and every tensor is checked.

Legend: F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_cli.data.shard_index import ByteSpan, archive_members
from anyflow_cli.data.shards import CorruptSampleError, StoredShape, tensor_problem
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError

DOWNLOAD = "Download that file again, or move it out of the data set."
MAX_SAMPLE_BYTES = 1 << 31
NUMBER_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class FileIndex(NamedTuple):
    """The samples of one file: a row for each, and their latent shapes where these are known unread."""

    rows: NDArray[Any]
    shapes: list[StoredShape] | None = None


class PublishedSample(NamedTuple):
    """One sample as it is stored: latents (F, C, H, W), and text (L, D) where the format has it."""

    latents: Tensor
    text: Tensor | None
    caption: str


class PublishedFormat(Protocol):
    """One format.

    Attributes:
        title: Name for people.
        suffix: How its files' names end.
        normalized: Whether latents are normalized by the VAE's statistics.
        has_text: Whether samples have text embeddings.
    """

    title: str
    suffix: str
    normalized: bool
    has_text: bool

    def index(self, storage: Storage, name: str) -> FileIndex:
        """Find the samples of a file; a UsageError if it is damaged or holds something else."""

    def read(self, storage: Storage, name: str, row: Any) -> PublishedSample:
        """Read a sample by its row; a CorruptSampleError names one that cannot be used."""


# --- rCM

TAR_MEMBERS = ("latent.pt", "embed.pt", "prompt.txt")
TAR_ROW = np.dtype([("key", "<u8"), ("start", "<u8"), ("offsets", "<u4", 3), ("sizes", "<u4", 3)])


class RcmTar:
    """WebDataset archives of rCM: bf16 latents (C, F, H, W) and zero-padded text, each a pickled tensor."""

    title, suffix, normalized, has_text = "rCM (WebDataset)", ".tar", True, True

    def index(self, storage: Storage, name: str) -> FileIndex:
        """One row per sample: its number, and where its members are."""
        with storage.opened(name) as file:
            members = archive_members(file, storage.address_of(name), DOWNLOAD)
        samples = {key: parts for key, parts in members.items() if "latent.pt" in parts}
        if not samples:
            raise UsageError(
                f"{storage.address_of(name)} has no members NAME.latent.pt: it is not of rCM's format.",
                "Name a data set of `anyflow synthesize`, or one that docs/data.md lists.",
            )
        rows = [self._row(storage, name, key, samples[key]) for key in sorted(samples)]
        return FileIndex(np.array(rows, TAR_ROW))

    def _row(self, storage: Storage, name: str, key: str, parts: Mapping[str, ByteSpan]) -> tuple[Any, ...]:
        missing = [member for member in TAR_MEMBERS if member not in parts]
        where = f"Sample {key} of {storage.address_of(name)}"
        if missing:
            raise UsageError(f"{where} lacks {', '.join(missing)}.", DOWNLOAD)
        spans = [parts[member] for member in TAR_MEMBERS]
        start = min(span.offset for span in spans)
        if max(span.offset + span.size for span in spans) - start > MAX_SAMPLE_BYTES:
            raise UsageError(f"{where} is scattered over its archive, or too large.", DOWNLOAD)
        base = key.rpartition("/")[2]
        number = int(base) if base.isascii() and base.isdecimal() and len(base) < 16 else 0
        return number, start, [span.offset - start for span in spans], [span.size for span in spans]

    def read(self, storage: Storage, name: str, row: Any) -> PublishedSample:
        """Read the range of bytes that holds a sample's members."""
        where = f"Sample {row['key']:09d} of {storage.address_of(name)}"
        ends = [int(offset) + int(size) for offset, size in zip(row["offsets"], row["sizes"], strict=True)]
        content = _read_range(storage, name, int(row["start"]), max(ends))
        latent, embed, prompt = (
            content[int(offset) : end] for offset, end in zip(row["offsets"], ends, strict=True)
        )
        latents = _unpickled(latent, f"{where}: latent.pt", 4).transpose(0, 1).contiguous()
        return PublishedSample(
            latents, _text(_unpickled(embed, f"{where}: embed.pt", 2)), _utf8(prompt, where)
        )


def _read_range(storage: Storage, name: str, start: int, length: int) -> bytes:
    try:
        return storage.read(name, start, length)
    except FileNotFoundError:
        raise UsageError(
            f"{storage.address_of(name)} is missing.", "Restore it, then run the same command again."
        ) from None


def _unpickled(content: bytes, where: str, rank: int) -> Tensor:
    try:
        value = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of foreign bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptSampleError(f"{where} is not a pickled tensor ({reason}).", DOWNLOAD) from error
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        raise CorruptSampleError(f"{where} holds a {type(value).__name__} instead of a tensor.", DOWNLOAD)
    if value.nbytes > len(content):  # an expanded view could be of any size
        raise CorruptSampleError(f"{where} states more numbers than it stores.", DOWNLOAD)
    return _checked(value.detach(), where, rank)


def _checked(value: Tensor, where: str, rank: int) -> Tensor:
    problem = tensor_problem(value, rank)
    if problem is not None:
        raise CorruptSampleError(f"{where} {problem}.", DOWNLOAD)
    return value


def _text(padded: Tensor) -> Tensor:
    """Text (L', D) without the zeros after its last token."""
    used = padded.ne(0).any(1).nonzero()
    return padded[: int(used[-1]) + 1 if len(used) else 1]


def _utf8(content: bytes, where: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError:
        raise CorruptSampleError(f"{where} has a caption that is not UTF-8.", DOWNLOAD) from None


# --- FastVideo

PARQUET_ROW = np.dtype([("group", "<u4"), ("row", "<u4"), ("key", "<u8")])
TENSOR_COLUMNS = tuple(
    f"{tensor}_{part}" for tensor in ("vae_latent", "text_embedding") for part in ("bytes", "shape", "dtype")
)
CAPTION_COLUMNS = ("prompt", "caption")


class FastVideoParquet:
    """Parquet of FastVideo's preprocessing: latents (C, F, H, W) and text (L, D) as bytes with their shapes.

    A row group is read up to the wanted row, since parquet has no shorter way to it.
    """

    title, suffix, normalized, has_text = "FastVideo (parquet)", ".parquet", False, True

    def index(self, storage: Storage, name: str) -> FileIndex:
        """One row per sample: its row group, and its place in that and in the file."""
        where = storage.address_of(name)
        with storage.opened(name) as file, _parquet(file, where) as table:
            self._check_columns(table.schema_arrow.names, where)
            rows, shapes, count = [], [], 0
            for group in range(table.num_row_groups):
                read = table.read_row_group(group, columns=["vae_latent_shape"], use_threads=False)
                for row, shape in enumerate(read.column(0).to_pylist()):
                    rows.append((group, row, count))
                    shapes.append(_latent_shape(shape, f"Row {count} of {where}"))
                    count += 1
        return FileIndex(np.array(rows, PARQUET_ROW), shapes)

    @staticmethod
    def _check_columns(names: Sequence[str], where: str) -> None:
        missing = [column for column in TENSOR_COLUMNS if column not in names]
        if not missing:
            return
        what = "lacks the columns " + ", ".join(missing)
        if "trajectory_latents_bytes" in names:
            what = "holds ODE trajectories, not clean latents"
        raise UsageError(
            f"{where} {what}: it is not of FastVideo's format of latents.",
            "Name a data set that FastVideo preprocessed for text to video.",
        )

    def read(self, storage: Storage, name: str, row: Any) -> PublishedSample:
        """Read one row of a file."""
        where = f"Row {row['key']} of {storage.address_of(name)}"
        try:
            with storage.opened(name) as file, _parquet(file, where) as table:
                columns = [c for c in table.schema_arrow.names if c in (*TENSOR_COLUMNS, *CAPTION_COLUMNS)]
                batches = table.iter_batches(
                    1, row_groups=[int(row["group"])], columns=columns, use_threads=False
                )
                values = next(batch for number, batch in enumerate(batches) if number == row["row"])
                (found,) = values.to_pylist()
        except FileNotFoundError:
            raise UsageError(
                f"{storage.address_of(name)} is missing.", "Restore it, then run the same command again."
            ) from None
        except (UsageError, StopIteration) as error:
            raise CorruptSampleError(
                f"{where} cannot be read ({error or 'no such row'}).", DOWNLOAD
            ) from error
        latents = _from_bytes(found, "vae_latent", where, 4).transpose(0, 1).contiguous()
        caption = next((found[column] for column in CAPTION_COLUMNS if column in found), None)
        if not isinstance(caption, str):
            raise CorruptSampleError(f"{where} has no caption.", DOWNLOAD)
        return PublishedSample(
            latents, _text(_from_bytes(found, "text_embedding", where, 2)), caption.strip()
        )


@contextmanager
def _parquet(file: Any, where: str) -> Iterator[Any]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f"Reading {where} needs pyarrow.", "pip install 'anyflow[parquet]'") from error
    try:
        yield parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (UsageError, StopIteration):
        raise
    except Exception as error:  # a decoder of foreign bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
        raise UsageError(f"{where} cannot be read as parquet: {reason}.", DOWNLOAD) from error


def _latent_shape(shape: Any, where: str) -> StoredShape:
    """(C, F, H, W) of a file as (F, C, H, W)."""
    if not isinstance(shape, list) or len(shape) != 4 or not all(0 < axis < 1 << 20 for axis in shape):
        raise UsageError(f"{where} has latents of the shape {shape} instead of (C, F, H, W).", DOWNLOAD)
    channels, frames, height, width = shape
    return frames, channels, height, width


def _from_bytes(row: Mapping[str, Any], tensor: str, where: str, rank: int) -> Tensor:
    """A tensor from its three columns; text may have a leading axis of one sample."""
    content, shape, stated = (row[f"{tensor}_{part}"] for part in ("bytes", "shape", "dtype"))
    kind = NUMBER_TYPES.get(str(stated).removeprefix("torch."))
    if kind is None:
        raise CorruptSampleError(f"{where} has a {tensor} of the type {stated}.", DOWNLOAD)
    if len(shape or ()) == rank + 1 and shape[0] == 1:
        shape = shape[1:]
    size = int(np.prod(shape or (0,), dtype=object)) * kind.itemsize
    if not content or size != len(content):
        raise CorruptSampleError(
            f"{where} has a {tensor} of {len(content or b'')} bytes; {shape} in {stated} has {size}.",
            DOWNLOAD,
        )
    return _checked(torch.frombuffer(bytearray(content), dtype=kind).reshape(shape), where, rank)


# --- CausVid and Causal-Forcing

LMDB_ROW = np.dtype([("key", "<u8")])


class CausVidLmdb:
    """LMDB of CausVid's family: float16 latents (F, C, H, W), or (S, F, C, H, W) from noise to clean."""

    title, suffix, normalized, has_text = "CausVid (LMDB)", "data.mdb", True, False

    def index(self, storage: Storage, name: str) -> FileIndex:
        """One row per sample, all of the shape that the file states."""
        stated = _lmdb_value(storage, name, "latents_shape")
        where = storage.address_of(name)
        try:
            count, *shape = map(int, stated.split())
            frames, channels, height, width = shape[-4:]
        except ValueError:
            raise UsageError(
                f"{where} states no latents_shape: it is not of CausVid's format.", DOWNLOAD
            ) from None
        if not 0 < count < 1 << 32 or min(shape) < 1 or max(shape) >= 1 << 20:
            raise UsageError(f"{where} states the latents_shape {stated.decode()}.", DOWNLOAD)
        return FileIndex(
            np.arange(count, dtype="<u8").view(LMDB_ROW), [(frames, channels, height, width)] * count
        )

    def read(self, storage: Storage, name: str, row: Any) -> PublishedSample:
        """Read one sample: the last step of a trajectory."""
        number, where = int(row["key"]), f"Sample {row['key']} of {storage.address_of(name)}"
        shape = [int(axis) for axis in _lmdb_value(storage, name, "latents_shape").split()[1:]]
        content = _lmdb_value(storage, name, f"latents_{number}_data")
        size = int(np.prod(shape, dtype=object)) * 2
        if size != len(content):
            raise CorruptSampleError(
                f"{where} has latents of {len(content)} bytes instead of {size}.", DOWNLOAD
            )
        latents = torch.frombuffer(bytearray(content), dtype=torch.float16).reshape(shape)
        while latents.ndim > 4:
            latents = latents[-1]
        caption = _utf8(_lmdb_value(storage, name, f"prompts_{number}_data"), where)
        return PublishedSample(_checked(latents, where, 4), None, caption)


def _lmdb_value(storage: Storage, name: str, key: str) -> bytes:
    """The value of a key; empty if there is none."""
    where = storage.address_of(name)
    if not storage.is_local:
        raise UsageError(f"{where} is an LMDB, which only local disks serve.", "Copy the data set to a disk.")
    try:
        with _lmdb(Path(storage.root)).begin() as transaction:
            return bytes(transaction.get(key.encode()) or b"")
    except UsageError:
        raise
    except Exception as error:  # a parser of foreign bytes can raise anything
        raise UsageError(f"{where} cannot be read as LMDB: {error}.", DOWNLOAD) from error


@lru_cache(maxsize=64)
def _lmdb(folder: Path) -> Any:
    """The environment of a folder; a process may open it only once."""
    try:
        import lmdb
    except ImportError as error:
        raise UsageError(
            f"Reading the LMDB in {folder} needs the package lmdb.", "pip install 'anyflow[lmdb]'"
        ) from error
    return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, subdir=True)


PUBLISHED_FORMATS: tuple[PublishedFormat, ...] = (RcmTar(), FastVideoParquet(), CausVidLmdb())
