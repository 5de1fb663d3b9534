"""The causal (FAR) model: chunks, the layout of teacher forcing, and how a bidirectional network becomes one.

Legend: B batch, F latent frames, C channels, H W latent height and width.

Frames fall into chunks. The last ``full_chunks`` of them are seen in full, earlier ones compressed. In
training all chunks pass at once, ``[compressed context | noisy chunks | the same chunks clean]``, less the
clean copy of the last, which nothing would see; in sampling the clean past is in the cache (``cache.py``).
Which chunk sees what is stated here alone, for both: a compressed chunk sees the compressed ones up to
itself, a clean one all context and the clean ones up to itself, a noisy one all context, the clean ones
before it and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.layout import Layout, Segment
from anyflow_cli.model.network import FlowMapTransformer, on_meta

FAR = "far_patch_embedding"


@dataclass(frozen=True)
class Chunk:
    """Consecutive latent frames that are denoised together."""

    first: int
    frames: int

    @property
    def slice(self) -> slice:
        """Its frames in the video."""
        return slice(self.first, self.first + self.frames)


def chunks_of(partition: Sequence[int]) -> tuple[Chunk, ...]:
    """The chunks of a partition, in order."""
    return tuple(Chunk(sum(partition[:i]), frames) for i, frames in enumerate(partition))


def partition_for(causal: CausalConfig, frames: int) -> tuple[int, ...]:
    """How ``frames`` latent frames fall into chunks.

    As the model was trained, where that is its length; otherwise its first chunk, then chunks of its largest
    size, the last one cut.
    """
    if sum(causal.partition) == frames:
        return causal.partition
    head, size = min(causal.partition[0], frames), max(causal.partition)
    whole, rest = divmod(frames - head, size)
    return (head, *[size] * whole, *[rest] * (rest > 0))


def remembered_for(causal: CausalConfig, frames: int) -> int | None:
    """How many compressed chunks to keep for a video of ``frames`` latent frames (None: all).

    Up to the trained length all of them. Beyond it as many as the model ever saw at once, so that memory does
    not grow with the video and the network sees no distance that it does not know.
    """
    if frames <= sum(causal.partition):
        return None
    return max(len(causal.partition) - causal.full_chunks, 0)


def split_after(partition: Sequence[int], given: int) -> tuple[int, ...]:
    """The partition with a border after ``given`` frames.

    The rest of a chunk that is given in part becomes a chunk of its own, which sees the given frames as clean
    past: like every chunk in training, and at any number of steps. Noising the given frames along with the
    others would show them to the network too late: in one step, not at all.
    """
    chunks: list[int] = []
    for chunk in chunks_of(partition):
        before = given - chunk.first
        chunks += [before, chunk.frames - before] if 0 < before < chunk.frames else [chunk.frames]
    return tuple(chunks)


def check_partition(partition: Sequence[int], frames: int) -> None:
    """Refuse chunks that are not the video's."""
    if sum(partition) != frames or min(partition, default=0) < 1:
        shown = ", ".join(str(n) for n in partition)
        raise UsageError(
            f"Chunks of {shown} latent frames do not make up a video of {frames}.",
            f"Give chunks of at least one frame each that sum to {frames}.",
        )


def causal_layout(config: NetworkConfig, segments: Sequence[Segment], height: int, width: int) -> Layout:
    """Segments over latent frames of ``height x width`` in the patches of a causal network."""
    return Layout(tuple(segments), height, width, config.patch, causal_of(config).compressed_patch)


def causal_of(config: NetworkConfig) -> CausalConfig:
    """What the network's being causal consists of."""
    assert config.causal is not None, "the network is not causal"
    return config.causal


@lru_cache(maxsize=64)
def teacher_forcing(
    config: NetworkConfig,
    partition: tuple[int, ...],
    height: int,
    width: int,
    noisy: int | None = None,
    clean: bool = True,
) -> Layout:
    """All chunks in one pass: ``[compressed context | noisy chunks | the same chunks clean]``.

    The last ``noisy`` chunks of the window are noisy, their velocity is read; None: all, else those before
    them are given, as clean copies alone. Without ``clean`` there are no copies, and a noisy chunk sees the
    noisy ones before it.
    """
    chunks = chunks_of(partition)
    split = max(len(chunks) - causal_of(config).full_chunks, 0)
    past, window = chunks[:split], chunks[split:]
    given = 0 if noisy is None else len(window) - noisy
    assert given == 0 or clean, "without clean copies nothing can be given"
    context = tuple(range(split))
    asked = tuple(range(split, len(chunks) - given))
    copies = tuple(asked[-1] + 1 + i for i in range(len(window) - 1)) if clean else asked
    segments = [
        Segment(chunk.first, chunk.frames, context[: i + 1], "compressed", is_output=False)
        for i, chunk in enumerate(past)
    ]
    segments += [
        Segment(chunk.first, chunk.frames, tuple(sorted((*context, asked[i], *copies[: given + i]))))
        for i, chunk in enumerate(window[given:])
    ]
    if clean:
        segments += [
            Segment(chunk.first, chunk.frames, (*context, *copies[: i + 1]), is_output=False)
            for i, chunk in enumerate(window[:-1])
        ]
    return causal_layout(config, segments, height, width)


