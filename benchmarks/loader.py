"""Throughput of reading latents for training, in samples and megabytes per second, next to raw bytes.

    python benchmarks/loader.py                                    128 samples of the size of Wan at 480p
    python benchmarks/loader.py --data runs/tiny/data --tokens 32  an existing data set
    python benchmarks/loader.py --data s3://bucket/data            one on another machine

"Raw bytes" reads the same byte ranges of the same archives with one thread, without decoding. The archives
are dropped from the page cache before each measurement (where the system allows it), so that the disk is
measured and not memory; --warm keeps them. ``--index`` measures instead the cost of a data set of so many
samples before its first batch: size of the indices, time to read them, memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shard_index import ROW, index_path
from anyflow_cli.data.shards import (
    LatentSample,
    ShardRecord,
    shard_path,
    shard_ranges,
    write_manifest,
    write_negative,
    write_shard,
)

WAN = (21, 16, 60, 104)  # latents of 81 frames at 480x832
TEXT = (100, 4096)  # tokens of a usual caption
MB = 1e6


def make_data(directory: Path, count: int, shard_size: int) -> None:
    """Write a data set of random bf16 latents."""
    latents, text = torch.randn(WAN).bfloat16(), torch.randn(TEXT).bfloat16()
    records = [
        write_shard(
            shard_path(directory, number), (LatentSample(i, f"caption {i}", latents, text) for i in indices)
        )
        for number, indices in enumerate(shard_ranges(count, shard_size))
    ]
    write_negative(directory, text)
    write_manifest(directory, records, {})


def drop_from_cache(directory: Path) -> None:
    """Drop the archives from the page cache."""
    for path in directory.glob("*.tar"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_raw(data: LatentData, batches: Batches, steps: int) -> int:
    """Read the byte ranges of the first steps without decoding; return their total size."""
    total = 0
    ends = np.cumsum([record.samples for record in data.manifest.shards])
    for position in (p for step in range(steps) for p in batches.positions(step)):
        shard = int(np.searchsorted(ends, position, "right"))
        record = data.manifest.shards[shard]
        row = data._index(shard)[position - ends[shard] + record.samples]
        total += len(data.storage.read(record.name, int(row["offset"]), int(row["length"])))
    return total


def measure(args: argparse.Namespace, address: str) -> None:
    """Print a table: raw bytes, then each number of workers."""
    data = LatentData(address, args.tokens)
    batches = Batches(data, args.batch, seed=0)
    steps = min(args.steps, len(data) // args.batch)
    size = read_raw(data, batches, steps)  # also reads the indices, which are not measured
    print(
        f"{len(data)} samples, {size / steps / args.batch / MB:.2f} MB each; {steps} batches of {args.batch}"
    )
    print(f"{'':>12} {'samples/s':>10} {'MB/s':>8} {'per worker':>11} {'of raw':>9}")
    cases: list[tuple[str, int, Callable[[], object]]] = [
        ("raw bytes", 1, lambda: read_raw(data, batches, steps))
    ]
    for workers in args.workers:
        read = lambda workers=workers: [None for _ in islice(batches.stream(0, workers=workers), steps)]  # noqa: E731
        cases.append((f"{workers} workers", max(workers, 1), read))
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    for _ in range(args.repeats):  # in turn, so that a machine that slows down affects all
        for name, _, call in cases:
            if not args.warm and Path(address).is_dir():
                drop_from_cache(Path(address))
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["raw bytes"])
    for name, workers, _ in cases:
        took = statistics.median(seconds[name])
        samples, rate = steps * args.batch / took, size / MB / took
        print(f"{name:>12} {samples:10.1f} {rate:8.0f} {rate / workers:11.0f} {base / took:9.2f}")


def measure_index(count: int, shard_size: int, directory: Path) -> None:
    """Measure the cost of so many samples before the first batch; the archives are sparse files."""
    row = np.zeros(1, ROW)[0]
    records = []
    for number, indices in enumerate(shard_ranges(count, shard_size)):
        path = shard_path(directory, number)
        with path.open("wb") as file:
            file.truncate(1 << 30)  # uses no disk blocks
        rows = np.full(len(indices), row)
        rows["sample"] = indices
        np.save(index_path(path), rows)
        records.append(ShardRecord(path.name, "0" * 64, len(indices), 1 << 30, WAN, TEXT[1]))
    write_manifest(directory, records, {})
    size = sum(path.stat().st_size for path in directory.glob("*.npy"))
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    data = LatentData(directory, TEXT[0])
    opened = time.perf_counter() - start
    batches = Batches(data, 32, seed=0)
    positions = batches.positions(0)
    first = time.perf_counter() - start
    for shard in range(len(records)):
        data._index(shard)
    every = time.perf_counter() - start
    held = process.memory_info().rss - before
    print(f"{count} samples in {len(records)} shards, {len(positions)} per batch")
    print(f"indices on disk {size / MB:.1f} MB, memory with all of them {held / MB:.1f} MB")
    print(f"opened in {opened:.2f} s, first batch known after {first:.2f} s, all indices after {every:.2f} s")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a data set; by default a temporary one")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="keep the page cache")
    parser.add_argument("--index", type=int, metavar="SAMPLES", help="measure the index of so many samples")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        if args.index:
            return measure_index(args.index, 256, Path(directory))
        if args.data is None:
            make_data(Path(directory), args.batch * args.steps, 64)
        measure(args, args.data or directory)


if __name__ == "__main__":
    main()
