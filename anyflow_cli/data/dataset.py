"""Batches of latents, of our shards or a published data set, in an order that follows from (seed, step).

Every rank computes the global batch of a step without communication: one seeded permutation per epoch, cut
into batches, one epoch running into the next. So the order is the same on any number of ranks, processes and
workers, and a run resumes at step s by loading step s. Reading is random access into tar archives, one range
of bytes per sample by the shards' indices, from anywhere (``storage.py``). Memory holds the permutations of
two epochs and the indices: 44 bytes per sample of one latent shape.

Samples of one shape are a bucket, and every batch is from one bucket; buckets take turns (``Batches``).

A corrupt sample is replaced by the next readable one of its bucket, in the order of the shards, on every rank
alike, so global batches stay complete and the same on any number of ranks. The rank that reads it names it;
``Batches.account`` counts it on all ranks and ends the run beyond the recipe's limit.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from anyflow_cli.data.published import ModelSide, PublishedData, recognize
from anyflow_cli.data.shard_index import REPAIR, Index, read_index
from anyflow_cli.data.shards import (
    CorruptSampleError,
    LatentSample,
    StoredShape,
    read_manifest,
    read_negative,
    read_sample,
    require_size,
)
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import fold_seed

MAX_CONSECUTIVE = 16  # corrupt samples side by side; more are not a matter of single samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Samples of one step, or one rank's part of them, in fp32."""

    latents: Tensor  # (B, F, C, H, W)
    condition: Condition  # its text has zeros after a prompt's own tokens
    captions: list[str]
    seeds: Sequence[int | None] = ()  # of the noise each was sampled from; None for real clips
    replaced: Sequence[int] = ()  # positions in this part whose own samples are corrupt


class Bucket(NamedTuple):
    """The samples of one latent shape (F, C, H, W)."""

    shape: StoredShape
    positions: Sequence[int]


class LatentSource(Protocol):
    """Samples by position, wherever and in whichever format they are."""

    storage: Storage

    @property
    def text_dim(self) -> int:
        """Width D of the text."""

    def positions_by_shape(self) -> Mapping[StoredShape, Sequence[int]]:
        """Positions of the samples of each latent shape; all positions are 0 to their number - 1."""

    def read(self, position: int) -> LatentSample:
        """Read one sample; a CorruptSampleError names one that cannot be read."""

    def negative(self) -> Tensor:
        """The negative prompt's embedding (L, D)."""


class ShardedData:
    """Samples of a data set of anyflow's by position, which is their order in the shards."""

    def __init__(self, address: str | Path) -> None:
        self.storage = Storage.at(address)
        self.manifest = read_manifest(address)
        self.text_dim = self.manifest.text_dim
        self._ends = list(accumulate(record.samples for record in self.manifest.shards))
        self._indices: dict[int, Index] = {}
        sizes = self.storage.sizes([record.name for record in self.manifest.shards])
        for record, size in zip(self.manifest.shards, sizes, strict=True):
            require_size(self.storage.address_of(record.name), size, record)

    def positions_by_shape(self) -> dict[StoredShape, Sequence[int]]:
        """Positions of the samples of each latent shape."""
        if self.manifest.version == 1:
            return {self.manifest.latent_shape: range(self.manifest.count)}
        found: dict[StoredShape, list[int]] = {}
        for record, end in zip(self.manifest.shards, self._ends, strict=True):
            if record.latent_shape is not None:
                found.setdefault(record.latent_shape, []).extend(range(end - record.samples, end))
        return {shape: positions for shape, positions in found.items() if positions}

    def read(self, position: int) -> LatentSample:
        """Read one sample as stored.

        Raises:
            CorruptSampleError: It cannot be read.
            UsageError: It has another shape than the data set.
        """
        shard = bisect_right(self._ends, position)
        record = self.manifest.shards[shard]
        row = self._index(shard)[position - self._ends[shard] + record.samples]
        sample = read_sample(self.storage, record.name, row)
        name = f"Sample {sample.index:08d} of {self.storage.address_of(record.name)}"
        shape, width = tuple(sample.latents.shape), sample.text.shape[-1]
        wanted = self.manifest.latent_shape if self.manifest.version == 1 else record.latent_shape
        if shape != wanted:
            raise UsageError(f"{name} has latents {shape}, the data set {wanted}.", REPAIR)
        if width != self.text_dim:
            raise UsageError(f"{name} has text of width {width}, the data set {self.text_dim}.", REPAIR)
        return sample

    def negative(self) -> Tensor:
        """The negative prompt's embedding (L, D)."""
        return read_negative(self.storage.address, self.manifest.negative_sha256)

    def _index(self, shard: int) -> Index:
        """The index of a shard, read on first use."""
        if shard not in self._indices:
            record = self.manifest.shards[shard]
            self._indices[shard] = read_index(self.storage, record.name, record.samples, record.bytes)
        return self._indices[shard]


