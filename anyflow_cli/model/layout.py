"""Token layouts: which frames become which tokens, at which positions, attending to which others.

A layout is data. The network receives latents ``(B, F, C, H, W)`` and cuts them, frame after frame, into the
layout's segments; patch embedding, rotary positions, modulation, attention groups and the output follow from
the segments. Times come with the frames (``t``, ``r`` of shape ``(B, F)``), so clean context is a segment
whose frames have ``t = r = 0``: teacher forcing, cache writing and a sampling step differ in their segments,
not in the network. A ``cached`` segment takes part with keys and values of an earlier pass. ``causal`` and
``kv_cache`` build such layouts.

Legend: B batch, F latent frames, C channels, H W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Literal

from anyflow_cli.errors import UsageError

Patch = Literal["full", "compressed"]


@dataclass(frozen=True)
class Segment:
    """Consecutive latent frames with one patch size and one view.

    Attributes:
        first: Position of its first frame in the video; rotary positions are absolute.
        frames: Number of latent frames.
        attends_to: Indices of the segments that its queries attend to, ascending.
        patch: Patch size.
        is_output: Whether its velocity is part of the output.
        cached: Whether its keys are in the cache already; then it is not an input.
        cache_offset: Token of the cache at which its keys start: read there if ``cached``, else written
            there.
    """

    first: int
    frames: int
    attends_to: tuple[int, ...]
    patch: Patch = "full"
    is_output: bool = True
    cached: bool = False
    cache_offset: int | None = None


@dataclass(frozen=True)
class Span:
    """A run of frames with equally many tokens each, as ranges of frames and of tokens."""

    frames: slice
    tokens: slice

    @property
    def frame_count(self) -> int:
        """Number of latent frames."""
        return int(self.frames.stop - self.frames.start)


@dataclass(frozen=True)
class Group:
    """Queries of one token range and the ranges they attend to, of the input and of the cache.

    ``in_cache`` is the range of the cache that holds all of these once the input's keys are written; None
    where they are not next to each other.
    """

    queries: slice
    keys: tuple[slice, ...]
    cached: tuple[slice, ...] = ()
    in_cache: slice | None = None


@dataclass(frozen=True)
class KeyWrite:
    """Range of input tokens and the range of the cache that their keys are written to."""

    tokens: slice
    cache: slice


@dataclass(frozen=True)
class Layout:
    """Segments in token order, over latent frames of ``height`` x ``width``.

    With ``parts`` > 1 it is the layout of one process: its tokens are the ``part``-th of so many equal parts
    of every frame's, padded where the number does not divide (``context_parallel``).
    """

    segments: tuple[Segment, ...]
    height: int
    width: int
    patch: tuple[int, int] = (2, 2)
    compressed_patch: tuple[int, int] = (4, 4)
    parts: int = 1
    part: int = 0

    def __post_init__(self) -> None:
        for segment in self.segments:
            high, wide = self.patch_of(segment)
            if self.height % high or self.width % wide:
                raise UsageError(
                    f"Latent frames of {self.height}x{self.width} do not divide into {high}x{wide} patches.",
                    "Choose a height and width that are multiples of the VAE's factor times the patch size.",
                )

    def patch_of(self, segment: Segment) -> tuple[int, int]:
        """Patch height and width of a segment."""
        return self.patch if segment.patch == "full" else self.compressed_patch

    def grid_of(self, segment: Segment) -> tuple[int, int]:
        """Patches down and across one frame of a segment."""
        high, wide = self.patch_of(segment)
        return self.height // high, self.width // wide

    def tokens_of(self, segment: Segment) -> int:
        """Number of tokens of a segment, in this part."""
        down, across = self.grid_of(segment)
        return segment.frames * -(-down * across // self.parts)

    @cached_property
    def inputs(self) -> tuple[Segment, ...]:
        """Segments that are not cached."""
        return tuple(segment for segment in self.segments if not segment.cached)

    @cached_property
    def frames(self) -> int:
        """Latent frames of all inputs."""
        return sum(segment.frames for segment in self.inputs)

    @cached_property
    def tokens(self) -> int:
        """Tokens of the input, over all its segments."""
        return sum(map(self.tokens_of, self.inputs))

    @cached_property
    def pairs(self) -> int:
        """Pairs of query and key in one self-attention, of this part's queries or its share of the heads."""
        return self.parts * sum(
            _length(group.queries) * sum(map(_length, group.keys + group.cached)) for group in self.groups
        )

    @cached_property
    def cache_tokens(self) -> int:
        """Tokens of the cache up to the last that is read or written."""
        read = [tokens for group in self.groups for tokens in group.cached]
        return max((int(one.stop) for one in (*read, *(write.cache for write in self.writes))), default=0)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Span of each input."""
        spans, frame, token = [], 0, 0
        for segment in self.inputs:
            stop = token + self.tokens_of(segment)
            spans.append(Span(slice(frame, frame + segment.frames), slice(token, stop)))
            frame, token = frame + segment.frames, stop
        return tuple(spans)

    @cached_property
    def even_spans(self) -> tuple[Span, ...]:
        """Spans of the inputs, neighbors with equally many tokens per frame merged."""
        merged: list[Span] = []
        for i, span in enumerate(self.spans):
            if i and self.inputs[i].patch == self.inputs[i - 1].patch:
                span = Span(_joined(merged[-1].frames, span.frames), _joined(merged[-1].tokens, span.tokens))
                merged.pop()
            merged.append(span)
        return tuple(merged)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Attention groups; neighbors that attend to the same keys share a call."""
        groups: list[Group] = []
        for segment, span in zip(self.inputs, self.spans, strict=True):
            group = Group(span.tokens, *self._keys(segment.attends_to))
            if groups and (groups[-1].keys, groups[-1].cached) == (group.keys, group.cached):
                group = replace(group, queries=_joined(groups.pop().queries, group.queries))
            groups.append(group)
        return tuple(replace(group, in_cache=self._in_cache(group)) for group in groups)

    @cached_property
    def writes(self) -> tuple[KeyWrite, ...]:
        """Ranges that are written to the cache."""
        return tuple(
            KeyWrite(span.tokens, self._cached(segment))
            for segment, span in zip(self.inputs, self.spans, strict=True)
            if segment.cache_offset is not None
        )

    def _keys(self, attends_to: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Ranges of the input and of the cache that segments occupy."""
        own = dict(zip((i for i, s in enumerate(self.segments) if not s.cached), self.spans, strict=True))
        seen = [own[i].tokens for i in attends_to if i in own]
        cached = [self._cached(self.segments[i]) for i in attends_to if i not in own]
        return _merged(seen), _merged(cached)

    def _in_cache(self, group: Group) -> slice | None:
        """The range of the cache with all keys of a group, in the order in which they would be gathered."""
        own = [
            write.cache
            for tokens in group.keys
            for write in self.writes
            if tokens.start <= write.tokens.start and write.tokens.stop <= tokens.stop
        ]
        if not group.cached or sum(map(_length, own)) != sum(map(_length, group.keys)):
            return None
        ranges = _merged([*group.cached, *own])
        return ranges[0] if len(ranges) == 1 else None

    def _cached(self, segment: Segment) -> slice:
        assert segment.cache_offset is not None, "a cached segment needs a cache_offset"
        return slice(segment.cache_offset, segment.cache_offset + self.tokens_of(segment))


def _merged(ranges: Iterable[slice]) -> tuple[slice, ...]:
    """Ranges with neighbors that touch merged."""
    merged: list[slice] = []
    for tokens in ranges:
        touches = merged and merged[-1].stop == tokens.start
        merged.append(_joined(merged.pop(), tokens) if touches else tokens)
    return tuple(merged)


def _length(tokens: slice) -> int:
    return int(tokens.stop - tokens.start)


def _joined(first: slice, second: slice) -> slice:
    return slice(first.start, second.stop)


@lru_cache(maxsize=32)
def bidirectional(frames: int, height: int, width: int, patch: tuple[int, int] = (2, 2)) -> Layout:
    """The whole video in one segment that attends to itself."""
    return Layout((Segment(0, frames, (0,)),), height, width, patch)
