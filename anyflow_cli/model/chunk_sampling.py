"""Sampling of a causal model: chunk after chunk, each by any sampler over the cache of the chunks before it.

To a sampler, a chunk over its cache is a velocity like any other: ``flow`` knows nothing of chunks.

Legend: B batch, F latent frames, C channels, H W latent height and width, N steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anyflow_cli.flow.noise import Generators
from anyflow_cli.flow.samplers import Sampler
from anyflow_cli.flow.velocity import Velocity, guided_halves
from anyflow_cli.model.causal import check_partition, split_after
from anyflow_cli.model.experts import networks_under, with_networks
from anyflow_cli.model.kv_cache import KeyCache


class Guidance(NamedTuple):
    """Classifier-free guidance: the negative condition and the scale."""

    null: Velocity
    scale: float


@torch.no_grad()
def sample_chunks(
    model: Velocity,
    noise: Tensor,
    partition: Sequence[int],
    sampler: Sampler,
    grids: Sequence[Tensor],
    *,
    given: Tensor | None = None,
    guidance: Guidance | None = None,
    remember: int | None = None,
    then: Mapping[int, Velocity] | None = None,
    generator: Generators = None,
) -> Iterator[Tensor]:
    """Yield the chunks of a video (B, F, C, H, W) as they are finished.

    Args:
        model: The network, or two experts, under a condition.
        noise: Initial noise of the whole video (B, F, C, H, W).
        partition: Latent frames per chunk; they sum to F.
        sampler: Sampler of each chunk.
        grids: Times (N + 1,) of each sampled chunk in order; the last grid serves all chunks that follow.
        given: Conditioning frames (B, F', C, H, W), the first of the video; they are yielded unchanged, and
            the rest of a chunk that they end in becomes a chunk of its own (``split_after``).
        guidance: Negative condition and scale; None samples without guidance.
        remember: Most compressed chunks to cache, see ``KeyCache``.
        then: Conditions by the frame from which they replace ``model``; a chunk is split there. Cached chunks
            that are encoded again later are encoded under the new condition.
        generator: Noise of samplers that add fresh noise.
    """
    check_partition(partition, noise.shape[1])
    known = 0 if given is None else given.shape[1]
    halves = 1 if guidance is None else 2
    conditions = {0: model, **(then or {})}
    chunks = tuple(partition)
    for border in (known, *conditions):
        chunks = split_after(chunks, border)
    size, batch = (noise.shape[-2], noise.shape[-1]), halves * len(noise)
    cache = _Caches(
        [
            KeyCache(part.network, chunks, size, batch, remember=remember, device=noise.device)
            for part in networks_under(model)
        ]
    )
    sampled = 0
    for chunk in cache.chunks:
        if chunk.first in conditions:
            model = conditions[chunk.first]
            model = model if guidance is None else model.concat(guidance.null)
        if given is not None and chunk.slice.stop <= known:
            x = given[:, chunk.slice]
        else:
            velocity = cache.next_velocity(model)
            velocity = velocity if guidance is None else guided_halves(velocity, guidance.scale)
            times = grids[min(sampled, len(grids) - 1)]
            x = sampler(velocity, noise[:, chunk.slice], times, generator)
            sampled += 1
        yield x
        if chunk is not cache.chunks[-1]:
            cache.append(torch.cat([x] * halves), model)


class _Caches:
    """The cache of a network, or that of each of two experts."""

    def __init__(self, caches: Sequence[KeyCache]) -> None:
        self._caches, self.chunks = caches, caches[0].chunks

    def next_velocity(self, model: Velocity) -> Velocity:
        parts = zip(self._caches, networks_under(model), strict=True)
        return with_networks(model, [cache.next_velocity(part) for cache, part in parts])

    def append(self, x: Tensor, model: Velocity) -> None:
        for cache, part in zip(self._caches, networks_under(model), strict=True):
            cache.append(x, part)


def sample_rollouts(
    sample: Callable[[Tensor, int, Tensor | None], Iterator[Tensor]],
    noise: Tensor,
    rollout: int,
    continued: Callable[[Tensor], Tensor],
    given: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the chunks of a video (B, F, C, H, W) from a model that samples only ``rollout`` frames at once.

    Each rollout starts a cache of its own, in which positions count from 0, with frames of the one before.

    Args:
        sample: Samples one rollout from its noise, the position of its first frame in the video, and the
            frames that it is given; yields those unchanged first.
        noise: Initial noise of the whole video.
        rollout: Most frames of a rollout, those given included.
        continued: From the new latents of a rollout to the frames that the next one is given.
        given: Conditioning frames of the first rollout.
    """
    done, known = 0, 0
    while done < noise.shape[1]:
        first, stop = done - known, min(done - known + rollout, noise.shape[1])
        finished, position = [], first
        for chunk in sample(noise[:, first:stop], first, given):
            position += chunk.shape[1]
            if position > done:  # the frames given by the previous rollout are part of that one
                finished.append(chunk)
                yield chunk
        done = stop
        if done < noise.shape[1]:
            given = continued(torch.cat(finished, dim=1))
            known = given.shape[1]
