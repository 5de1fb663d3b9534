"""``--verify``: recompute everything that a data set states about itself; nothing is changed.

The manifest must agree with itself, with the records and with ``provenance.json``; each shard must have its
hash, and its index must be the one of its archive; each sample must have its checksum, the shape of the data
set and one number type. Bad samples are named one by one. Shards are checked in parallel threads, since
hashing and reading release the interpreter lock; those of another machine are copied one at a time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anyflow_cli.data.published import PublishedData, recognize
from anyflow_cli.data.shard_index import Index, read_index, scan
from anyflow_cli.data.shards import (
    MANIFEST,
    PROVENANCE,
    REWRITE,
    CorruptSampleError,
    Manifest,
    ShardRecord,
    parse_manifest,
    read_negative,
    read_sample,
)
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.records import parse_record


@dataclass(frozen=True)
class Verification:
    """What was checked, and one sentence per problem."""

    shards: int
    samples: int
    problems: tuple[str, ...]


@dataclass
class ShardFindings:
    """Problems of one shard, and how many samples have which number types."""

    problems: list[str] = field(default_factory=list)
    types: Counter[str] = field(default_factory=Counter)


def verify(address: str | Path, on_shard: Callable[[str], None] = lambda name: None) -> Verification:
    """Check a data set against its manifest, or each sample of a published one.

    Args:
        address: A directory, or any address that fsspec reads.
        on_shard: Called with the name of each checked shard or file, in order.

    Raises:
        UsageError: There is no manifest that can be read, or a published file cannot be indexed.
    """
    published = recognize(address)
    if published is not None:
        return _verify_published(PublishedData(published, None), on_shard)
    storage, manifest = Storage.at(address), parse_manifest(address)
    problems = [f"The manifest {problem}." for problem in manifest.problems()]
    problems += _provenance_problems(storage, manifest)
    problems += _negative_problems(address, manifest)
    types: Counter[str] = Counter()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1) if storage.is_local else 1) as pool:
        found = pool.map(lambda record: _check_shard(storage, record, manifest), manifest.shards)
        for record, findings in zip(manifest.shards, found, strict=True):
            problems += findings.problems
            types += findings.types
            on_shard(record.name)
    problems += _type_problems(types)
    return Verification(len(manifest.shards), manifest.count, tuple(problems))


def _type_problems(types: Counter[str]) -> Iterator[str]:
    if len(types) > 1:
        named = ", ".join(f"{count} as {kind}" for kind, count in types.most_common())
        yield f"The samples have several number types: {named}."


def number_of_files(address: str | Path) -> int:
    """Number of shards, or files, that ``verify`` will check."""
    published = recognize(address)
    return len(parse_manifest(address).shards) if published is None else len(published.sizes)


def _verify_published(data: PublishedData, on_shard: Callable[[str], None]) -> Verification:
    """Read every sample: its tensors need a shape, a number type and finite values, and it a caption."""
    problems: list[str] = []
    types: Counter[str] = Counter()
    for name, positions in data.positions_by_file().items():
        for position in positions:
            try:
                sample = data.read(position)
            except CorruptSampleError as error:
                problems.append(error.message)
            else:
                types[f"{sample.latents.dtype}".removeprefix("torch.")] += 1
        on_shard(name)
    problems += _type_problems(types)
    return Verification(len(data.names), len(data), tuple(problems))


def _provenance_problems(storage: Storage, manifest: Manifest) -> Iterator[str]:
    path = storage.address_of(PROVENANCE)
    try:
        stated = parse_record(storage.read(PROVENANCE), dict[str, Any], path, REWRITE)
    except FileNotFoundError:
        return  # data sets of other programs have none
    except UsageError as error:
        yield error.message
    else:
        if stated != manifest.provenance:
            yield f"{path} differs from the provenance in {MANIFEST}."


def _negative_problems(address: str | Path, manifest: Manifest) -> Iterator[str]:
    try:
        text = read_negative(address, manifest.negative_sha256)
    except UsageError as error:
        yield error.message
    else:
        if text.shape[-1] != manifest.text_dim:
            yield f"{manifest.negative} has text of width {text.shape[-1]}, the data set {manifest.text_dim}."


def _check_shard(storage: Storage, record: ShardRecord, manifest: Manifest) -> ShardFindings:
    findings = ShardFindings()
    shard = storage.address_of(record.name)
    try:
        if not storage.exists(record.name):
            findings.problems.append(f"The shard {shard} is missing.")
            return findings
        with storage.local_copy(record.name) as copy:
            local = Storage.at(copy.parent)
            if copy.stat().st_size != record.bytes or local.sha256(copy.name) != record.sha256:
                findings.problems.append(f"The shard {shard} is not what was written (its hash differs).")
            findings.problems += _record_problems(storage, record)
            rows = _checked_index(storage, record, copy, findings)
            for row in rows if rows is not None else ():
                _check_sample(storage, local, record, row, manifest, findings)
    except UsageError as error:
        findings.problems.append(error.message)
    return findings


def _record_problems(storage: Storage, record: ShardRecord) -> Iterator[str]:
    name = Path(record.name).with_suffix(".json").name
    path = storage.address_of(name)
    try:
        if parse_record(storage.read(name), ShardRecord, path, REWRITE) != record:
            yield f"{path} differs from its entry in {MANIFEST}."
    except FileNotFoundError:
        yield f"{path} is missing."
    except UsageError as error:
        yield error.message


def _checked_index(
    storage: Storage, record: ShardRecord, archive: Path, findings: ShardFindings
) -> Index | None:
    """The index of a shard after a comparison with its archive; None if there is none to go by."""
    try:
        rows = read_index(storage, record.name, record.samples, record.bytes)
    except UsageError as error:
        findings.problems.append(error.message)
        return None
    try:
        columns = ["sample", "offset", "tensors", "length", "facts"]  # samples compare their own checksums
        if not np.array_equal(scan(archive)[columns], rows[columns]):
            shard = storage.address_of(record.name)
            findings.problems.append(f"The index of {shard} is not that of its archive.")
    except UsageError as error:
        findings.problems.append(error.message)
    return rows


def _check_sample(
    storage: Storage,
    local: Storage,
    record: ShardRecord,
    row: Any,
    manifest: Manifest,
    findings: ShardFindings,
) -> None:
    name = f"Sample {row['sample']:08d} of {storage.address_of(record.name)}"
    try:
        sample = read_sample(local, record.name, row)
    except CorruptSampleError as error:
        findings.problems.append(error.message.replace(local.address, storage.address, 1))
        return
    shape, text_dim = tuple(sample.latents.shape), sample.text.shape[-1]
    if shape != record.latent_shape:
        findings.problems.append(f"{name} has latents {shape}, its shard {record.latent_shape}.")
    if text_dim != manifest.text_dim:
        findings.problems.append(f"{name} has text of width {text_dim}, the data set {manifest.text_dim}.")
    findings.types[f"{sample.latents.dtype} and {sample.text.dtype}".replace("torch.", "")] += 1
