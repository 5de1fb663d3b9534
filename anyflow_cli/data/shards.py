"""Shards of latents on disk: WebDataset tar archives, a record beside each, and one manifest over all.

    00000.tar             <index>.safetensors {latents, text}, <index>.json {caption, seed, ...}, maybe .mp4
    00000.json            the shard's record: hash, sizes, and what was rejected while it was made
    00000.npy             the shard's index (``shard_index.py``): offset and checksum of each sample
    negative.safetensors  {text}: the embedding of the negative prompt
    provenance.json       what the data set is made from; written first, so that another run is refused
    manifest.json         all records together; written last, so that its presence means complete

A shard covers a fixed range of indices, so work is divided, resumed and repeated by shard, and equal seeds
give equal bytes. A shard is complete when its tar has its final name; index and record are written just
before. Records spare a restart and the manifest from reading a terabyte again. Names inside archives are
keys, never paths. Data sets are written locally and read from anywhere (``storage.py``).

Legend: F latent frames, C channels, H W latent height and width, L text tokens (not padded), D text width.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from pydantic_core import from_json
from safetensors import SafetensorError
from torch import Tensor

from anyflow_cli.data.shard_index import REPAIR, write_index
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import atomic_write, file_sha256, write_json
from anyflow_cli.utils.records import parse_record
from anyflow_cli.utils.records import read_record as read_json_record

VERSION = 2  # of data sets with latents of several shapes; others are of version 1
MANIFEST, PROVENANCE, NEGATIVE = "manifest.json", "provenance.json", "negative.safetensors"
PICTURES = {"channels": 4, "picture": 2}  # rank of each part: (F, C', H, W) and (P, D')
STORED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
REWRITE = "Remove it and run `anyflow synthesize` again."

ShardName = Annotated[str, Field(pattern=r"^\d{5,9}\.tar$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Natural = Annotated[int, Field(ge=0, lt=1 << 48)]
AxisSize = Annotated[int, Field(ge=1, lt=1 << 20)]
StoredShape = tuple[AxisSize, AxisSize, AxisSize, AxisSize]


class CorruptSampleError(AnyflowError):
    """One sample of a readable shard cannot be used; the reader may skip it within its limit."""


@dataclass(frozen=True)
class LatentSample:
    """One training pair. ``facts`` is what else is worth keeping: seed, fps, frames, source."""

    index: int
    caption: str
    latents: Tensor  # (F, C, H, W)
    text: Tensor  # (L, D)
    facts: Mapping[str, Any] = field(default_factory=dict)
    preview: bytes | None = None  # of an mp4 file
    pictures: Mapping[str, Tensor] = field(default_factory=dict)  # parts of a ``Condition``, see ``PICTURES``


@dataclass(frozen=True)
class Rejection:
    """A candidate that did not become a sample: which (``seed 7``, ``clip cat.mp4``), and why."""

    index: int
    what: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a complete shard without opening it."""

    name: ShardName
    sha256: Sha256
    samples: Natural
    bytes: Natural
    latent_shape: StoredShape | None  # of every sample in it; None for a shard without samples
    text_dim: AxisSize | None
    rejected: tuple[Rejection, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """A complete data set: how many samples of which shape, in which shards, made from what.

    In version 2 shards have shapes of their own, and ``latent_shape`` is the largest.
    """

    count: Natural
    shards: tuple[ShardRecord, ...]
    latent_shape: StoredShape
    text_dim: AxisSize
    provenance: Mapping[str, Any]
    negative: Literal["negative.safetensors"] = "negative.safetensors"
    version: Annotated[int, Field(ge=1)] = 1
    negative_sha256: Sha256 | None = None  # missing in the manifests of version 0.1

    def problems(self) -> Iterator[str]:
        """Contradictions inside the manifest, as sentences without a subject."""
        if not self.shards:
            yield "lists no shards"
        repeated = [name for name, n in Counter(record.name for record in self.shards).items() if n > 1]
        if repeated:
            yield f"lists shards twice: {', '.join(repeated[:5])}"
        total = sum(record.samples for record in self.shards)
        if total != self.count:
            yield f"states {self.count} samples, and its shards {total}"
        for record in self.shards:
            same_shape = self.version > 1 or record.latent_shape == self.latent_shape
            if record.samples and not (same_shape and record.text_dim == self.text_dim):
                yield f"states another shape than its shard {record.name}"


@dataclass(frozen=True)
class ManifestVersion:
    """The part of a manifest that says whether the rest can be read."""

    version: int


def shard_ranges(count: int, size: int) -> list[range]:
    """The indices of each shard: shard s covers [s * size, (s + 1) * size), the last one perhaps fewer."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def bucketed_ranges(counts: Sequence[int], size: int) -> list[range]:
    """Like ``shard_ranges`` for buckets of so many samples each, one after another; no shard has two."""
    ends = list(accumulate(counts))
    starts = zip([0, *ends], ends, strict=False)
    return [
        range(low + r.start, low + r.stop) for low, high in starts for r in shard_ranges(high - low, size)
    ]


def shard_path(directory: Path, number: int) -> Path:
    """Path of shard ``number``; its record has the suffix .json instead."""
    return directory / f"{number:05d}.tar"


# --- writing


def write_shard(path: Path, results: Iterable[LatentSample | Rejection]) -> ShardRecord:
    """Write what ``results`` yields, one at a time; then commit its index, its record and the shard."""
    rejected: list[Rejection] = []
    shapes: list[tuple[tuple[int, ...], int]] = []
    with atomic_write(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
            for result in results:
                if isinstance(result, Rejection):
                    rejected.append(result)
                else:
                    shapes.append((tuple(result.latents.shape), result.text.shape[-1]))
                    _add_sample(archive, result)
        assert len(set(shapes)) <= 1, f"samples of several shapes in {path}: {set(shapes)}"
        shape: Any = shapes[0][0] if shapes else None
        record = ShardRecord(
            path.name, file_sha256(temporary), len(shapes), temporary.stat().st_size,
            shape, shapes[0][1] if shapes else None, tuple(rejected),
        )  # fmt: skip
        write_index(path, temporary)
        write_json(path.with_suffix(".json"), asdict(record))
    return record


def _add_sample(archive: tarfile.TarFile, sample: LatentSample) -> None:
    tensors = {"latents": sample.latents, "text": sample.text, **sample.pictures}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    facts = {"index": sample.index, "caption": sample.caption, **sample.facts}
    members = {
        "safetensors": safetensors.torch.save(tensors),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
        "mp4": sample.preview,
    }
    for suffix, content in members.items():
        if content is not None:
            # TarInfo's own owner, mode and time are constants: equal samples give equal bytes.
            info = tarfile.TarInfo(f"{sample.index:08d}.{suffix}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_negative(directory: Path, text: Tensor) -> None:
    """Write the negative prompt's embedding, (L, D)."""
    with atomic_write(directory / NEGATIVE) as temporary:
        temporary.write_bytes(safetensors.torch.save({"text": text.contiguous()}))


def write_manifest(
    directory: Path, records: Iterable[ShardRecord], provenance: Mapping[str, Any]
) -> Manifest:
    """Write the manifest of a complete data set; mixed latent shapes need ``buckets`` in the provenance."""
    records, has_buckets = tuple(records), "buckets" in provenance
    shapes = {(r.latent_shape, r.text_dim): r.name for r in records if r.latent_shape and r.text_dim}
    if len(shapes) > 1 and not (has_buckets and len({text_dim for _, text_dim in shapes}) == 1):
        named = ", ".join(f"{name} {shape}" for shape, name in shapes.items())
        raise UsageError(f"The shards in {directory} have latents of several shapes: {named}.", REPAIR)
    if not shapes:
        raise AnyflowError(
            f"No sample in {directory} passed the checks.",
            "Its .json files have the reasons; remove it when the videos are fixed, and run again.",
        )
    shape, text_dim = max(shapes, key=lambda one: math.prod(one[0]))
    assert shape is not None
    assert text_dim is not None
    negative = directory / NEGATIVE
    digest = file_sha256(negative) if negative.exists() else None
    total = sum(record.samples for record in records)
    version = VERSION if len(shapes) > 1 else 1
    manifest = Manifest(total, records, shape, text_dim, provenance, version=version, negative_sha256=digest)
    write_json(directory / MANIFEST, asdict(manifest))
    return manifest


# --- reading


def read_shard_record(path: Path) -> ShardRecord | None:
    """Read the record of a complete shard; None if the shard has to be made.

    Raises:
        UsageError: The record is damaged, or the shard has another size.
    """
    record_path = path.with_suffix(".json")
    if not path.exists() or not record_path.exists():
        return None
    record = read_json_record(record_path, ShardRecord, f"{REWRITE} {path.name} is then made again.")
    check_size(path, record)
    return record


def check_size(path: Path, record: ShardRecord) -> None:
    """Refuse a local shard that is missing or truncated, without reading it."""
    require_size(str(path), path.stat().st_size if path.exists() else None, record)


def require_size(name: str, size: int | None, record: ShardRecord) -> None:
    """Refuse a shard that is missing or has another size than was written."""
    if size is None:
        raise UsageError(
            f"The shard {name} is missing.", "Run `anyflow synthesize` again: it makes missing shards only."
        )
    if size != record.bytes:
        raise UsageError(f"The shard {name} has {size:,} bytes where {record.bytes:,} were written.", REPAIR)


def read_manifest(address: str | Path) -> Manifest:
    """Read the manifest of a complete data set.

    Raises:
        UsageError: There is none, it is damaged, contradicts itself, or is of a newer version.
    """
    manifest = parse_manifest(address)
    problem = next(manifest.problems(), None)
    if problem is not None:
        raise UsageError(f"The manifest {Storage.at(address).address_of(MANIFEST)} {problem}.", REWRITE)
    return manifest


def parse_manifest(address: str | Path) -> Manifest:
    """Read a manifest like ``read_manifest``, but accept one that contradicts itself."""
    storage = Storage.at(address)
    path = storage.address_of(MANIFEST)
    try:
        content = storage.read(MANIFEST)
    except FileNotFoundError:
        what = "is not complete yet" if storage.exists(PROVENANCE) else f"is not a data set (no {MANIFEST})"
        raise UsageError(f"{storage} {what}.", "Make or complete it with `anyflow synthesize`.") from None
    version = parse_record(content, ManifestVersion, path, REWRITE).version
    if version > VERSION:
        raise UsageError(
            f"{path} is of version {version}; this anyflow reads up to {VERSION}.", "Update anyflow."
        )
    return parse_record(content, Manifest, path, REWRITE)


def read_negative(address: str | Path, sha256: str | None = None) -> Tensor:
    """Read the negative prompt's embedding, (L, D), as fp32.

    Args:
        address: The data set.
        sha256: Hash that the file must have; None accepts any.
    """
    storage = Storage.at(address)
    path = storage.address_of(NEGATIVE)
    try:
        content = storage.read(NEGATIVE)
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise UsageError(f"{path} is not what was written (its hash differs).", REWRITE)
        text = safetensors.torch.load(content)["text"]
    except (FileNotFoundError, SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is missing or damaged.", "Run `anyflow synthesize` again.") from error
    problem = tensor_problem(text, 2)
    if problem is not None:
        raise UsageError(f"{path} {problem}.", REWRITE)
    return text.float()


def read_sample(storage: Storage, shard: str, row: Any) -> LatentSample:
    """Read one sample by its row of the index, without its preview.

    Raises:
        CorruptSampleError: The sample is not what was written; names it.
        UsageError: The shard is missing, which is more than a sample.
    """
    name = f"Sample {row['sample']:08d} of {storage.address_of(shard)}"
    try:
        content = storage.read(shard, int(row["offset"]), int(row["length"]))
    except FileNotFoundError:
        raise UsageError(
            f"The shard {storage.address_of(shard)} is missing.",
            "Restore it, then run the same command again.",
        ) from None
    if zlib.crc32(content) != row["crc"]:
        raise CorruptSampleError(f"{name} is not what was written (its checksum differs).", REPAIR)
    try:
        facts = dict(from_json(content[len(content) - int(row["facts"]) :]))
        tensors = safetensors.torch.load(content[: int(row["tensors"])])
        index, caption = facts.pop("index"), facts.pop("caption")
        latents, text = tensors["latents"], tensors["text"]
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CorruptSampleError(f"{name} cannot be read ({error!r}).", REPAIR) from error
    if type(index) is not int or index != row["sample"]:
        raise CorruptSampleError(f"{name} is sample {index}.", REPAIR)
    if not isinstance(caption, str):
        raise CorruptSampleError(f"{name} has no caption.", REPAIR)
    pictures = {part: tensors[part] for part in PICTURES if part in tensors}
    ranks = [(latents, 4), (text, 2), *((tensor, PICTURES[part]) for part, tensor in pictures.items())]
    for problem in filter(None, (tensor_problem(tensor, rank) for tensor, rank in ranks)):
        raise CorruptSampleError(f"{name} {problem}.", REPAIR)
    return LatentSample(index, caption, latents, text, facts, pictures=pictures)


def tensor_problem(x: Tensor, rank: int) -> str | None:
    """What is wrong with a stored tensor, as the rest of a sentence."""
    if x.ndim != rank or 0 in x.shape:
        return f"has a tensor of shape {tuple(x.shape)}"
    if x.dtype not in STORED_TYPES:
        return f"has a tensor of type {x.dtype}"
    # A sum is finite only if all its terms are, and takes a fraction of the time of looking at each.
    if not (bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())):
        return "contains values that are not finite"
    return None
