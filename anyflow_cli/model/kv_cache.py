"""Keys and values of finished chunks, so that a causal model encodes its past once a chunk, not once a step.

Legend: B batch (guidance halves included), F latent frames, C channels, H W latent height and width, L
tokens, E heads, d channels of a head.

Keys are stored rotated, at ``t = r = 0``, in memory that is allocated once, for exactly the tokens that a
partition ever needs: first the compressed chunks, then those in full. When a chunk leaves the window it is
encoded again, compressed. Under ``exact`` what stays in the window is encoded again too, since it had seen
that chunk in full. The result is that of encoding the whole past anew, as the paper does, at a cost that does
not grow with the past: compressed chunks see compressed ones alone and never change. ``incremental`` leaves
the window as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.causal import causal_layout, causal_of, chunks_of
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.layout import Layout, Segment
from anyflow_cli.model.network import FlowMapTransformer

Policy = Literal["exact", "incremental"]


@dataclass(frozen=True)
class _Kept:
    """Chunks ``[first, border)`` are kept compressed, ``[border, done)`` in full."""

    first: int
    border: int
    done: int


class KeyCache:
    """The finished chunks of a video of ``partition``, in the order in which they are added.

    ``size``: latent height and width. ``remember``: keep at most so many compressed chunks and forget the
    oldest first (None: keep all). ``in_place=False``: each addition makes memory of its own, so that a graph
    which was made over an earlier state, and recomputes its forward later, still finds that state. Make a
    cache under the autocast that it will be used in.
    """

    def __init__(
        self,
        network: FlowMapTransformer,
        partition: Sequence[int],
        size: tuple[int, int],
        batch: int,
        *,
        policy: Policy = "exact",
        remember: int | None = None,
        in_place: bool = True,
    ) -> None:
        self.policy = policy
        self.chunks = chunks_of(partition)
        self._config, self._size, self._in_place = network.config, size, in_place
        self._full = causal_of(network.config).full_chunks - 1  # the chunk in the making is the last one
        self._remember = remember
        self._kept = _Kept(0, 0, 0)
        self._window: list[Tensor] = []  # latents of the chunks kept in full
        self._compressed_tokens = self._capacity_compressed()
        self._memory = self._allocated(network, batch)

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(part.nbytes for layer in self._memory.layers for part in layer)

    @property
    def done(self) -> int:
        """Number of chunks added."""
        return self._kept.done

    def next(self, model: Conditioned) -> Conditioned:
        """Velocity of the next chunk, which sees all that is kept."""
        past = self._segments(())
        chunk = self.chunks[self.done]
        segment = Segment(chunk.first, chunk.frames, tuple(range(len(past) + 1)))
        return model.over(self._layout([*past, segment]), self._memory)

    @torch.no_grad()
    def add(self, x: Tensor, model: Conditioned) -> None:
        """Keep the next chunk, now finished, as x (B, F, C, H, W), under its condition.

        The last chunk of a video has no place: nothing comes after it.
        """
        assert self.done + 1 < len(self.chunks), "the last chunk is not kept"
        before, after = self._kept, self._after(self.done + 1)
        leaving = range(before.border, after.border)
        again = leaving and self.policy == "exact"
        fresh = range(after.border if again else max(after.border, before.done), after.done)
        if not self._in_place:
            self._memory = LayerKeys(
                tuple((key.clone(), value.clone()) for key, value in self._memory.layers)
            )
        self._move(after, range(after.first, before.border), range(after.border, fresh.start))
        self._kept = after
        known = dict(zip(range(before.border, after.done), [*self._window, x.detach()], strict=True))
        self._window = [known[i] for i in range(after.border, after.done)]
        inputs = [i for i in (*leaving, *fresh) if i >= after.first]
        if inputs:
            self._encode(inputs, torch.cat([known[i] for i in inputs], dim=1), model)

    @torch.no_grad()
    def fill(self, x: Tensor, model: Conditioned) -> None:
        """Keep the first chunks, x (B, F, C, H, W), encoded in one pass: ``exact``, for an empty cache."""
        assert self.done == 0, "only an empty cache is filled"
        ends = [0, *(chunk.slice.stop for chunk in self.chunks)]
        kept = self._kept = self._after(ends.index(x.shape[1]))
        self._window = [x[:, chunk.slice].detach() for chunk in self.chunks[kept.border : kept.done]]
        if kept.done:
            self._encode(range(kept.first, kept.done), x[:, ends[kept.first] :], model)

    def _encode(self, inputs: Sequence[int], z: Tensor, model: Conditioned) -> None:
        """Compute the keys of these chunks over those of all others."""
        zero = z.new_zeros(len(z))
        model.over(self._layout(self._segments(inputs)), self._memory)(z, zero, zero)

    def _after(self, done: int) -> _Kept:
        """What is kept of ``done`` chunks."""
        border = max(done - self._full, 0)
        return _Kept(0 if self._remember is None else max(border - self._remember, 0), border, done)

    def _segments(self, inputs: Sequence[int]) -> list[Segment]:
        """All chunks that are kept, cached but for ``inputs``; each sees those before it and itself."""
        kept = self._kept
        segments = []
        for i in range(kept.first, kept.done):
            chunk, view = self.chunks[i], tuple(range(i - kept.first + 1))
            segments.append(
                Segment(
                    chunk.first,
                    chunk.frames,
                    view,
                    "compressed" if i < kept.border else "full",
                    read=False,
                    cached=i not in inputs,
                    place=self._place(i, kept),
                )
            )
        return segments

    def _place(self, i: int, kept: _Kept) -> int:
        """Where the keys of chunk ``i`` start: compressed ones in order, then those in full."""
        if i < kept.border:
            return self._frames(kept.first, i) * self._tokens(compressed=True)
        return self._compressed_tokens + self._frames(kept.border, i) * self._tokens(compressed=False)

    def _move(self, after: _Kept, compressed: range, full: range) -> None:
        """Bring what stays as it is to its place, before anything is written."""
        for chunks, small in ((compressed, True), (full, False)):
            old, new = ([self._place(i, kept) for i in chunks[:1]] for kept in (self._kept, after))
            if old != new:
                count = self._frames(chunks.start, chunks.stop) * self._tokens(compressed=small)
                for stored in (part for layer in self._memory.layers for part in layer):
                    stored[:, new[0] : new[0] + count] = stored[:, old[0] : old[0] + count].clone()

    def _frames(self, start: int, stop: int) -> int:
        return sum(chunk.frames for chunk in self.chunks[start:stop])

    def _tokens(self, *, compressed: bool) -> int:
        """Tokens of a frame."""
        patch = causal_of(self._config).compressed_patch if compressed else self._config.patch
        return (self._size[0] // patch[0]) * (self._size[1] // patch[1])

    def _capacity_compressed(self) -> int:
        states = [self._after(done) for done in range(len(self.chunks))]
        return max(self._frames(kept.first, kept.border) for kept in states) * self._tokens(compressed=True)

    def _allocated(self, network: FlowMapTransformer, batch: int) -> LayerKeys:
        states = [self._after(done) for done in range(len(self.chunks))]
        full = max(self._frames(kept.border, kept.done) for kept in states) * self._tokens(compressed=False)
        config = network.config
        shape = (batch, self._compressed_tokens + full, config.heads, config.head_dim)

        def empty() -> Tensor:
            return torch.empty(shape, dtype=network.compute_dtype, device=network.device)

        return LayerKeys(tuple((empty(), empty()) for _ in range(config.layers)))

    def _layout(self, segments: Sequence[Segment]) -> Layout:
        return causal_layout(self._config, segments, *self._size)
