"""Shards of latents on disk: WebDataset tar archives, a record beside each, and one manifest over all.

    00000.tar             <index>.safetensors {latents, text}, <index>.json {caption, seed, ...}, maybe .mp4
    00000.json            the shard's record: hash, sizes, what was rejected while it was made
    00000.npy             the shard's index (``index.py``): where each sample lies, and its checksum
    negative.safetensors  {text}: the embedding of the negative prompt
    provenance.json       what the data set is made from; written first, so that another run is refused
    manifest.json         all records together; written last, so that its presence means complete

A shard covers a fixed range of indices, so work is divided, resumed and repeated by shard, and equal seeds
give equal bytes. A shard is complete when its tar has its final name; index and record are committed just
before it. Keeping records spares a restart and the manifest from reading a terabyte again. Names inside
archives are keys, never paths. Writing is local; a finished data set is read wherever it lies (``place.py``).

Legend: F latent frames, C channels, H W latent height and width, L text tokens (not padded), D text width.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from anyflow_cli.data.shard_index import REPAIR, write_index
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import atomic_write, file_sha256, write_json

VERSION = 1
MANIFEST, PROVENANCE, NEGATIVE = "manifest.json", "provenance.json", "negative.safetensors"


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


@dataclass(frozen=True)
class Rejection:
    """A candidate that did not become a sample: which (``seed 7``, ``clip cat.mp4``), and why."""

    index: int
    what: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a complete shard without opening it."""

    name: str
    sha256: str
    samples: int
    bytes: int
    latent_shape: tuple[int, ...] | None  # of every sample in it; None for a shard without samples
    text_dim: int | None
    rejected: tuple[Rejection, ...] = ()

    @staticmethod
    def from_dict(content: dict[str, Any]) -> ShardRecord:
        """The inverse of ``dataclasses.asdict`` after a round trip through JSON."""
        shape = content["latent_shape"]
        rejected = tuple(Rejection(**entry) for entry in content["rejected"])
        return ShardRecord(**{**content, "latent_shape": shape and tuple(shape), "rejected": rejected})


@dataclass(frozen=True)
class Manifest:
    """A complete data set: how many samples of which shape, in which shards, made from what."""

    count: int
    shards: tuple[ShardRecord, ...]
    latent_shape: tuple[int, ...]
    text_dim: int
    provenance: Mapping[str, Any]
    negative: str = NEGATIVE
    version: int = VERSION


