"""One video on several processes: each has a part of the tokens, and attention exchanges heads and keys.

All processes of a context group hold the whole latents and receive the whole velocity, so samplers, losses
and random numbers are those of a single process. Within the network each has an equal part of every frame's
tokens (``Layout.parts``), whatever the chunks. For self-attention an all-to-all trades tokens for heads
(Ulysses): a process attends with all tokens of its heads, and its key-value cache holds these heads only.
Where the heads do not divide (12 heads on 8 processes), processes that share heads keep their own queries and
gather each other's keys and values. That is the exchange of ring attention, made at once instead of in turns:
its memory is that of the all-to-all among fewer processes, it is exact with any kernel, and a cache and a
gradient need nothing more.

Gradients: a loss is computed by every process of a group, and the exchanges add up what the group sends back.
So a weight's gradient is the group's size times this process's share, and the mean over all processes, which
DDP and FSDP2 take, is that of a single process.

Legend: B batch, F latent frames, L tokens of this process, D width, E heads, d channels per head, N processes
per video, U parts of the heads, e = E / U.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh

from anyflow_cli.model.layout import Layout, Segment


@dataclass(frozen=True)
class ContextGroup:
    """This process among the N that share a video.

    Attributes:
        size: N.
        rank: This process, from 0.
        head_parts: U, the parts into which the heads are split; N / U processes have the same heads.
        everyone: The N processes; None exchanges nothing, to compute costs on fake tensors.
        heads: U processes with different heads.
        keys: N / U processes with the same heads.
    """

    size: int
    rank: int
    head_parts: int
    everyone: ProcessGroup | None = None
    heads: ProcessGroup | None = None
    keys: ProcessGroup | None = None

    def split_heads(self, x: Tensor) -> Tensor:
        """Trade this process's tokens (B, L, E, d) for its heads of U processes' tokens (B, U, L, e, d)."""
        parts: Tensor = torch.unflatten(x, 2, (self.head_parts, -1))
        return _exchange(parts.movedim(2, 0), self.heads).movedim(0, 1)

    def gather_keys(self, x: Tensor) -> Tensor:
        """From keys or values (B, U, L, e, d) to those of all N processes, (B, N, L, e, d)."""
        copies = self.size // self.head_parts
        if copies == 1:
            return x
        return _exchange(x.expand(copies, *x.shape), self.keys).movedim(0, 1).flatten(1, 2)

    def join_heads(self, x: Tensor) -> Tensor:
        """From all tokens of some heads (B, U, L, e, d) to this process's tokens (B, L, E, d)."""
        return _exchange(x.movedim(1, 0), self.heads).movedim(0, 2).flatten(2, 3)

    def replicated(self, z: Tensor) -> Tensor:
        """Latents that all processes hold; their gradient is the mean of the processes' gradients."""
        if self.everyone is None or not z.requires_grad:
            return z
        out: Tensor = _MeanOfGradients.apply(z, self)  # type: ignore[no-untyped-call]
        return out

    def gather_tokens(self, x: Tensor, frames: int, tokens: int) -> Tensor:
        """Join the parts of every frame's ``tokens``: (B, F L', D) of each process to (B, F tokens, D)."""
        parts = _exchange(x.expand(self.size, *x.shape), self.everyone)
        per_frame = torch.unflatten(parts, 2, (frames, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        return per_frame[:, :, :tokens].flatten(1, 2)


class _MeanOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total: Tensor = collectives.all_reduce(gradient.contiguous(), "sum", ctx.group.everyone)
        return total / ctx.group.size, None


def _exchange(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Send x[i] to process i of the group, and receive one part from each, in order."""
    x = x.contiguous()
    if group is None:
        return x
    out: Tensor = collectives.all_to_all_single_autograd(x, [1] * len(x), [1] * len(x), group)
    return out


def context_groups(size: int, heads: Sequence[int], kind: str) -> dict[int, ContextGroup]:
    """The groups of this process, by the number of heads of a network; all processes call this together.

    Consecutive processes share a video.

    Args:
        size: N, which divides the number of processes.
        heads: Heads of each network.
        kind: Type of the devices.
    """
    ranks = torch.distributed.get_world_size()
    everyone = init_device_mesh(kind, (ranks // size, size), mesh_dim_names=("data", "context"))
    found: dict[int, ContextGroup] = {}
    by_parts: dict[int, ContextGroup] = {}
    for count in heads:
        parts = math.gcd(count, size)
        if parts not in by_parts:
            shape = (ranks // size, size // parts, parts)
            mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "keys", "heads"))
            by_parts[parts] = ContextGroup(
                size,
                everyone.get_local_rank("context"),
                parts,
                everyone.get_group("context"),
                mesh.get_group("heads") if parts > 1 else None,
                mesh.get_group("keys") if parts < size else None,
            )
        found[count] = by_parts[parts]
    return found


@lru_cache(maxsize=64)
def shared_layout(layout: Layout, parts: int, part: int) -> Layout:
    """The layout of one process's tokens, where each frame's are split into ``parts``."""
    return replace(layout, parts=parts, part=part)


def own_tokens(x: Tensor, frames: int, layout: Layout) -> Tensor:
    """This process's part of every frame's tokens, zero-padded: (B, F S, D) to (B, F L', D)."""
    if layout.parts == 1:
        return x
    by_frame: Tensor = torch.unflatten(x, 1, (frames, -1))
    size = -(-by_frame.shape[2] // layout.parts)
    own = by_frame[:, :, layout.part * size : (layout.part + 1) * size]
    return nnf.pad(own, (0, 0, 0, size - own.shape[2])).flatten(1, 2)


@lru_cache(maxsize=64)
def real_keys(layout: Layout, device: torch.device) -> tuple[Tensor | None, ...]:
    """For each attention group, which of its keys (N L') are tokens; None where none is padding."""
    parts = layout.parts

    def real(segments: Sequence[Segment]) -> list[np.ndarray[Any, np.dtype[np.bool_]]]:
        found = []
        for segment in segments:
            down, across = layout.grid_of(segment)
            frame = np.arange(parts * -(-down * across // parts)) < down * across
            found.append(np.tile(frame.reshape(parts, 1, -1), (1, segment.frames, 1)).reshape(parts, -1))
        return found

    own = np.concatenate(real(layout.inputs), axis=1)
    cached = np.zeros((parts, layout.cache_tokens), bool)
    past = [segment for segment in layout.segments if segment.cached]
    for segment, mask in zip(past, real(past), strict=True):
        assert segment.cache_offset is not None
        cached[:, segment.cache_offset : segment.cache_offset + mask.shape[1]] = mask
    indices: list[Tensor | None] = []
    with torch.inference_mode(False):
        for group in layout.groups:
            seen = [cached[:, place] for place in group.cached] + [own[:, tokens] for tokens in group.keys]
            mask = np.concatenate(seen, axis=1).ravel()
            indices.append(None if mask.all() else torch.tensor(mask.nonzero()[0], device=device))
    return tuple(indices)
