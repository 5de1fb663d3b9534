"""Is a data set what was written? Hashes first, then every sample; nothing is changed.

Each bad sample is named, by the checksum that the index holds of it. Shards are checked side by side in
threads: hashing and reading release the interpreter lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_cli.data.shard_index import read_index
from anyflow_cli.data.shards import (
    CorruptSampleError,
    Manifest,
    ShardRecord,
    read_manifest,
    read_negative,
    read_sample,
)
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError


@dataclass(frozen=True)
class Verification:
    """What was looked at, and one sentence for each thing that is wrong."""

    shards: int
    samples: int
    problems: tuple[str, ...]


def verify(
    address: str | Path, on_shard: Callable[[ShardRecord], None] = lambda record: None
) -> Verification:
    """Check every shard of a data set against its manifest; ``on_shard`` sees each when it is done."""
    place, manifest = Storage.at(address), read_manifest(address)
    problems: list[str] = []
    try:
        read_negative(address)
    except UsageError as error:
        problems.append(error.message)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda record: list(_shard_problems(place, record, manifest)), manifest.shards)
        for record, more in zip(manifest.shards, found, strict=True):
            problems += more
            on_shard(record)
    return Verification(len(manifest.shards), manifest.count, tuple(problems))


def _shard_problems(place: Storage, record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    shard = place.name(record.name)
    if not place.exists(record.name):
        yield f"The shard {shard} is missing."
        return
    if place.sha256(record.name) != record.sha256:
        yield f"The shard {shard} is not what was written (its hash differs)."
    try:
        rows = read_index(place, record.name, record.samples)
    except UsageError as error:
        yield error.message
        return
    for row in rows:
        yield from _sample_problems(place, record.name, row, manifest)


def _sample_problems(place: Storage, shard: str, row: Any, manifest: Manifest) -> Iterator[str]:
    try:
        sample = read_sample(place, shard, row)
    except CorruptSampleError as error:
        yield error.message
        return
    shape, text_dim = tuple(sample.latents.shape), sample.text.shape[-1]
    if (shape, text_dim) != (manifest.latent_shape, manifest.text_dim):
        name = f"Sample {sample.index:08d} of {place.name(shard)}"
        yield f"{name} has latents {shape}, the data set {manifest.latent_shape}."
