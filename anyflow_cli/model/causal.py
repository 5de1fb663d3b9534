"""The causal (FAR) model of Sec. 4.3: chunks, teacher forcing, and the conversion of a bidirectional network.

Frames fall into chunks. The last ``full_chunks`` chunks have full patches, earlier ones compressed patches.
In training all chunks pass at once, ``[compressed context | noisy chunks | the same chunks clean]``, without
the clean copy of the last chunk, which no query attends to; in sampling the clean past is in the cache
(``kv_cache``). Attention is the same in both: a compressed chunk attends to the compressed chunks up to
itself, a clean one to all context and the clean ones up to itself, a noisy one to all context, the clean
chunks before it and itself.

Legend: B batch, F latent frames, C channels, H W latent height and width, N selected samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.experts import one_network
from anyflow_cli.model.layout import Layout, Patch, Segment
from anyflow_cli.model.network import FlowMapTransformer, on_meta

if TYPE_CHECKING:
    from anyflow_cli.recipe import schema

FAR = "far_patch_embedding"


@dataclass(frozen=True)
class Chunk:
    """Consecutive latent frames that are denoised together."""

    first: int
    frames: int

    @property
    def slice(self) -> slice:
        """Range of its frames in the video."""
        return slice(self.first, self.first + self.frames)


def chunks_of(partition: Sequence[int]) -> tuple[Chunk, ...]:
    """Chunks of a partition, in order."""
    return tuple(Chunk(sum(partition[:i]), frames) for i, frames in enumerate(partition))


def resolved_chunks(
    stored: CausalConfig, recipe: schema.CausalSection | None, source: object
) -> tuple[CausalConfig, str | None]:
    """Chunks that a causal model samples with, and a message where its files do not state them.

    Another partition than the trained one changes every video. A model's own partition is used where its
    files state one, as all that this package saves do; else the recipe's, or the published models' default.

    Args:
        stored: Causal configuration from the model's files.
        recipe: Causal section of the recipe; None in a bidirectional recipe.
        source: Model, for the message.

    Raises:
        UsageError: The model was trained with other chunks than those of the recipe.
    """
    unstated = f"{source} states no chunk_partition"
    if not stored.is_stated and recipe is None:
        return stored, f"{unstated}; AnyFlow's default is used: {_listed(stored.partition)}."
    if recipe is None or recipe.partition == stored.partition:
        return stored, None
    if not stored.is_stated:
        used = replace(stored, partition=recipe.partition)
        return used, f"{unstated}; the recipe's is used: {_listed(used.partition)}."
    trained = partition_for(stored, sum(recipe.partition))
    if recipe.partition == trained:
        return stored, None
    raise UsageError(
        f"{source} was trained with chunks of {_listed(stored.partition)} latent frames; the recipe's are "
        f"{_listed(recipe.partition)}.",
        f"To follow the model, add --set 'model.causal.partition=[{_listed(trained)}]'.",
    )


def _listed(partition: Sequence[int]) -> str:
    return ", ".join(map(str, partition))


def partition_for(causal: CausalConfig, frames: int) -> tuple[int, ...]:
    """Partition of a video of ``frames`` latent frames.

    The trained one where the lengths agree; otherwise the trained first chunk, then chunks of the largest
    trained size, the last one cut.
    """
    if sum(causal.partition) == frames:
        return causal.partition
    head, size = min(causal.partition[0], frames), max(causal.partition)
    count, rest = divmod(frames - head, size)
    return (head, *[size] * count, *[rest] * (rest > 0))


def remembered_for(causal: CausalConfig, frames: int) -> int | None:
    """Compressed chunks to cache for a video of ``frames`` latent frames; None keeps all.

    All of them up to the trained length. Beyond it ``causal.remember``, by default as many as the partition
    has, so that memory does not grow with the video and no token attends further back than in training.
    """
    if frames <= sum(causal.partition):
        return None
    if causal.remember is not None:
        return causal.remember
    return max(len(causal.partition) - causal.full_chunks, 0)


def split_after(partition: Sequence[int], given: int) -> tuple[int, ...]:
    """Split a partition after ``given`` conditioning frames.

    Conditioning frames may end mid-chunk; the remainder becomes its own chunk, which attends to them as clean
    past, as every chunk does in training. Noising them along with the rest would show them to the network too
    late: with one step, not at all.
    """
    chunks: list[int] = []
    for chunk in chunks_of(partition):
        before = given - chunk.first
        chunks += [before, chunk.frames - before] if 0 < before < chunk.frames else [chunk.frames]
    return tuple(chunks)


def check_partition(partition: Sequence[int], frames: int) -> None:
    """Refuse a partition that does not sum to ``frames`` latent frames."""
    if sum(partition) != frames or min(partition, default=0) < 1:
        raise UsageError(
            f"Chunks of {_listed(partition)} latent frames do not make up a video of {frames}.",
            f"Give chunks of at least one frame each that sum to {frames}.",
        )


def causal_layout(config: NetworkConfig, segments: Sequence[Segment], height: int, width: int) -> Layout:
    """Layout of segments over latent frames of ``height`` x ``width`` in a causal network's patches."""
    return Layout(tuple(segments), height, width, config.patch, causal_of(config).compressed_patch)


