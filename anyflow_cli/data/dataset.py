"""Latents from shards, in an order that follows from (seed, step) alone.

The global batch of a step is known to every rank without talking: a seeded permutation an epoch, cut into
batches, one epoch running into the next. So the order is the same on any number of ranks, processes and
workers, and a run resumes at step s by asking for step s. Reading is random access into tar archives, one
range of bytes a sample by the shards' indices, from wherever fsspec reads (``place.py``). What is held in
memory is the permutation of two epochs and the indices: 44 bytes a sample.

A corrupt sample is replaced by the next readable one in the order of the shards, whoever reads it, so that
global batches stay whole and the same on any number of ranks. Who reads it names it; ``Batches.account``
counts it on every rank alike, and ends the run beyond the recipe's limit.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, count
from pathlib import Path

import torch
from torch import Tensor

from anyflow_cli.data.shard_index import REPAIR, Index, read_index
from anyflow_cli.data.shards import (
    CorruptSampleError,
    LatentSample,
    read_manifest,
    read_negative,
    read_sample,
    require_size,
)
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError

IN_A_ROW = 16  # corrupt samples beside each other, after which it is no matter of samples any more

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """What one step (or one rank's part of it) trains on, in fp32."""

    latents: Tensor  # (B, F, C, H, W)
    text: Tensor  # (B, L, D), zeros after a prompt's own tokens
    captions: list[str]
    seeds: Sequence[int | None] = ()  # of the noise that the teacher made each from; None for real clips
    replaced: Sequence[int] = ()  # the places of this part whose own samples are corrupt


class LatentData:
    """The samples of one data set, by position. Position p is the p-th sample in the order of the shards."""

    def __init__(self, address: str | Path, max_text_tokens: int) -> None:
        self.place = Storage.at(address)
        self.max_text_tokens = max_text_tokens
        self.manifest = read_manifest(address)
        self.latent_shape, self.text_dim = self.manifest.latent_shape, self.manifest.text_dim
        self._ends = list(accumulate(record.samples for record in self.manifest.shards))
        self._indices: dict[int, Index] = {}
        self._named: set[int] = set()  # corrupt samples that were warned of
        sizes = self.place.sizes([record.name for record in self.manifest.shards])
        for record, size in zip(self.manifest.shards, sizes, strict=True):
            require_size(self.place.name(record.name), size, record)

    def __len__(self) -> int:
        """How many samples there are."""
        return self.manifest.count

    @cached_property
    def negative(self) -> Tensor:
        """The negative prompt's embedding, padded with zeros, (L, D)."""
        return self._padded(read_negative(self.place.address))

    def sample(self, position: int) -> LatentSample:
        """One sample as stored; CorruptSampleError if it cannot be read, UsageError if it does not belong."""
        shard = bisect_right(self._ends, position)
        record = self.manifest.shards[shard]
        row = self._index(shard)[position - self._ends[shard] + record.samples]
        sample = read_sample(self.place, record.name, row)
        if tuple(sample.latents.shape) != self.latent_shape:
            shapes = f"latents {tuple(sample.latents.shape)}, the data set {self.latent_shape}"
            raise UsageError(
                f"Sample {sample.index:08d} of {self.place.name(record.name)} has {shapes}.", REPAIR
            )
        return sample

    def batch(self, positions: Sequence[int]) -> Batch:
        """These samples together, text padded with zeros to ``max_text_tokens``."""
        found = [self._usable(position) for position in positions]
        samples = [sample for _, sample in found]
        return Batch(
            torch.stack([sample.latents.float() for sample in samples]),
            torch.stack([self._padded(sample.text.float()) for sample in samples]),
            [sample.caption for sample in samples],
            [_noise_seed(sample) for sample in samples],
            [place for place, (position, _) in enumerate(found) if position != positions[place]],
        )

    def _usable(self, position: int) -> tuple[int, LatentSample]:
        """This sample or, if it is corrupt, the next one that can be read, with its position."""
        for candidate in range(position, position + IN_A_ROW + 1):
            candidate %= len(self)
            try:
                return candidate, self.sample(candidate)
            except CorruptSampleError as error:
                if candidate not in self._named:
                    self._named.add(candidate)
                    log.warning("%s The next one takes its place.", error.message)
        raise UsageError(f"More than {IN_A_ROW} samples in a row of {self.place} cannot be read.", REPAIR)

    def _index(self, shard: int) -> Index:
        """The index of a shard, read at first touch."""
        if shard not in self._indices:
            record = self.manifest.shards[shard]
            self._indices[shard] = read_index(self.place, record.name, record.samples)
        return self._indices[shard]

    def _padded(self, text: Tensor) -> Tensor:
        """(L', D) -> (L, D). Wan attends to the zero padding, so its length is part of the model."""
        missing = self.max_text_tokens - len(text)
        if missing < 0:
            raise UsageError(
                f"{self.place} has texts of {len(text)} tokens, more than {self.max_text_tokens}.",
                "Set model.max_text_tokens to what the data set was made with.",
            )
        return torch.nn.functional.pad(text, (0, 0, 0, missing))


def _noise_seed(sample: LatentSample) -> int | None:
    """The seed of the noise that a teacher made this sample from; real clips have none."""
    return sample.facts["seed"] if sample.facts.get("source") == "teacher" else None


class Batches:
    """The global batches of a training, by step. At most ``max_corrupt`` samples may be corrupt."""

    def __init__(self, data: LatentData, global_batch: int, seed: int, max_corrupt: int = 0) -> None:
        self.data = data
        self.global_batch = global_batch
        self.seed = seed
        self.max_corrupt = max_corrupt
        self.corrupt: set[int] = set()  # positions accounted for, the same on all ranks
        self._order = lru_cache(maxsize=2)(self._permutation)

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

    def account(self, step: int, places: Iterable[int]) -> None:
        """Take note that the samples at these places of the whole global batch of ``step`` are corrupt.

        To be called on every rank with what all ranks met, so that all end at the same step.
        """
        positions = self.positions(step)
        before = len(self.corrupt)
        self.corrupt |= {positions[place] for place in places}
        if len(self.corrupt) > self.max_corrupt:
            raise UsageError(
                f"{len(self.corrupt)} samples of {self.data.place} are corrupt by step {step + 1}; the recipe"
                f" allows {self.max_corrupt} (data.max_corrupt).",
                REPAIR,
            )
        if len(self.corrupt) > before:
            log.info("%d of at most %d corrupt samples were replaced.", len(self.corrupt), self.max_corrupt)

    def _permutation(self, epoch: int) -> Tensor:
        # Seeding by a mix of both numbers keeps epoch 1 of seed 0 apart from epoch 0 of seed 1.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data), generator=generator)