class LatentData:
    """Samples of one data set by position, as batches.

    Args:
        address: A directory, or any address that fsspec reads.
        max_text_tokens: Length that text is padded to.
        model: What the model supplies to a published data set; one of anyflow's needs none.
        max_frames: Latent frames after which longer samples are cut; None cuts none. The VAE is causal, so
            the first latent frames are those of the first frames of the video.
        lengths: Latent frames that a causal model takes; shapes of other lengths are left out where there are
            several. None takes any.
    """

    def __init__(
        self,
        address: str | Path,
        max_text_tokens: int,
        model: ModelSide | None = None,
        max_frames: int | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        published = recognize(address) if model is not None else None
        self.source: LatentSource = (
            ShardedData(address) if published is None else PublishedData(published, model)
        )
        self.storage, self.max_text_tokens, self.max_frames = self.source.storage, max_text_tokens, max_frames
        self._lengths = lengths
        self._warned: set[int] = set()  # corrupt samples

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Samples by latent shape after cutting, the largest shape first."""
        found: dict[StoredShape, Sequence[int]] = {}
        for shape, positions in self.source.positions_by_shape().items():
            frames = shape[0] if self.max_frames is None else min(shape[0], self.max_frames)
            cut = (frames, *shape[1:])
            found[cut] = sorted([*found[cut], *positions]) if cut in found else positions
        if self._lengths is not None and len(found) > 1:
            for shape in [shape for shape in found if shape[0] not in self._lengths]:
                left_out = len(found.pop(shape))
                log.warning(
                    "%d samples of %d latent frames are left out: the first chunks of the model make up %s.",
                    left_out, shape[0], ", ".join(map(str, self._lengths)),
                )  # fmt: skip
        if not found:
            raise UsageError(
                f"{self.storage} has no samples of lengths that the model takes.",
                "Set model.causal.partition to chunks that make up the latent frames of the data set.",
            )
        largest_first = sorted(found, key=lambda shape: (-math.prod(shape), shape))
        return tuple(Bucket(shape, found[shape]) for shape in largest_first)

    @property
    def latent_shape(self) -> StoredShape:
        """Shape (F, C, H, W) of the samples, the largest where there are several."""
        return self.buckets[0].shape

    @property
    def text_dim(self) -> int:
        """Width D of the text."""
        return self.source.text_dim

    def __len__(self) -> int:
        """Number of samples."""
        return sum(len(bucket.positions) for bucket in self.buckets)

    @cached_property
    def negative(self) -> Tensor:
        """The negative prompt's embedding, padded with zeros, (L, D)."""
        return self._padded(self.source.negative().float())

    def sample(self, position: int) -> LatentSample:
        """Read one sample, cut to ``max_frames``.

        Raises:
            CorruptSampleError: It cannot be read.
            UsageError: It has another shape than the data set.
        """
        sample = self.source.read(position)
        pictures = dict(sample.pictures)
        if "channels" in pictures:
            pictures["channels"] = pictures["channels"][: self.max_frames]
        return replace(sample, latents=sample.latents[: self.max_frames], pictures=pictures)

    def batch(self, positions: Sequence[int]) -> Batch:
        """Load samples as one batch, text padded with zeros to ``max_text_tokens``."""
        found = [self._usable(position) for position in positions]
        samples = [sample for _, sample in found]
        return Batch(
            torch.stack([sample.latents.float() for sample in samples]),
            self._condition(samples),
            [sample.caption for sample in samples],
            [_noise_seed(sample) for sample in samples],
            [i for i, (position, _) in enumerate(found) if position != positions[i]],
        )

    def _usable(self, position: int) -> tuple[int, LatentSample]:
        """Read a sample or, if it is corrupt, the next readable one of its shape; return its position too."""
        places = ((bucket.positions, bisect_left(bucket.positions, position)) for bucket in self.buckets)
        members, start = next((m, i) for m, i in places if i < len(m) and m[i] == position)
        for place in range(start, start + MAX_CONSECUTIVE + 1):
            candidate = members[place % len(members)]
            try:
                return candidate, self.sample(candidate)
            except CorruptSampleError as error:
                if candidate not in self._warned:
                    self._warned.add(candidate)
                    log.warning("%s The next sample replaces it.", error.message)
        raise UsageError(
            f"More than {MAX_CONSECUTIVE} consecutive samples of {self.storage} cannot be read.", REPAIR
        )

    def _condition(self, samples: Sequence[LatentSample]) -> Condition:
        """Text and pictures of samples; all must have the same parts."""
        parts = {tuple(sample.pictures) for sample in samples}
        if len(parts) > 1:
            raise UsageError(f"Some samples of {self.storage} have pictures, others have none.", REPAIR)
        text = torch.stack([self._padded(sample.text.float()) for sample in samples])
        return Condition(text).with_pictures(
            **{
                part: torch.stack([sample.pictures[part].float() for sample in samples])
                for part in parts.pop()
            }
        )

    def _padded(self, text: Tensor) -> Tensor:
        """(L', D) -> (L, D). Wan attends to the zero padding, so its length is part of the model."""
        missing = self.max_text_tokens - len(text)
        if missing < 0:
            raise UsageError(
                f"{self.storage} has texts of {len(text)} tokens, more than {self.max_text_tokens}.",
                "Set model.max_text_tokens to what the data set was made with.",
            )
        return torch.nn.functional.pad(text, (0, 0, 0, missing))


def no_noise(data: str) -> UsageError:
    """The error for a data set without the noise behind its videos, such as one of real clips."""
    return UsageError(
        f"Training on pairs needs the noise behind each video, which {data} does not have.",
        "Train on videos that `anyflow synthesize` sampled, or set flow_map.noise=fresh.",
    )


def _noise_seed(sample: LatentSample) -> int | None:
    """Seed of the noise that a teacher sampled this video from; None for real clips."""
    seed = sample.facts.get("seed")
    is_seed = sample.facts.get("source") == "teacher" and type(seed) is int and seed >= 0
    return seed if is_seed else None


class Batches:
    """Global batches by step; at most ``max_corrupt`` samples may be corrupt.

    A batch has one bucket. Buckets take turns in rounds of about one epoch: in round e, a bucket of n samples
    has floor((e + 1) n / B) - floor(e n / B) batches, in an order that follows from (seed, e). So each bucket
    has its share of the steps, and every epoch of a bucket visits each of its samples once.
    """

    def __init__(self, data: LatentData, global_batch: int, seed: int, max_corrupt: int = 0) -> None:
        self.data = data
        self.global_batch = global_batch
        self.seed = seed
        self.max_corrupt = max_corrupt
        self.corrupt: set[int] = set()  # positions counted so far, the same on all ranks
        self._order = lru_cache(maxsize=2 * len(data.buckets))(self._permutation)
        self._round = lru_cache(maxsize=2)(self._turns)

    def positions(self, step: int) -> list[int]:
        """Positions of the samples of ``step`` (from 0), in global order."""
        bucket, batch = self.turn(step)
        members, start = self.data.buckets[bucket].positions, batch * self.global_batch
        drawn = [divmod(draw, len(members)) for draw in range(start, start + self.global_batch)]
        return [members[int(self._order(bucket, epoch)[place])] for epoch, place in drawn]

    def turn(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of the bucket's batch."""
        if len(self.data.buckets) == 1:
            return 0, step
        epoch = step * self.global_batch // sum(len(bucket.positions) for bucket in self.data.buckets)
        while sum(self._batches_before(epoch)) > step:
            epoch -= 1
        while sum(self._batches_before(epoch + 1)) <= step:
            epoch += 1
        before = self._batches_before(epoch)
        turns = self._round(epoch)[: step - sum(before) + 1]
        return turns[-1], before[turns[-1]] + turns.count(turns[-1]) - 1

    def _batches_before(self, epoch: int) -> list[int]:
        """Batches of each bucket before a round."""
        return [epoch * len(bucket.positions) // self.global_batch for bucket in self.data.buckets]

    def _turns(self, epoch: int) -> list[int]:
        """The bucket of each batch of a round."""
        counts = zip(self._batches_before(epoch), self._batches_before(epoch + 1), strict=True)
        turns = [bucket for bucket, (low, high) in enumerate(counts) for _ in range(high - low)]
        order = torch.randperm(len(turns), generator=self._generator(len(self.data.buckets), epoch))
        return [turns[int(place)] for place in order]

    def load(self, step: int, part: slice = slice(None)) -> Batch:
        """Load the batch of a step, or the part of one rank or micro-batch."""
        return self.data.batch(self.positions(step)[part])

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Iterator[Batch]:
        """Yield the batches of steps start, start + 1, ... forever, read ahead by ``workers`` threads."""
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
        """Count the samples at these places of the global batch of ``step`` as corrupt.

        Call it on every rank with the places that all ranks found, so that all end at the same step.

        Raises:
            UsageError: More samples are corrupt than the recipe allows.
        """
        positions = self.positions(step)
        before = len(self.corrupt)
        self.corrupt |= {positions[place] for place in places}
        if len(self.corrupt) > self.max_corrupt:
            raise UsageError(
                f"{len(self.corrupt)} samples of {self.data.storage} are corrupt by step {step + 1}; "
                f"the recipe allows {self.max_corrupt} (data.max_corrupt).",
                REPAIR,
            )
        if len(self.corrupt) > before:
            log.info("%d of at most %d corrupt samples were replaced.", len(self.corrupt), self.max_corrupt)

    def _permutation(self, bucket: int, epoch: int) -> Tensor:
        return torch.randperm(
            len(self.data.buckets[bucket].positions), generator=self._generator(bucket, epoch)
        )

    def _generator(self, stream: int, epoch: int) -> torch.Generator:
        # Seeding by a mix of the numbers keeps epoch 1 of seed 0 apart from epoch 0 of seed 1.
        mixed = fold_seed(self.seed) * 1_000_003 + epoch
        return torch.Generator().manual_seed(mixed if stream == 0 else fold_seed((mixed << 16) + stream))
