"""Small data sets without a model: latents whose every number is the sample's index."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from anyflow_cli.data.shards import (
    LatentSample,
    Rejection,
    shard_path,
    shard_ranges,
    write_manifest,
    write_negative,
    write_shard,
)

SHAPE = (2, 3, 4, 4)
TEXT_DIM = 5


def make_sample(index: int, fill: float | None = None) -> LatentSample:
    """Text length varies with the index, so that padding shows."""
    latents = torch.full(SHAPE, float(index) if fill is None else fill)
    return LatentSample(
        index, f"caption {index}", latents, torch.full((1 + index % 3, TEXT_DIM), 1.0), {"seed": index}
    )


def make_data(directory: Path, count: int = 10, size: int = 4, nan: Collection[int] = ()) -> Path:
    """A complete data set; samples in ``nan`` hold numbers that are not finite."""
    records = []
    for number, indices in enumerate(shard_ranges(count, size)):
        samples = (make_sample(i, float("nan") if i in nan else None) for i in indices)
        records.append(write_shard(shard_path(directory, number), samples))
    write_negative(directory, torch.full((2, TEXT_DIM), 7.0))
    write_manifest(directory, records, {"seed": 0})
    return directory


def rejecting(index: int) -> Rejection:
    """A candidate that failed."""
    return Rejection(index, f"seed {index}", "black")
