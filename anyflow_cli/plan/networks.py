"""The networks of one process on fake tensors, built as training builds them: sizes, and costs of calls.

torch's fake tensors have no storage. Blocks are alike: what networks of one and of two blocks hold or compute
extends linearly to full depth. They take their path for CPUs, on which tests can measure real memory.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, BackboneSources
from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.context_parallel import ContextGroup, real_keys, shared_layout
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.experts import empty_network, networks_of
from anyflow_cli.model.kv_cache import allocate_keys
from anyflow_cli.model.layout import Layout, bidirectional
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import apply_checkpointing
from anyflow_cli.model.precision import Precision, autocast
from anyflow_cli.model.rotary import rotation
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.objectives import roles_of
from anyflow_cli.utils.memory_tracker import MemoryTracker

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
DEPTHS = (1, 2)  # times the blocks after which checkpointing repeats itself
START, SCORES = Path("start"), Path("scores")  # stand for the folders that a stage loads
BASE = "frozen base"
CLIP_TOKENS = 257  # of one picture
TILE, STRIDE = 256, 192  # pixels: the tiles of diffusers' VAE, and from one to the next
FP32_BYTES = 4
RoleSize = Counter[str]  # parameters, trainable, bytes, trainable_bytes


@dataclass(frozen=True)
class Setup:
    """What one process runs: a training stage, or sampling (``settings`` is None)."""

    model: schema.ModelSection
    settings: schema.TrainingSection | None
    network: NetworkConfig  # of the model that the student starts from
    latent: tuple[int, int, int, int]  # F, C, H, W
    text: tuple[int, int]  # L, D
    precision: Precision
    gpu: bool
    two_time: bool = True  # False: a teacher as it is
    scores: NetworkConfig | None = None  # of the scores' own base; None: they share the student's
    ranks: int = 1
    shards: int | None = None  # processes that share one copy (FSDP2); None: each has its own
    context: int = 1  # processes that share a video; ``ranks`` are groups of so many
    offload: bool = False
    streamed: bool = False  # the sampled network's weights come block by block

    @property
    def unit(self) -> int:
        """Blocks after which the pattern of recomputed and kept blocks repeats itself."""
        return self.model.checkpoint_every_n_blocks if self.model.gradient_checkpointing else 1

    def layout_of(self, call: NetworkCall) -> Layout:
        """The token layout of a call, of this process's tokens."""
        frames, _, height, width = self.latent
        layout = call.layout or bidirectional(frames, height, width, self.network.patch)
        return shared_layout(layout, self.context, 0)

    def with_checkpointing(self, on: bool) -> Setup:
        """The same process with gradient checkpointing or without."""
        return replace(self, model=self.model.model_copy(update={"gradient_checkpointing": on}))

    def at_full_depth(self, role: str, low: Iterable[float], high: Iterable[float]) -> list[int]:
        """Values for the whole network of a role, from those at both depths."""
        config = self.scores if self.scores and role in ("real", "fake") else self.network
        more = config.layers / self.unit - DEPTHS[0]
        return [int(one + (two - one) * more) for one, two in zip(low, high, strict=True)]


@lru_cache(maxsize=48)
def fake_backbone(setup: Setup, depth: int) -> Backbone:
    """The backbone of a process with ``depth`` units of blocks, and gradients where it trains."""
    backbone, trains = meta_backbone(setup, depth * setup.unit), setup.settings is not None
    for network in backbone.networks():
        apply_checkpointing(network, setup.model)
        network.streamed = setup.streamed
        if setup.context > 1:
            parts = math.gcd(network.config.heads, setup.context)
            network.use_context(ContextGroup(setup.context, 0, parts))
    with FAKE:
        backbone.to_empty(device="cpu")
        for weight in backbone.parameters():
            weight.requires_grad_(weight.requires_grad and trains)
            weight.grad = torch.empty_like(weight) if weight.requires_grad else None
    return backbone


def meta_backbone(setup: Setup, layers: int | None = None) -> Backbone:
    """The backbone of a process on the meta device, as training builds it; ``layers`` instead of its own."""
    sizes = {START: setup.network, SCORES: setup.scores or setup.network}
    trains = setup.settings is not None
    model = setup.model if trains else setup.model.model_copy(update={"lora": None, "expert": "both"})
    in_bf16 = setup.precision == "bf16" and (model.lora is not None or not trains)

    def load(path: Path, dtype: torch.dtype) -> FlowMapTransformer:
        network = empty_network(replace(sizes[path], layers=layers or sizes[path].layers))
        return network.store_as(torch.bfloat16 if in_bf16 else dtype).requires_grad_(False)

    with torch.device("meta"):
        sources = BackboneSources(START, roles_of(setup.settings), two_time=setup.two_time)
        if "real" in sources.roles and isinstance(setup.settings, schema.DistillSection):
            if setup.scores:
                sources = replace(sources, scores=SCORES)
            else:  # as in the paper, the real score is the teacher after its tuning
                tuned = Backbone.build(model, BackboneSources(START, two_time=False), load)
                sources = replace(sources, real_adapter=tuned.state_dict_of("student"))
        return Backbone.build(model, sources, load, precision=setup.precision)


