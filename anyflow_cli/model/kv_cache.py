"""Key-value cache of finished chunks: a causal model encodes its past once per chunk, not once per step.

Keys are stored after rotation, at ``t = r = 0``, in buffers that are allocated once, for the largest number
of tokens that the partition ever needs: compressed chunks first, then those kept in full. When a chunk leaves
the window of full chunks, it is encoded again, compressed, and so are the chunks still in the window, because
they had attended to it in full. The result equals encoding the whole past anew, as the paper does, at a cost
that does not grow with the past: compressed chunks attend to compressed chunks only and never change.

The first chunks can stay in full (``CausalConfig.sink_chunks``). A model that does not compress drops the
others that leave the window; keys stay as they were computed, under absolute positions.

Legend: B batch (guidance halves included), F latent frames, C channels, H W latent height and width, L
tokens, E heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.causal import causal_layout, causal_of, chunks_of
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.layout import Layout, Segment
from anyflow_cli.model.network import FlowMapTransformer


@dataclass(frozen=True)
class _CacheState:
    """Chunks ``[0, sink)`` and ``[border, done)`` are cached in full, ``[first, border)`` compressed."""

    sink: int
    first: int
    border: int
    done: int

    @property
    def cached(self) -> list[int]:
        """Cached chunks, in order."""
        return [*range(self.sink), *range(self.first, self.done)]

    def is_compressed(self, i: int) -> bool:
        """Whether chunk ``i`` is cached compressed."""
        return self.first <= i < self.border


class KeyCache:
    """Keys and values of the finished chunks of a video, appended in order.

    Create it under the autocast context in which it will be used: that decides the type of its buffers.

    Args:
        network: The causal network.
        partition: Latent frames per chunk.
        size: Latent height and width.
        batch: Number of samples, guidance halves included.
        remember: Cache at most this many compressed chunks and drop the oldest first; None keeps all.
        in_place: With False each ``append`` allocates new buffers, so that a graph built over an earlier
            state, whose forward is recomputed later, still finds that state.
        device: Device of the buffers; None: that of the network, which may be in host memory when idle.
    """

    def __init__(
        self,
        network: FlowMapTransformer,
        partition: Sequence[int],
        size: tuple[int, int],
        batch: int,
        *,
        remember: int | None = None,
        in_place: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self.chunks = chunks_of(partition)
        self._config, self._size, self._in_place = network.config, size, in_place
        self._parts = 1 if network.context is None else network.context.size
        causal = causal_of(network.config)
        self._before = causal.full_chunks - 1  # full chunks before the one being sampled
        # An appended chunk attends to its window before the oldest chunk leaves: compressed, or at the next.
        self._full = self._before if causal.compresses else causal.full_chunks
        self._compresses, self._sink = causal.compresses, causal.sink_chunks
        self._remember = remember if causal.compresses else 0
        self._state = _CacheState(0, 0, 0, 0)
        self._window: list[Tensor] = []  # latents of the chunks cached in full
        states = [self._state_after(done) for done in range(len(self.chunks))]
        # The chunk being sampled is written behind those it attends to: they are then one range.
        large = self._tokens(compressed=False)
        tokens = max(self._offset(s.done, s) + self.chunks[s.done].frames * large for s in states)
        self._memory = allocate_keys(network, batch, tokens, device or network.device)

    @property
    def bytes(self) -> int:
        """Size of all keys and values in bytes."""
        return sum(part.nbytes for layer in self._memory.layers for part in layer)

    @property
    def done(self) -> int:
        """Number of chunks appended so far."""
        return self._state.done

    def next_velocity(self, model: Conditioned) -> Conditioned:
        """Velocity of the next chunk, which attends to everything in the cache that is in its window."""
        past, state = self._segments(()), self._state
        chunk, oldest = self.chunks[self.done], self.done - self._before
        seen = [n for n, i in enumerate(state.cached) if i < max(state.sink, state.border) or i >= oldest]
        offset = self._offset(self.done, state)
        segment = Segment(chunk.first, chunk.frames, (*seen, len(past)), cache_offset=offset)
        return model.with_layout(self._layout([*past, segment]), self._memory)

    @torch.no_grad()
    def append(self, x: Tensor, model: Conditioned) -> None:
        """Encode the next chunk, finished as x (B, F, C, H, W), under its condition.

        The last chunk of a video is never appended: no later chunk attends to it.
        """
        assert self.done + 1 < len(self.chunks), "the last chunk is not cached"
        before, after = self._state, self._state_after(self.done + 1)
        latents = dict(zip(range(before.border, after.done), [*self._window, x.detach()], strict=True))
        leaving = range(max(before.border, after.first, after.sink), after.border)
        reencodes = self._compresses and max(before.border, after.sink) < after.border
        inputs = [*leaving, *range(after.border if reencodes else before.done, after.done)]
        if not self._in_place:
            self._memory = LayerKeys(
                tuple(tuple(part.clone() for part in layer) for layer in self._memory.layers)
            )
        self._move([i for i in after.cached if i not in inputs], after)
        self._state = after
        self._window = [latents[i] for i in range(after.border, after.done)]
        if inputs:
            self._encode(inputs, torch.cat([latents[i] for i in inputs], dim=1), model)

    @torch.no_grad()
    def prefill(self, x: Tensor, model: Conditioned) -> None:
        """Encode the first chunks, x (B, F, C, H, W), in one pass into an empty cache."""
        assert self.done == 0, "only an empty cache can be prefilled"
        assert self._compresses, "dropped chunks had been attended to by those that stay"
        ends = [0, *(chunk.slice.stop for chunk in self.chunks)]
        state = self._state = self._state_after(ends.index(x.shape[1]))
        self._window = [x[:, chunk.slice].detach() for chunk in self.chunks[state.border : state.done]]
        if state.done:
            latents = torch.cat([x[:, self.chunks[i].slice] for i in state.cached], dim=1)
            self._encode(state.cached, latents, model)

    def _encode(self, inputs: Sequence[int], z: Tensor, model: Conditioned) -> None:
        """Encode the chunks ``inputs``, z (B, F, C, H, W); blocks.py writes their keys and values."""
        zero = z.new_zeros(len(z))
        model.with_layout(self._layout(self._segments(inputs)), self._memory)(z, zero, zero)

    def _state_after(self, done: int) -> _CacheState:
        """State of the cache once ``done`` chunks are finished."""
        sink = min(self._sink, done)
        border = max(done - self._full, sink)
        first = sink if self._remember is None else max(border - self._remember, sink)
        return _CacheState(sink, first, border, done)

    def _segments(self, inputs: Sequence[int]) -> list[Segment]:
        """One segment per chunk, attending to itself and those before it; all but ``inputs`` are cached."""
        state = self._state
        return [
            Segment(
                first=self.chunks[i].first,
                frames=self.chunks[i].frames,
                attends_to=tuple(range(position + 1)),
                patch="compressed" if state.is_compressed(i) else "full",
                is_output=False,
                cached=i not in inputs,
                cache_offset=self._offset(i, state),
            )
            for position, i in enumerate(state.cached)
        ]

    def _offset(self, i: int, state: _CacheState) -> int:
        """Token at which the keys of chunk ``i`` start: compressed chunks in order, then those in full."""
        small = self._tokens(compressed=True)
        if state.is_compressed(i):
            return self._frames(state.first, i) * small
        before = self._frames(0, i) if i < state.sink else self._frames(0, state.sink)
        before += self._frames(state.border, max(i, state.border))
        compressed = self._frames(state.first, state.border) * small
        return compressed + before * self._tokens(compressed=False)

    def _move(self, kept: Sequence[int], after: _CacheState) -> None:
        """Shift cached chunks to the places they have in the next state, over what is dropped.

        Those that move right begin with the last one, so that none overwrites another.
        """
        places = [(i, self._offset(i, self._state), self._offset(i, after)) for i in kept]
        left = [place for place in places if place[2] < place[1]]
        right = [place for place in places if place[2] > place[1]]
        for i, old, new in (*left, *reversed(right)):
            count = self.chunks[i].frames * self._tokens(compressed=after.is_compressed(i))
            for stored in (part for layer in self._memory.layers for part in layer):
                stored[..., new : new + count, :, :] = stored[..., old : old + count, :, :].clone()

    def _frames(self, start: int, stop: int) -> int:
        """Latent frames of the chunks ``[start, stop)``."""
        return sum(chunk.frames for chunk in self.chunks[start:stop])

    def _tokens(self, *, compressed: bool) -> int:
        """Tokens per frame, of each process that shares the video."""
        patch = causal_of(self._config).compressed_patch if compressed else self._config.patch
        return -(-(self._size[0] // patch[0]) * (self._size[1] // patch[1]) // self._parts)

    def _layout(self, segments: Sequence[Segment]) -> Layout:
        return causal_layout(self._config, segments, *self._size)


def allocate_keys(network: FlowMapTransformer, batch: int, tokens: int, device: torch.device) -> LayerKeys:
    """Uninitialized keys and values for each block: (B, L, E, d), or (B, N, L, e, d) of a context group."""
    config, context = network.config, network.context
    shape: tuple[int, ...] = (batch, tokens, config.heads, config.head_dim)
    if context is not None:
        shape = (batch, context.size, tokens, config.heads // context.head_parts, config.head_dim)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=network.compute_dtype, device=device)

    return LayerKeys(tuple((empty(), empty()) for _ in range(config.layers)))
