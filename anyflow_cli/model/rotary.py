"""Rotary positions of a layout's tokens, and their application to queries and keys.

A head's channels are interleaved pairs; the first pairs turn with the frame, the next with the row, the last
with the column. Tables are real (cosine and sine, fp32, from fp64 angles) and computed once per layout. A
compressed token covers several patches: its rotation is the mean of theirs, normalized to unit length.

Legend: B batch, L tokens, E heads, d channels per head.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from anyflow_cli.model.context_parallel import own_tokens
from anyflow_cli.model.layout import Layout, Segment

THETA = 10000.0


@lru_cache(maxsize=32)
def rotation(layout: Layout, head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine of every input token's angles, (L, 1, d / 2, 2) fp32, cached per layout."""
    # The cached tables are saved for later backward passes, which inference tensors cannot be.
    with torch.inference_mode(False), torch.no_grad():
        parts = [
            own_tokens(_segment_turns(layout, segment, head_dim).unsqueeze(0), segment.frames, layout)
            for segment in layout.inputs
        ]
        turns = torch.cat(parts, dim=1)[0]
        return torch.view_as_real(turns).float().unsqueeze(1).to(device)


def _segment_turns(layout: Layout, segment: Segment, head_dim: int) -> Tensor:
    """Rotations of a segment's tokens as unit complex numbers, (L, d / 2) complex128."""
    down, across = layout.grid_of(segment)
    cover = [n // full for n, full in zip(layout.patch_of(segment), layout.patch, strict=True)]
    spatial = 2 * (head_dim // 6)
    parts = (
        _axis(segment.first, segment.frames, 1, head_dim - 2 * spatial)[:, None, None],
        _axis(0, down, cover[0], spatial)[None, :, None],
        _axis(0, across, cover[1], spatial)[None, None, :],
    )
    grid = (segment.frames, down, across)
    return torch.cat([part.expand(*grid, part.shape[-1]) for part in parts], dim=-1).flatten(0, 2)


def _axis(first: int, count: int, cover: int, channels: int) -> Tensor:
    """Rotations along an axis, each the mean of ``cover`` positions, (count, channels / 2)."""
    speeds = THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64, device="cpu") / channels)
    positions = torch.arange(first * cover, (first + count) * cover, dtype=torch.float64, device="cpu")
    angles = torch.outer(positions, speeds)
    turns = torch.polar(torch.ones_like(angles), angles)
    mean = turns.reshape(count, cover, -1).mean(1)
    return mean / mean.abs()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate the channel pairs of x (B, L, E, d) by ``turns`` (L, 1, d / 2, 2), fp32."""
    pairs: Tensor = torch.unflatten(x, -1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # The same four fp32 products as below; only torch's complex kernel is vectorized over interleaved
        # pairs on a CPU (8 times faster than strided halves).
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns)).flatten(-2)
    (first, second), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
