"""Latents from shards, in an order that follows from (seed, step) alone.

The global batch of a step is known to every rank without talking: a seeded permutation an epoch, cut into
batches, one epoch running into the next. So the order is the same on any number of ranks, processes and
workers, and a run resumes at step s by asking for step s. Reading is random access into tar archives, whose
members are indexed at first touch.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, count
from pathlib import Path

import torch
from torch import Tensor

from anyflow_cli.data.shards import (
    REPAIR,
    CorruptSampleError,
    Members,
    Sample,
    check_size,
    index_members,
    read_manifest,
    read_negative,
    read_sample,
)
from anyflow_cli.errors import UsageError

SKIP_LIMIT = 16  # corrupt samples a process leaves out before it stops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one step (or one rank's part of it) trains on, in fp32."""

    latents: Tensor  # (B, F, C, H, W)
    text: Tensor  # (B, L, D), zeros after a prompt's own tokens
    captions: list[str]
    seeds: Sequence[int | None] = ()  # of the noise that the teacher made each from; None for real clips


class LatentData:
    """The samples of one data set, by position. Position p is the p-th sample in the order of the shards."""

    def __init__(self, directory: str | Path, max_text_tokens: int) -> None:
        self.directory = Path(directory)
        self.max_text_tokens = max_text_tokens
        self.manifest = read_manifest(self.directory)
        self.latent_shape, self.text_dim = self.manifest.latent_shape, self.manifest.text_dim
        self._ends = list(accumulate(record.samples for record in self.manifest.shards))
        self._members: dict[int, tuple[tuple[str, ...], Members]] = {}
        self.skipped: set[int] = set()
        for record in self.manifest.shards:
            check_size(self.directory / record.name, record)

    def __len__(self) -> int:
        """How many samples there are."""
        return self.manifest.count

    @cached_property
    def negative(self) -> Tensor:
        """The negative prompt's embedding, padded with zeros, (L, D)."""
        return self._padded(read_negative(self.directory))

    def sample(self, position: int) -> Sample:
        """One sample as stored; CorruptSampleError if it cannot be read, UsageError if it does not belong."""
        shard = bisect_right(self._ends, position)
        record = self.manifest.shards[shard]
        path = self.directory / record.name
        check_size(path, record)
        keys, members = self._indexed(shard, path)
        key = keys[position - self._ends[shard] + record.samples]
        sample = read_sample(path, key, members[key])
        if tuple(sample.latents.shape) != self.latent_shape:
            shapes = f"latents {tuple(sample.latents.shape)}, the data set {self.latent_shape}"
            raise UsageError(f"Sample {key} of {path} has {shapes}.", REPAIR)
        return sample

    def batch(self, positions: Sequence[int]) -> Batch:
        """These samples together, text padded with zeros to ``max_text_tokens``."""
        samples = [self._usable(position) for position in positions]
        return Batch(
            torch.stack([sample.latents.float() for sample in samples]),
            torch.stack([self._padded(sample.text.float()) for sample in samples]),
            [sample.caption for sample in samples],
            [
                sample.facts.get("seed") if sample.facts.get("source") == "teacher" else None
                for sample in samples
            ],
        )

    def _usable(self, position: int) -> Sample:
        """This sample or, if it is corrupt, the next one that can be read: the same choice on every rank."""
        for candidate in range(position, position + SKIP_LIMIT + 1):
            candidate %= len(self)
            try:
                return self.sample(candidate)
            except CorruptSampleError as error:
                self._skip(candidate, error)
        raise UsageError(f"{SKIP_LIMIT} samples in a row of {self.directory} cannot be read.", REPAIR)

    def _skip(self, position: int, error: CorruptSampleError) -> None:
        if position in self.skipped:
            return
        self.skipped.add(position)
        if len(self.skipped) > SKIP_LIMIT:
            raise UsageError(
                f"More than {SKIP_LIMIT} samples of {self.directory} cannot be read.", REPAIR
            ) from error
        log.warning("%s Skipped, %d so far.", error.message, len(self.skipped))

    def _indexed(self, shard: int, path: Path) -> tuple[tuple[str, ...], Members]:
        if shard not in self._members:
            members = index_members(path)
            keys = tuple(sorted(key for key, parts in members.items() if "safetensors" in parts))
            if len(keys) != self.manifest.shards[shard].samples:
                raise UsageError(f"{path} holds {len(keys)} samples, its manifest another number.", REPAIR)
            self._members[shard] = keys, members
        return self._members[shard]

    def _padded(self, text: Tensor) -> Tensor:
        """(L', D) -> (L, D). Wan attends to the zero padding, so its length is part of the model."""
        missing = self.max_text_tokens - len(text)
        if missing < 0:
            raise UsageError(
                f"{self.directory} has texts of {len(text)} tokens, more than {self.max_text_tokens}.",
                "Set model.max_text_tokens to what the data set was made with.",
            )
        return torch.nn.functional.pad(text, (0, 0, 0, missing))


def _noise_seed(sample: Sample) -> int | None:
    """The seed of the noise that a teacher made this sample from; real clips have none."""
    return sample.facts["seed"] if sample.facts.get("source") == "teacher" else None


class Batches:
    """The global batches of a training, by step."""

    def __init__(self, data: LatentData, global_batch: int, seed: int) -> None:
        self.data = data
        self.global_batch = global_batch
        self._order = lru_cache(maxsize=2)(self._permutation)
        self.seed = seed

    def positions(self, step: int) -> list[int]:
        """The samples of step ``step`` (from 0), in global order, whoever loads them."""
        start = step * self.global_batch
        cut = [divmod(place, len(self.data)) for place in range(start, start + self.global_batch)]
        return [int(self._order(epoch)[place]) for epoch, place in cut]

    def load(self, step: int, part: slice = slice(None)) -> Batch:
        """The batch of a step, or the part of it that one rank or micro-batch takes."""
        return self.data.batch(self.positions(step)[part])

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Iterator[Batch]:
        """Batches of steps start, start + 1, ... without end, read ahead by ``workers`` threads."""
        if workers == 0:
            yield from (self.load(step, part) for step in count(start))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="anyflow-data")
        ahead: deque[Future[Batch]] = deque()
        try:
            for step in count(start):
                ahead.append(pool.submit(self.load, step, part))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _permutation(self, epoch: int) -> Tensor:
        # Seeding by a mix of both numbers keeps epoch 1 of seed 0 apart from epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data), generator=generator)