class TeacherForced:
    """Velocity of the noisy chunks, given the clean video ``x`` (B, F, C, H, W) that they come from.

    A ``Velocity`` of the frames ``window``: z (B, F', C, H, W) are the last ``noisy`` chunks, None: as many
    as are in full. Context and clean copies pass at ``t = r = 0``.
    """

    def __init__(
        self, model: Conditioned, x: Tensor, partition: tuple[int, ...], noisy: int | None = None
    ) -> None:
        check_partition(partition, x.shape[1])
        config, (height, width) = model.network.config, x.shape[-2:]
        full = causal_of(config).full_chunks
        self.layout = teacher_forcing(config, partition, height, width, noisy)
        self.window = slice(sum(partition[: -(noisy or full)]), None)
        self._copies = slice(sum(partition[:-full]), sum(partition[:-1]))
        self._model = model.with_layout(self.layout)
        self._x = x

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Velocity (B, F', C, H, W) of the window at ``t``, ``r``, (B,) or (B, F')."""
        context, copies = self._x[:, : self._copies.start], self._x[:, self._copies]
        tokens = torch.cat((context, z, copies), dim=1)
        return self._model(tokens, self._times(t, z), self._times(r, z))

    def select(self, index: Tensor) -> TeacherForced:
        """The conditions of the samples ``index``, repeated or dropped as it says."""
        return self._with(self._model.select(index), self._x[index])

    def concat(self, *others: Velocity) -> TeacherForced:
        """The conditions of several batches, one after another."""
        parts = cast("tuple[TeacherForced, ...]", others)
        model = self._model.concat(*(part._model for part in parts))
        return self._with(model, torch.cat([self._x, *(part._x for part in parts)]))

    def _times(self, t: Tensor, z: Tensor) -> Tensor:
        """Times of the window (B,) or (B, F') as times of all input frames; 0 for what is clean."""
        noisy = t.unsqueeze(1).expand(z.shape[:2]) if t.dim() == 1 else t
        return nnf.pad(noisy, (self._copies.start, self._copies.stop - self._copies.start))

    def _with(self, model: Conditioned, x: Tensor) -> TeacherForced:
        made = object.__new__(TeacherForced)
        made.layout, made.window, made._copies = self.layout, self.window, self._copies
        made._model, made._x = model, x
        return made


def as_causal(network: FlowMapTransformer, causal: CausalConfig) -> FlowMapTransformer:
    """A causal network of these chunks: a causal one with its weights as they are, else ``causal_from``."""
    if network.config.causal is None:
        return causal_from(network, causal)
    there, wanted = network.config.causal.compressed_patch, causal.compressed_patch
    if there != wanted:
        raise UsageError(
            f"The causal model compresses patches of {there[0]}x{there[1]}, not {wanted[0]}x{wanted[1]}.",
            "Set model.causal.compressed_patch to the model's own.",
        )
    network.config = replace(network.config, causal=causal)
    return network


def causal_from(network: FlowMapTransformer, causal: CausalConfig | None = None) -> FlowMapTransformer:
    """A frozen causal network that starts as ``network`` (two times) and takes over its weights.

    The compressed patch embedding starts as the full one, its kernel enlarged by linear interpolation.
    """
    assert network.config.two_time, "a causal network takes two times: two_time_from first"
    config = replace(network.config, causal=causal or CausalConfig())
    full = network.patch_embedding
    kernel = full.weight.detach().flatten(0, 1).unsqueeze(1)  # (D C, 1, 1, high, wide)
    size = (1, *causal_of(config).compressed_patch)
    larger = nnf.interpolate(kernel.float(), size=size, mode="trilinear", align_corners=False)
    weights = dict(network.state_dict())
    weights[f"{FAR}.weight"] = larger.reshape(*full.weight.shape[:2], *size).to(full.weight.dtype)
    weights[f"{FAR}.bias"] = weights["patch_embedding.bias"].clone()
    made = on_meta(config)
    made.load_state_dict(weights, assign=True)
    return made.requires_grad_(False)