@lru_cache(maxsize=64)
def role_sizes(setup: Setup) -> dict[str, RoleSize]:
    """Weights by role; those that no role owns are the frozen base."""
    low, high = (_sizes(fake_backbone(setup, depth)) for depth in DEPTHS)
    sizes: dict[str, RoleSize] = {}
    for (owner, runs), size in low.items():
        full = setup.at_full_depth(runs, size.values(), high[owner, runs].values())
        sizes.setdefault(owner, Counter()).update(dict(zip(size, full, strict=True)))
    return {owner: size for owner, size in sizes.items() if size["parameters"]}


def _sizes(backbone: Backbone) -> dict[tuple[str, str], RoleSize]:
    """Sizes by owner, and by the first role whose network the weights are in."""
    owners = {id(p): role for role in backbone.roles for p in backbone.named_parameters_of(role).values()}
    runs = {backbone.network_of(role): role for role in reversed(backbone.roles)}
    sizes: dict[tuple[str, str], RoleSize] = {}
    for network, role in runs.items():
        for weight in network.parameters():
            count, size, trains = weight.numel(), weight.nbytes, weight.requires_grad
            own = sizes.setdefault((owners.get(id(weight), BASE), role), Counter())
            own.update(parameters=count, trainable=count * trains, bytes=size, trainable_bytes=size * trains)
    return sizes


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make all new tensors fake, and keep them out of the caches that real networks share."""
    shared = (rotation, real_keys)
    for cached in shared:
        cached.cache_clear()
    try:
        with FAKE:
            yield
    finally:
        for cached in shared:
            cached.cache_clear()


class CallCost(NamedTuple):
    """What a network call adds to weights, gradients and the key-value cache, in bytes, and its FLOPs."""

    shared: int  # what calls of one role share: keys of the text, casts of weights under autocast
    shared_backward: int  # what remains of that until the backward pass
    forward: int  # peak
    graph: int  # kept for the backward pass
    backward: int  # peak, the graph included
    linear: int  # FLOPs of matrix products, forward
    attention: int
    linear_backward: int  # recomputed blocks included
    attention_backward: int


@lru_cache(maxsize=512)
def call_cost(setup: Setup, call: NetworkCall) -> CallCost:
    """Cost of a call at the full depth of its role's network."""
    if setup.model.gradient_checkpointing and not call.gradient:  # where it changes nothing
        return call_cost(setup.with_checkpointing(False), call)
    low, high = (_measure(setup, fake_backbone(setup, depth), call) for depth in DEPTHS)
    return CallCost(*setup.at_full_depth(call.role, low, high))


def _measure(setup: Setup, backbone: Backbone, call: NetworkCall) -> CallCost:
    """Run a call: forward, twice where casts are kept, so that the second finds what both share; backward."""
    layout, keeps_casts, samples = setup.layout_of(call), setup.shards is None, call.samples
    by_frame = call.layout is not None and call.cache is None  # each frame has times of its own
    with fake_tensors():
        z = torch.empty(samples, layout.frames, *setup.latent[1:], requires_grad=call.gradient)
        t = torch.empty(samples, *[layout.frames] * by_frame)
        condition = condition_of(setup, samples)
        experts = networks_of(backbone.network_of(call.role))  # alike, but at most one may be trained
        network = experts[-1 if setup.model.expert == "low" else 0]
        cache = _cache_of(setup, network, samples, layout.cache_tokens)
        parts = [getattr(condition, name) for name in condition.present]
        known = [z, t, *parts, *tree_leaves(list(cache.layers) if cache else [])]
        known += [tensor for weight in backbone.parameters() for tensor in (weight, weight.grad)]
        tracker = MemoryTracker([tensor for tensor in known if tensor is not None], gpu=setup.gpu)
        with tracker, torch.set_grad_enabled(call.gradient):
            with autocast(setup.precision, "cpu", keeps_casts=keeps_casts):
                scope = partial(backbone.role, call.role)
                velocity = Conditioned(network, condition, scope).with_layout(layout, cache)
                outputs = [velocity(z, t, t) for _ in range(call.gradient and keeps_casts)]
                before = tracker.restart()
                outputs.append(velocity(z, t, t))
                graph, peak = tracker.held - before, tracker.peak - before
                flops = tracker.linear, tracker.attention
            start, times = tracker.restart(), len(outputs)
            if call.gradient:
                outputs[-1].backward(torch.empty_like(outputs[-1]))  # type: ignore[no-untyped-call]
    shared, backward = (before - (times - 1) * graph, start - times * graph), tracker.peak - start + graph
    return CallCost(*shared, peak, graph, backward, *flops, tracker.linear, tracker.attention)


