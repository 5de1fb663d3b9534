"""Sampling a causal model: chunk after chunk, each by any sampler over the cache of those before it.

Legend: B batch, F latent frames, C channels, H W latent height and width.

``flow/`` knows nothing of chunks: to a sampler, a chunk under its cache is a velocity like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_cli.flow.samplers import Sampler
from anyflow_cli.flow.velocity import Generators, Velocity, from_function
from anyflow_cli.model.causal import check_partition, split_after
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.kv_cache import KeyCache, Policy


class Guidance(NamedTuple):
    """Classifier-free guidance: the condition to move away from, and how far."""

    null: Conditioned
    scale: float


@torch.no_grad()
def sample_chunks(
    model: Conditioned,
    noise: Tensor,
    partition: Sequence[int],
    sampler: Sampler,
    grids: Sequence[Tensor],
    *,
    given: Tensor | None = None,
    guidance: Guidance | None = None,
    policy: Policy = "exact",
    remember: int | None = None,
    then: Mapping[int, Conditioned] | None = None,
    generator: Generators = None,
) -> Iterator[Tensor]:
    """Give the chunks of a video (B, F, C, H, W) as they are finished, from its noise.

    ``grids``: the times of each sampled chunk in order; the last serves all that follow. ``given``: its first
    frames (B, F', C, H, W), which come back as they are; a chunk that they end in is completed, see
    ``split_after``. ``then``: conditions that take over from a frame on, where a chunk is made to begin; what
    is encoded again after that, is so under the new one. ``remember``: see ``KeyCache``.
    """
    check_partition(partition, noise.shape[1])
    known = 0 if given is None else given.shape[1]
    halves = 1 if guidance is None else 2
    conditions = {0: model, **(then or {})}
    chunks = tuple(partition)
    for border in (known, *conditions):
        chunks = split_after(chunks, border)
    size, batch = (noise.shape[-2], noise.shape[-1]), halves * len(noise)
    cache = KeyCache(model.network, chunks, size, batch, policy=policy, remember=remember)
    sampled = 0
    for chunk in cache.chunks:
        if chunk.first in conditions:
            model = conditions[chunk.first]
            model = model if guidance is None else model.join(guidance.null)
        if given is not None and chunk.slice.stop <= known:
            x = given[:, chunk.slice]
        else:
            velocity: Velocity = cache.next(model)
            velocity = velocity if guidance is None else _guided(velocity, guidance.scale)
            times = grids[min(sampled, len(grids) - 1)]
            x = sampler(velocity, noise[:, chunk.slice], times, generator=generator)
            sampled += 1
        yield x
        if chunk is not cache.chunks[-1]:
            cache.add(torch.cat([x] * halves), model)


def _guided(both: Velocity, scale: float) -> Velocity:
    """Guidance over a cache that holds both conditions, one after the other, in one batch."""

    def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u, u_null = both(*(torch.cat((x, x)) for x in (z, t, r))).chunk(2)
        return u_null + scale * (u - u_null)

    return from_function(velocity)
