"""The index of a shard: offsets of each sample's bytes in the archive, and their checksum.

    00000.npy    beside 00000.tar: one row of ROW per sample, 28 bytes, in the order of the samples

It is written once, with the shard, so that a reader needs no pass over the archive's headers: one small read
per shard, then one range of bytes per sample, at any fsspec address. The checksum identifies the sample that
a flipped bit has damaged; the shard's hash could identify the shard only.

A sample's tensors and facts are adjacent in the archive (a tar header between them), hence one range.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)(?P<text>\{'descr': " + re.escape(repr(ROW.descr).encode())
    + rb", 'fortran_order': False, 'shape': \((?P<rows>\d{1,12}),\), \} *\n)", re.DOTALL,
)  # fmt: skip
REPAIR = "`anyflow synthesize --verify` lists the damage; remove that shard and run `anyflow synthesize`."


@dataclass(frozen=True)
class ByteSpan:
    """Position of a member's bytes in its archive."""

    offset: int
    size: int


Members = dict[str, dict[str, ByteSpan]]  # key of a sample -> suffix -> bytes


def index_path(shard: Path) -> Path:
    """Path of a shard's index."""
    return shard.with_suffix(".npy")


def write_index(path: Path, archive: Path | None = None) -> None:
    """Write the index of the shard ``path`` atomically; ``archive`` is its present name, if it is another."""
    rows = scan(archive or path)
    with atomic_write(index_path(path)) as temporary, temporary.open("wb") as file:
        np.save(file, rows)


def read_index(storage: Storage, shard: str, samples: int, size: int) -> Index:
    """Read the index of a shard.

    Args:
        storage: The data set.
        shard: Name of the shard.
        samples: Samples in it.
        size: Bytes of its archive.

    Raises:
        UsageError: The index is missing, damaged, or does not fit the shard.
    """
    name = index_path(Path(shard)).name
    try:
        rows = _parse(storage.read(name))
    except FileNotFoundError:
        raise UsageError(
            f"The shard {storage.address_of(shard)} has no index ({name}).",
            "Run `anyflow synthesize` again: it writes what is missing.",
        ) from None
    if rows is None or len(rows) != samples or not _fits(rows, size):
        raise UsageError(
            f"The index {storage.address_of(name)} is damaged or belongs to another shard.",
            "Remove it and run `anyflow synthesize` again: it writes what is missing.",
        )
    return rows


def _parse(content: bytes) -> Index | None:
    """The rows of an npy file without trusting the lengths that it states; None if it has others.

    Not by NumPy's own reader: it parses the header as Python, which fails at times where several threads do
    so at once (CPython issue 106905, before 3.11.8 and 3.12.2).
    """
    header = HEADER.match(content)
    if header is None or int.from_bytes(header["length"], "little") != header.end() - header.start("text"):
        return None
    body = content[header.end() :]
    return np.frombuffer(body, ROW) if int(header["rows"]) * ROW.itemsize == len(body) else None


def _fits(rows: Index, size: int) -> bool:
    """Whether rows are in order and stay inside an archive of ``size`` bytes."""
    in_order = (np.diff(rows["sample"].astype(np.int64)) > 0).all()
    ends = rows["offset"] + rows["length"].astype(np.uint64)
    is_inside = ((ends <= size) & (ends >= rows["offset"])).all()
    parts = rows["tensors"].astype(np.uint64) + rows["facts"].astype(np.uint64)
    return bool(in_order and is_inside and (parts <= rows["length"]).all())


def scan(path: Path) -> Index:
    """Compute the index from the archive; members without tensors or without a number are not samples."""
    samples = {
        int(key): _range(parts)
        for key, parts in index_members(path).items()
        if "safetensors" in parts and key.isascii() and key.isdecimal() and len(key) < 10
    }
    rows = []
    with path.open("rb") as file:
        for sample, (offset, tensors, length, facts) in sorted(samples.items()):
            if length >= 1 << 32:
                raise UsageError(f"The shard {path} has a sample of {length:,} bytes.", REPAIR)
            file.seek(offset)
            rows.append((sample, offset, tensors, length, facts, zlib.crc32(file.read(length))))
    return np.array(rows, ROW)


def _range(parts: Mapping[str, ByteSpan]) -> tuple[int, int, int, int]:
    """Offset and size of the tensors, length of the range with the facts, and size of the facts."""
    tensors, facts = parts["safetensors"], parts.get("json", ByteSpan(0, 0))
    end = facts.offset + facts.size if facts.offset > tensors.offset else tensors.offset + tensors.size
    return tensors.offset, tensors.size, end - tensors.offset, facts.size


def index_members(path: Path) -> Members:
    """Find each sample's members from the archive's headers alone.

    Raises:
        UsageError: The archive is damaged or truncated.
    """
    with path.open("rb") as file:
        return archive_members(file, str(path), REPAIR)


def archive_members(file: BinaryIO, name: str, hint: str) -> Members:
    """Find each sample's members in an open archive; ``name`` and ``hint`` are for its errors."""
    members: Members = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                folder, slash, base = info.name.rpartition("/")
                key, _, suffix = base.partition(".")
                end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if info.isfile():
                    members.setdefault(folder + slash + key, {})[suffix] = ByteSpan(
                        info.offset_data, info.size
                    )
        file.seek(end)
        # tarfile takes a broken header for the end; the true end is two blocks of zeros.
        is_whole = file.read(2 * tarfile.BLOCKSIZE) == bytes(2 * tarfile.BLOCKSIZE)
    except Exception as error:  # a parser of foreign bytes can raise anything
        raise UsageError(f"The shard {name} is damaged: {error}.", hint) from error
    if not is_whole:
        raise UsageError(f"The shard {name} is damaged or truncated after byte {end:,}.", hint)
    return members
