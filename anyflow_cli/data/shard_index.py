"""The index of a shard: where each sample's bytes lie in the archive, and their checksum.

    00000.npy    beside 00000.tar: one row of ROW a sample, 28 bytes, in the order of the samples

It is written once, with the shard, so that a reader needs no pass over the archive's headers: one small read
a shard, then one range of bytes a sample, at any fsspec address. The checksum names the sample that a flipped
bit has hit, where the shard's hash could only name the shard.

A sample's tensors and facts are neighbours in the archive (a tar header between them), hence one range.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import atomic_write

ROW = np.dtype([
    ("sample", "<u4"),   # its index in the data set, which is its key in the archive
    ("offset", "<u8"),   # of its tensors
    ("tensors", "<u4"),  # bytes
    ("length", "<u4"),   # bytes from the offset to the end of its facts
    ("facts", "<u4"),    # bytes, the last ones of that range
    ("crc", "<u4"),      # of that range
])  # fmt: skip
Index = NDArray[Any]  # of ROW
REPAIR = (
    "Find every damage with `anyflow synthesize --verify`; remove that shard and run `anyflow synthesize`."
)


@dataclass(frozen=True)
class ByteSpan:
    """Where a member's bytes lie in its archive."""

    offset: int
    size: int


Members = dict[str, dict[str, ByteSpan]]  # key of a sample -> ending -> bytes


def index_path(shard: Path) -> Path:
    """Where the index of a shard stands."""
    return shard.with_suffix(".npy")


def write_index(path: Path, archive: Path | None = None) -> None:
    """Commit the index of the shard ``path``, whose archive may still have another name."""
    rows = scan(archive or path)
    with atomic_write(index_path(path)) as temporary, temporary.open("wb") as file:
        np.save(file, rows)


def read_index(place: Storage, shard: str, samples: int) -> Index:
    """The index of a shard of so many samples."""
    name = index_path(Path(shard)).name
    try:
        rows: Index = np.load(io.BytesIO(place.read(name)), allow_pickle=False)
    except FileNotFoundError:
        raise UsageError(
            f"The shard {place.name(shard)} has no index ({name}).",
            "Run `anyflow synthesize` again: it writes what is missing.",
        ) from None
    except (ValueError, EOFError) as error:
        raise _unfit(place, name) from error
    if rows.dtype != ROW or len(rows) != samples or (np.diff(rows["sample"].astype(int)) <= 0).any():
        raise _unfit(place, name)
    return rows


def _unfit(place: Storage, name: str) -> UsageError:
    return UsageError(
        f"The index {place.name(name)} is damaged or of another shard.",
        "Remove it and run `anyflow synthesize` again: it writes what is missing.",
    )


def scan(path: Path) -> Index:
    """The index of an archive from the archive itself. What has no tensors or no number is no sample."""
    samples = {
        int(key): _range(parts)
        for key, parts in index_members(path).items()
        if "safetensors" in parts and key.isdecimal()
    }
    rows = []
    with path.open("rb") as handle:
        for sample, (offset, tensors, length, facts) in sorted(samples.items()):
            handle.seek(offset)
            rows.append((sample, offset, tensors, length, facts, zlib.crc32(handle.read(length))))
    return np.array(rows, ROW)


def _range(parts: Mapping[str, ByteSpan]) -> tuple[int, int, int, int]:
    """Offset and size of the tensors, length of the range with the facts, and size of these."""
    tensors, facts = parts["safetensors"], parts.get("json", ByteSpan(0, 0))
    end = facts.offset + facts.size if facts.offset > tensors.offset else tensors.offset + tensors.size
    return tensors.offset, tensors.size, end - tensors.offset, facts.size


def index_members(path: Path) -> Members:
    """Where each sample's parts lie, from the archive's headers alone (no member is read)."""
    members: Members = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                key, _, ending = info.name.partition(".")
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.isfile():
                    members.setdefault(key, {})[ending] = ByteSpan(info.offset_data, info.size)
    except tarfile.TarError as error:
        raise UsageError(f"The shard {path} is damaged: {error}.", REPAIR) from error
    with path.open("rb") as handle:
        handle.seek(end)
        # tarfile takes a broken header for the end; the true end is two blocks of zeros.
        if handle.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise UsageError(f"The shard {path} is damaged or cut short after byte {end:,}.", REPAIR)
    return members