def condition_of(setup: Setup, samples: int, device: torch.device | str = "cpu") -> Condition:
    """A condition with the parts that the network takes, without values."""
    network, (frames, channels, *size) = setup.network, setup.latent
    shapes: dict[str, tuple[int, ...]] = {"text": setup.text}
    if network.in_channels != channels:
        shapes["channels"] = (frames, network.in_channels - channels, *size)
    if network.image_dim is not None:
        shapes["picture"] = (network.image_tokens or CLIP_TOKENS, network.image_dim)
    return Condition(**{name: torch.empty(samples, *shape, device=device) for name, shape in shapes.items()})


def _cache_of(setup: Setup, network: FlowMapTransformer, samples: int, tokens: int) -> LayerKeys | None:
    if not tokens:
        return None
    with autocast(setup.precision, "cpu"):
        return allocate_keys(network, samples, tokens, torch.device("cpu"))


def decoding_cost(vae: Mapping[str, Any], latent: Sequence[int], context: int = 1) -> tuple[int, int]:
    """Bytes of the VAE's weights, and of what decoding latents (F, C, H, W) adds.

    It decodes one latent frame after another, and each costs at most what the third one does, when the caches
    of its convolutions are full; then it joins them.

    Args:
        vae: Configuration of diffusers' class.
        latent: Shape of the latents.
        context: Processes of which each decodes a part of the rows.
    """
    cost, later = _decode(json.dumps(dict(vae)), context, *latent[1:]), latent[0] - 1
    before = cost.first + max(later - 1, 0) * cost.frame
    both = 2 * (cost.first + later * cost.frame)
    return cost.weights, cost.caches + FP32_BYTES * math.prod(latent) + max(before + cost.work, both)


class DecodingCost(NamedTuple):
    """Bytes of decoding: weights, caches of convolutions, pixels, and the most beside them at work."""

    weights: int
    caches: int
    first: int  # pixels of the first latent frame
    frame: int  # pixels of each following one
    work: int  # the frame's own pixels included


@lru_cache(maxsize=16)
def _decode(vae: str, context: int, *latent: int) -> DecodingCost:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model: Any = AutoencoderKLWan.from_config(json.loads(vae))
    with fake_tensors():
        weights = list(model.to_empty(device="cpu").parameters())
        shared = VideoVAE(model)
        if context > 1:  # the last has most rows
            shared.share(ContextGroup(context, context - 1, context))
        with MemoryTracker(weights) as tracker:
            z, decoding = torch.empty(1, 1, *latent), shared.decoding()
            done = [decoding(z), decoding(z)]
            held = tracker.restart()
            done.append(decoding(z))
    first, frame = done[0].nbytes, done[1].nbytes
    caches = held - z.nbytes - first - frame
    return DecodingCost(sum(one.nbytes for one in weights), caches, first, frame, tracker.peak - held)


def tiled_cost(vae: Mapping[str, Any], latent: Sequence[int], context: int = 1) -> tuple[int, int]:
    """The same where the VAE decodes in tiles: one tile's, and the whole video as tiles and as a picture."""
    config = {"scale_factor_spatial": 8, "scale_factor_temporal": 4, **{k: v for k, v in vae.items() if v}}
    space, frames = int(config["scale_factor_spatial"]), latent[0]
    tile, stride = TILE // space, STRIDE // space
    weights, one = decoding_cost(vae, (*latent[:2], *(min(side, tile) for side in latent[2:])), context)
    video = 3 * FP32_BYTES * ((frames - 1) * int(config["scale_factor_temporal"]) + 1) * space**2
    plain = video * math.prod(latent[2:])
    covered = [sum(min(tile, side - start) for start in range(0, side, stride)) for side in latent[2:]]
    tiles = video * math.prod(covered)  # where they overlap, more than once
    # the last tile beside the others; then the picture by rows, whole, clamped, and as values in [0, 1]
    return weights, max(one + tiles - video * min(tile, latent[2]) * min(tile, latent[3]), tiles + 4 * plain)


@lru_cache(maxsize=8)
def _encode(text: str, samples: int, tokens: int, dtype: torch.dtype) -> int:
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        config = UMT5Config(**json.loads(text), num_layers=1, feed_forward_proj="gated-gelu")
        model = UMT5EncoderModel(config).to(dtype)
    with fake_tensors(), torch.no_grad():
        model.to_empty(device="cpu")
        ids = torch.zeros(samples, tokens, dtype=torch.long)
        with MemoryTracker([*model.parameters(), ids]) as tracker:
            model(ids)
    return int(tracker.peak)


def encoding_cost(text: Mapping[str, int], samples: int, tokens: int, *, gpu: bool) -> int:
    """Bytes that encoding prompts adds to the weights of the text encoder, at most; its layers are alike."""
    sizes = json.dumps({key: value for key, value in text.items() if key != "num_layers"})
    return _encode(sizes, samples, tokens, torch.bfloat16 if gpu else torch.float32)