def shard_ranges(count: int, size: int) -> list[range]:
    """The indices of each shard: shard s covers [s * size, (s + 1) * size), the last one perhaps fewer."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shard_path(directory: Path, number: int) -> Path:
    """Where shard ``number`` stands; its record has the ending .json instead."""
    return directory / f"{number:05d}.tar"


def write_shard(path: Path, results: Iterable[LatentSample | Rejection]) -> ShardRecord:
    """Write what ``results`` yields, one at a time, and commit its index, its record and then the shard."""
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
        record = ShardRecord(
            path.name, file_sha256(temporary), len(shapes), temporary.stat().st_size,
            shapes[0][0] if shapes else None, shapes[0][1] if shapes else None, tuple(rejected),
        )  # fmt: skip
        write_index(path, temporary)
        write_json(path.with_suffix(".json"), asdict(record))
    return record


def _add_sample(archive: tarfile.TarFile, sample: LatentSample) -> None:
    tensors = {"latents": sample.latents.contiguous(), "text": sample.text.contiguous()}
    facts = {"index": sample.index, "caption": sample.caption, **sample.facts}
    members = {
        "safetensors": safetensors.torch.save(tensors),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
        "mp4": sample.preview,
    }
    for ending, content in members.items():
        if content is not None:
            # TarInfo's own owner, mode and time are constants: equal samples give equal bytes.
            info = tarfile.TarInfo(f"{sample.index:08d}.{ending}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read_record(path: Path) -> ShardRecord | None:
    """The record of a complete shard, None when it still has to be made. A damaged shard is named."""
    record_path = path.with_suffix(".json")
    if not path.exists() or not record_path.exists():
        return None
    try:
        record = ShardRecord.from_dict(json.loads(record_path.read_bytes()))
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"The shard record {record_path} cannot be read.",
            f"Remove it and run again; {path.name} is then made again.",
        ) from error
    check_size(path, record)
    return record


def check_size(path: Path, record: ShardRecord) -> None:
    """Refuse a local shard that vanished or was cut short; costs no reading."""
    require_size(str(path), path.stat().st_size if path.exists() else None, record)


def require_size(name: str, size: int | None, record: ShardRecord) -> None:
    """Refuse a shard that has another size than was written, or none."""
    if size is None:
        raise UsageError(
            f"The shard {name} is missing.", "Run `anyflow synthesize` again: it makes missing shards only."
        )
    if size != record.bytes:
        raise UsageError(f"The shard {name} has {size:,} bytes where {record.bytes:,} were written.", REPAIR)


def write_manifest(
    directory: Path, records: Iterable[ShardRecord], provenance: Mapping[str, Any]
) -> Manifest:
    """Commit the manifest of a complete data set; mixed latent shapes are refused."""
    records = tuple(records)
    shapes = {(r.latent_shape, r.text_dim): r.name for r in records if r.latent_shape and r.text_dim}
    if len(shapes) > 1:
        named = ", ".join(f"{name} {shape}" for shape, name in shapes.items())
        raise UsageError(f"The shards in {directory} hold latents of several shapes: {named}.", REPAIR)
    if not shapes:
        raise AnyflowError(
            f"No sample in {directory} passed the checks.",
            "The reasons stand in its .json files; remove it when the videos are mended, and run again.",
        )
    ((shape, text_dim),) = shapes
    manifest = Manifest(sum(r.samples for r in records), records, shape, text_dim, provenance)
    write_json(directory / MANIFEST, asdict(manifest))
    return manifest


def read_manifest(address: str | Path) -> Manifest:
    """The manifest of a complete data set; says what is the matter when there is none."""
    place = Storage.at(address)
    path = place.name(MANIFEST)
    try:
        content = json.loads(place.read(MANIFEST))
        version = content["version"]
        if version <= VERSION:
            shards = tuple(ShardRecord.from_dict(entry) for entry in content["shards"])
            return Manifest(**{**content, "shards": shards, "latent_shape": tuple(content["latent_shape"])})
    except FileNotFoundError:
        what = "is not complete yet" if place.exists(PROVENANCE) else f"holds no data set (no {MANIFEST})"
        raise UsageError(f"{place} {what}.", "Make or complete it with `anyflow synthesize`.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"The manifest {path} cannot be read.", "Remove it and run `anyflow synthesize` again."
        ) from error
    raise UsageError(
        f"{path} is of version {version}; this anyflow reads up to {VERSION}.", "Update anyflow."
    )


def write_negative(directory: Path, text: Tensor) -> None:
    """Store the negative prompt's embedding, (L, D)."""
    with atomic_write(directory / NEGATIVE) as temporary:
        temporary.write_bytes(safetensors.torch.save({"text": text.contiguous()}))


def read_negative(address: str | Path) -> Tensor:
    """The negative prompt's embedding, (L, D), in fp32."""
    place = Storage.at(address)
    try:
        return safetensors.torch.load(place.read(NEGATIVE))["text"].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise UsageError(
            f"{place.name(NEGATIVE)} is missing or cannot be read.", "Run `anyflow synthesize` again."
        ) from error


def read_sample(place: Storage, shard: str, row: Any) -> LatentSample:
    """One sample by its row of the index; CorruptSampleError names it if it is not what was written.

    A shard that is not there any more ends as UsageError: that is more than a sample. Previews are not read.
    """
    name = f"Sample {row['sample']:08d} of {place.name(shard)}"
    try:
        content = place.read(shard, int(row["offset"]), int(row["length"]))
    except FileNotFoundError:
        raise UsageError(
            f"The shard {place.name(shard)} is missing.", "Bring it back; the same command then goes on."
        ) from None
    if zlib.crc32(content) != row["crc"]:
        raise CorruptSampleError(f"{name} is not what was written (its checksum differs).", REPAIR)
    try:
        facts = json.loads(content[-int(row["facts"]) :])
        tensors = safetensors.torch.load(content[: int(row["tensors"])])
        sample = LatentSample(
            facts.pop("index"), facts.pop("caption"), tensors["latents"], tensors["text"], facts
        )
    except (KeyError, ValueError, AttributeError, SafetensorError) as error:
        raise CorruptSampleError(f"{name} cannot be read ({error!r}).", REPAIR) from error
    if sample.index != row["sample"]:
        raise CorruptSampleError(f"{name} is sample {sample.index}.", REPAIR)
    if not (_is_finite(sample.latents) and _is_finite(sample.text)):
        raise CorruptSampleError(f"{name} holds numbers that are not finite.", REPAIR)
    return sample


def _is_finite(x: Tensor) -> bool:
    # A sum is finite only if all its terms are, and takes a fraction of the time of looking at each.
    return bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all())