def causal_of(config: NetworkConfig) -> CausalConfig:
    """Causal part of the configuration of a causal network."""
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

    Args:
        config: The network.
        partition: Latent frames per chunk.
        height: Latent height.
        width: Latent width.
        noisy: How many of the last chunks are noisy, with their velocity as output; None: all with full
            patches. Full chunks before them are conditioning, with a clean copy only.
        clean: Whether there are clean copies; without, a noisy chunk attends to the noisy ones before it.
    """
    chunks = chunks_of(partition)
    split = max(len(chunks) - causal_of(config).full_chunks, 0)
    past, window = chunks[:split], chunks[split:]
    given = 0 if noisy is None else len(window) - noisy
    assert given == 0 or clean, "conditioning chunks need clean copies"
    context = tuple(range(split))
    denoised = tuple(range(split, len(chunks) - given))
    copies = tuple(denoised[-1] + 1 + i for i in range(len(window) - 1)) if clean else denoised
    segments = [
        Segment(chunk.first, chunk.frames, context[: i + 1], "compressed", is_output=False)
        for i, chunk in enumerate(past)
    ]
    segments += [
        Segment(chunk.first, chunk.frames, tuple(sorted((*context, denoised[i], *copies[: given + i]))))
        for i, chunk in enumerate(window[given:])
    ]
    if clean:
        segments += [
            Segment(chunk.first, chunk.frames, (*context, *copies[: i + 1]), is_output=False)
            for i, chunk in enumerate(window[:-1])
        ]
    return causal_layout(config, segments, height, width)


@lru_cache(maxsize=64)
def replaying(
    config: NetworkConfig, partition: tuple[int, ...], height: int, width: int, known: int = 0
) -> Layout:
    """All chunks of a finished video in one pass: ``[clean past of each | noisy chunks]``.

    Each noisy chunk attends to what the cache holds when it is sampled (``kv_cache``). The keys of a clean
    chunk depend on which chunks before it are compressed, so it has a copy for each such state.

    Args:
        config: The network.
        partition: Latent frames per chunk.
        height: Latent height.
        width: Latent width.
        known: First latent frames, whole chunks, that are clean only.
    """
    chunks, causal = chunks_of(partition), causal_of(config)
    segments: list[Segment] = []
    copies: dict[tuple[int, int], int] = {}  # by the first chunk in the window (-1: left it), and the chunk
    pasts: list[tuple[Chunk, list[int]]] = []
    for number, noisy in enumerate(chunks):
        if noisy.first < known:
            continue
        sink = min(causal.sink_chunks, number)
        border = max(number + 1 - causal.full_chunks, sink)
        past: list[int] = []
        for i, chunk in enumerate(chunks[:number]):
            key = (border if i >= border else -1, i)
            if key not in copies:
                copies[key] = len(segments)
                patch: Patch = "compressed" if sink <= i < border else "full"
                attends_to = (*past, copies[key])
                segments.append(Segment(chunk.first, chunk.frames, attends_to, patch, is_output=False))
            past.append(copies[key])
        pasts.append((noisy, past))
    for noisy, past in pasts:
        segments.append(Segment(noisy.first, noisy.frames, (*past, len(segments))))
    return causal_layout(config, segments, height, width)


class TeacherForced:
    """Velocity of noisy chunks over the clean video x (B, F, C, H, W) that they come from.

    A ``Velocity`` of the frames ``window``: its z (B, F', C, H, W) are the last ``noisy`` chunks, by default
    all with full patches. Context and clean copies pass at ``t = r = 0``.
    """

    def __init__(
        self, model: Velocity, x: Tensor, partition: tuple[int, ...], noisy: int | None = None
    ) -> None:
        check_partition(partition, x.shape[1])
        model = one_network(model)
        config, (height, width) = model.network.config, x.shape[-2:]
        full = causal_of(config).full_chunks
        self.layout = teacher_forcing(config, partition, height, width, noisy)
        self.window = slice(sum(partition[: -(noisy or full)]), None)
        self._model = model.with_layout(self.layout)
        start = sum(partition[:-full])
        self._context, self._copies = x[:, :start], x[:, start : sum(partition[:-1])]

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict the velocity of the window z (B, F', C, H, W) at t and r, (B,) or (B, F')."""
        tokens = torch.cat((self._context, z, self._copies), dim=1)
        return self._model(tokens, self._times(t, z), self._times(r, z))

    def select(self, index: Tensor) -> TeacherForced:
        """Conditions of the samples ``index`` (N,); it may repeat and reorder."""
        return self._with(self._model.select(index), self._context[index], self._copies[index])

    def concat(self, *others: Velocity) -> TeacherForced:
        """Concatenate the conditions of several batches."""
        parts = cast("tuple[TeacherForced, ...]", others)
        model = self._model.concat(*(part._model for part in parts))
        context, copies = (
            torch.cat([getattr(part, name) for part in (self, *parts)]) for name in ("_context", "_copies")
        )
        return self._with(model, context, copies)

    def _times(self, t: Tensor, z: Tensor) -> Tensor:
        """Times of all input frames from those of the window, (B,) or (B, F'); 0 for clean frames."""
        noisy = t.unsqueeze(1).expand(z.shape[:2]) if t.dim() == 1 else t
        return nnf.pad(noisy, (self._context.shape[1], self._copies.shape[1]))

    def _with(self, model: Conditioned, context: Tensor, copies: Tensor) -> TeacherForced:
        other = copy.copy(self)
        other._model, other._context, other._copies = model, context, copies
        return other


class Replayed(TeacherForced):
    """Velocity of all chunks of a finished video x (B, F, C, H, W) at once, each over its own clean past.

    A ``Velocity`` of the frames after the ``known`` first ones. In sampling the past is in the cache, which
    has no gradient; here it is part of the pass, so the weights that encode it have one.
    """

    def __init__(self, model: Velocity, x: Tensor, partition: tuple[int, ...], known: int = 0) -> None:
        check_partition(partition, x.shape[1])
        model = one_network(model)
        self.layout = replaying(model.network.config, partition, *x.shape[-2:], known)
        self.window = slice(known, None)
        self._model = model.with_layout(self.layout)
        past = [segment for segment in self.layout.segments if not segment.is_output]
        clean = [x[:, segment.first : segment.first + segment.frames] for segment in past]
        self._context, self._copies = torch.cat((x[:, :0], *clean), dim=1), x[:, :0]


def as_causal(network: FlowMapTransformer, causal: CausalConfig) -> FlowMapTransformer:
    """Give a network these chunks: in place if it is causal already, else by ``causal_from``."""
    if network.config.causal is None:
        return causal_from(network, causal)
    stored, wanted = network.config.causal.compressed_patch, causal.compressed_patch
    if stored != wanted:
        raise UsageError(
            f"The model has compressed patches of {stored[0]}x{stored[1]}, not {wanted[0]}x{wanted[1]}.",
            f"Set model.causal.compressed_patch to [{stored[0]}, {stored[1]}].",
        )
    network.config = replace(network.config, causal=causal)
    return network


def causal_from(network: FlowMapTransformer, causal: CausalConfig | None = None) -> FlowMapTransformer:
    """Turn a flow-map network into a frozen causal one, sharing its weights.

    The compressed patch embedding starts as the full one with its kernel enlarged by linear interpolation.
    """
    assert network.config.two_time, "a causal network takes two times"
    config = replace(network.config, causal=causal or CausalConfig())
    full = network.patch_embedding
    kernel = full.weight.detach().flatten(0, 1).unsqueeze(1)  # (D C, 1, 1, high, wide)
    size = (1, *causal_of(config).compressed_patch)
    larger = nnf.interpolate(kernel.float(), size=size, mode="trilinear", align_corners=False)
    weights = dict(network.state_dict())
    weights[f"{FAR}.weight"] = larger.reshape(*full.weight.shape[:2], *size).to(full.weight.dtype)
    weights[f"{FAR}.bias"] = weights["patch_embedding.bias"].clone()
    result = on_meta(config)
    result.load_state_dict(weights, assign=True)
    return result.requires_grad_(False)
