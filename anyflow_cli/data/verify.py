"""Is a data set on disk what was written? Hashes first, then every sample; nothing is changed.

Shards are checked side by side in threads: hashing and reading release the interpreter lock, so 10,000
samples take about as long as reading them once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.data.shards import (
    CorruptSampleError,
    Manifest,
    ShardRecord,
    index_members,
    read_manifest,
    read_negative,
    read_sample,
    sha256,
)
from anyflow_cli.errors import UsageError


@dataclass(frozen=True)
class Verification:
    """What was looked at, and one sentence for each thing that is wrong."""

    shards: int
    samples: int
    problems: tuple[str, ...]


def verify(directory: Path, on_shard: Callable[[ShardRecord], None] = lambda record: None) -> Verification:
    """Check every shard of a data set against its manifest; ``on_shard`` sees each when it is done."""
    manifest = read_manifest(directory)
    problems: list[str] = []
    try:
        read_negative(directory)
    except UsageError as error:
        problems.append(error.message)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(
            lambda record: _shard_problems(directory / record.name, record, manifest), manifest.shards
        )
        for record, more in zip(manifest.shards, found, strict=True):
            problems += more
            on_shard(record)
    return Verification(len(manifest.shards), manifest.count, tuple(problems))


def _shard_problems(path: Path, record: ShardRecord, manifest: Manifest) -> list[str]:
    if not path.exists():
        return [f"The shard {path} is missing."]
    problems = (
        []
        if sha256(path) == record.sha256
        else [f"The shard {path} is not what was written (its hash differs)."]
    )
    try:
        members = index_members(path)
    except UsageError as error:
        return [*problems, error.message]
    keys = [key for key, parts in members.items() if "safetensors" in parts]
    if len(keys) != record.samples:
        problems.append(f"The shard {path} holds {len(keys)} samples where {record.samples} were written.")
    for key in keys:
        try:
            sample = read_sample(path, key, members[key])
        except CorruptSampleError as error:
            problems.append(error.message)
            continue
        shape, text_dim = tuple(sample.latents.shape), sample.text.shape[-1]
        if (shape, text_dim) != (manifest.latent_shape, manifest.text_dim):
            problems.append(
                f"Sample {key} of {path} has latents {shape}, the data set {manifest.latent_shape}."
            )
    return problems
