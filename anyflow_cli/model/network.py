"""The network: a Wan transformer with one time or two, over any token layout.

Parameter names are those of ``WanTransformer3DModel``, ``AnyFlowTransformer3DModel`` and
``AnyFlowFARTransformer3DModel``. Times are in [0, 1] everywhere except in ``sinusoid``, and their whole path
to the modulation is fp32: the difference quotient of stage 1 takes steps of 0.005, and embeddings turn by a
radian per 0.001. The module holds no buffers, so that it can be built on the meta device and assigned its
weights.

Legend: B batch, F latent frames, C channels, H W latent height and width, L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from anyflow_cli.model.attention import AttentionShape, Kernel
from anyflow_cli.model.blocks import (
    Block,
    FeedForward,
    KeyValue,
    LayerKeys,
    Projected,
    fp32_norm,
    modulated,
)
from anyflow_cli.model.config import Conditioning, NetworkConfig
from anyflow_cli.model.context_parallel import ContextGroup, own_tokens, shared_layout
from anyflow_cli.model.layout import Layout, Segment, bidirectional
from anyflow_cli.model.rotary import rotation
from anyflow_cli.model.weights_io import LazyWeight

TIME_SCALE = 1000.0
# Stored in fp32 by ``store_as``: small, and on the path of times and norms.
FP32_PARTS = ("time_embedder", "delta_embedder", "delta_proj", "time_proj", "scale_shift_table", "norm")

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


class PatchEmbedding(nn.Module):
    """One token per patch; a convolution whose stride is its kernel size, as a matrix product."""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int]) -> None:
        super().__init__()
        conv = nn.Conv3d(channels, dim, (1, *patch), (1, *patch))
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, z: Tensor, layout: Layout | None = None) -> Tensor:
        """Embed latents (B, F, C, H, W) as tokens (B, L, D): all, or this process's of a shared layout."""
        high, wide = self.weight.shape[-2:]
        z = torch.unflatten(
            torch.unflatten(z, 4, (-1, wide)), 3, (-1, high)
        )  # (B, F, C, down, high, across, wide)
        patches = z.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        if layout is not None:
            patches = own_tokens(patches, z.shape[1], layout)
        return nnf.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class Embedder(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, width: int, dim: int, act: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, dim)
        self.act = act
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., D)."""
        out: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return out


class PictureEmbedder(nn.Module):
    """Maps CLIP's tokens of one or two pictures to the width; norms are fp32."""

    def __init__(self, width: int, dim: int, tokens: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.ff = FeedForward(width, width, dim, approximate="none")
        self.norm2 = nn.LayerNorm(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width)) if tokens else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, P, width) to (B, P, D)."""
        x = x if self.pos_embed is None else x + self.pos_embed.to(x)
        return fp32_norm(self.ff(fp32_norm(x, self.norm1)), self.norm2)


class ConditionEmbedder(nn.Module):
    """Embedding of times, as modulation of the blocks, and of text and pictures."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.time_embedder = Embedder(config.freq_dim, config.dim, nn.SiLU())
        if config.two_time:
            self.delta_embedder = Embedder(config.freq_dim, config.dim, nn.SiLU())
            if config.conditioning == "zero-init":
                self.delta_proj = nn.Linear(config.dim, config.dim, bias=False)
                nn.init.zeros_(self.delta_proj.weight)
        self.time_proj = nn.Linear(config.dim, config.dim * 6)
        self.text_embedder = Embedder(config.text_dim, config.dim, nn.GELU(approximate="tanh"))
        if config.image_dim is not None:
            self.image_embedder = PictureEmbedder(config.image_dim, config.dim, config.image_tokens)

    def times(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Embed times (B, F): embedding (B, F, D) and the blocks' modulation (B, F, 6, D), fp32."""
        with torch.autocast(t.device.type, enabled=False):
            embedding = self._mix(t.float(), r.float())
            return embedding, torch.unflatten(self.time_proj(nnf.silu(embedding)), -1, (6, -1))

    def _mix(self, t: Tensor, r: Tensor) -> Tensor:
        config = self.config
        at_t: Tensor = self.time_embedder(sinusoid(t, config.freq_dim))
        if not config.two_time:
            return at_t
        at_delta: Tensor = self.delta_embedder(sinusoid(r if config.delta == "r" else t - r, config.freq_dim))
        if config.conditioning == "zero-init":
            mixed: Tensor = at_t + self.delta_proj(at_delta)
            return mixed
        # lerp is exact where both embeddings agree: at r = t an untouched copy equals the pretrained network
        # to the bit.
        return torch.lerp(at_t, at_delta, config.gate)


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Cosines, then sines of ``1000 t`` at falling frequencies, (..., channels) fp32.

    Times are scaled by 1000 here and nowhere else.
    """
    half = channels // 2
    falling = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = (TIME_SCALE * t).unsqueeze(-1) * torch.exp(-math.log(10000.0) * falling)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def plain_contexts() -> Contexts:
    """Contexts of a checkpointed block's forward and of its recomputation that do nothing."""
    return nullcontext(), nullcontext()


class FlowMapTransformer(nn.Module):
    """Velocity ``u(z_t, t, r)`` of latents under text; a network with one time ignores ``r``.

    With ``gradient_checkpointing``, every ``checkpoint_every_n_blocks``-th block is recomputed in the
    backward pass, inside the second context that ``checkpoint_contexts`` returned at its forward; adapters
    restore the active role there.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing, self.checkpoint_every_n_blocks = False, 1
        self.computes_on: torch.device | None = None  # where it computes, if its weights are elsewhere
        self.streamed = False  # weights come to the device inside ``forward`` only
        self.checkpoint_contexts: Callable[[], Contexts] = plain_contexts
        self.context: ContextGroup | None = None
        self.patch_embedding = PatchEmbedding(config.in_channels, config.dim, config.patch)
        if config.causal is not None:
            self.far_patch_embedding = PatchEmbedding(
                config.in_channels, config.dim, config.causal.compressed_patch
            )
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.proj_out = nn.Linear(config.dim, config.out_channels * math.prod(config.patch))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    @property
    def device(self) -> torch.device:
        """Device that it computes on; offloaded shards of its weights may be on the CPU."""
        if self.computes_on is not None:
            return self.computes_on
        weight = self.proj_out.weight
        if not isinstance(weight, DTensor):
            return weight.device
        return torch.empty(0, device=weight.device_mesh.device_type).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of matrix products: that of autocast where it is enabled, else of the weights."""
        kind = self.device.type
        return (
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.proj_out.weight.dtype
        )

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        text: Tensor | LayerKeys,
        layout: Layout | None = None,
        cache: LayerKeys | None = None,
        *,
        picture: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity of the layout's output segments.

        Args:
            z: Latents (B, F, C, H, W), the frames of all input segments in order; C includes the channels of
                an image-to-video network's pictures.
            t: Start times in [0, 1], (B,) or (B, F).
            r: End times in the shape of t.
            text: Embeddings (B, L', text_dim), or keys and values from ``condition_keys``.
            layout: Token layout; None is bidirectional.
            cache: Keys and values that the layout reads and writes.
            picture: CLIP's tokens (B, P, image_dim); not read with keys and values.

        Returns:
            Velocity (B, F', C, H, W) of the F' output frames, in the type of ``z``.
        """
        layout = layout or bidirectional(z.shape[1], z.shape[3], z.shape[4], self.config.patch)
        if self.context is not None:
            layout = shared_layout(layout, self.context.size, self.context.rank)
            z = self.context.replicated(z)
        assert z.shape[1] == layout.frames, f"{z.shape[1]} frames for a layout of {layout.frames}"
        embedding, modulation = self.condition_embedder.times(_by_frame(t), _by_frame(r))
        turns = rotation(layout, self.config.head_dim, z.device)
        h = self._tokens(z, layout)
        caches = [None] * len(self.blocks) if cache is None else cache.layers
        conditions = self._condition_of_blocks(text, picture)
        for number, (block, condition, cached) in enumerate(
            zip(self.blocks, conditions, caches, strict=True)
        ):
            h = self._run(number, block, h, condition, modulation, turns, layout, cached)
        if not any(segment.is_output for segment in layout.inputs):  # the pass only writes the cache
            return z[:, :0, : self.config.out_channels]
        return self._output(h, embedding, layout).to(z.dtype)

    def condition_keys(self, text: Tensor, picture: Tensor | None = None) -> LayerKeys:
        """Keys and values of a condition for every block, to share among calls.

        ``text`` is (B, L', text_dim); an image-to-video network with CLIP also takes its tokens (B, P,
        image_dim).
        """
        projected = self._projected(text, picture)
        return LayerKeys(tuple(block.condition_keys(projected) for block in self._typed_blocks))

    def use_kernel(self, kernel: Kernel) -> None:
        """Compute every attention with this kernel."""
        for block in self._typed_blocks:
            block.attn1.kernel = block.attn2.kernel = kernel

    def use_context(self, context: ContextGroup) -> None:
        """Share the tokens of each video among the processes of a group, which call it together."""
        self.context = context
        for block in self._typed_blocks:
            block.attn1.context = context

    def attention_shape(self, latent_shape: Sequence[int]) -> AttentionShape:
        """Sizes of the largest attention over a video of latents (F, C, H, W)."""
        config, (frames, _, height, width) = self.config, latent_shape
        tokens = (height // config.patch[0]) * (width // config.patch[1])
        causal = config.causal
        queries = frames if causal is None else min(max(causal.partition), frames)
        return AttentionShape(queries * tokens, frames * tokens, config.heads, config.head_dim)

    def key_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that ``condition_keys`` depends on."""
        own = ("text_embedder", "image_embedder", "attn2.to_k", "attn2.to_v", "attn2.norm_k", "attn2.add_",
               "attn2.norm_added_k")  # fmt: skip
        return (parameter for name, parameter in self.named_parameters() if any(part in name for part in own))

    @torch.no_grad()
    def embedding_norm(self) -> Tensor:
        """Mean norm of the time embedding over a fixed set of (t, r), (), as in Fig. 11."""
        t = torch.linspace(0.125, 1, 8, device=self.device).unsqueeze(0)
        embedding, _ = self.condition_embedder.times(t, t / 2)
        norms: Tensor = torch.linalg.vector_norm(embedding, dim=-1)
        return norms.mean()

    def store_as(self, dtype: torch.dtype, storage: torch.dtype | None = None) -> FlowMapTransformer:
        """Store the weights as ``weight_dtype`` says."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(weight_dtype(name, dtype, storage))
        return self

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name, for saving; see ``WeightSource``."""
        return {name: LazyWeight.of(tensor.detach()) for name, tensor in self.state_dict().items()}

    @property
    def _typed_blocks(self) -> list[Block]:
        return cast("list[Block]", list(self.blocks))

    def _projected(self, text: Tensor, picture: Tensor | None) -> Projected:
        """Project text (B, L', text_dim) and picture tokens (B, P, image_dim) to the network's width."""
        embedder, dtype = self.condition_embedder, self.proj_out.weight.dtype
        projected: Tensor = embedder.text_embedder(text.to(dtype))
        if self.config.image_dim is None:
            return Projected(projected)
        assert picture is not None, "an image-to-video network needs a picture"
        return Projected(projected, embedder.image_embedder(picture.to(dtype)))

    def _condition_of_blocks(
        self, text: Tensor | LayerKeys, picture: Tensor | None
    ) -> list[Projected] | tuple[KeyValue, ...]:
        """The projected condition, the same for every block, or the keys and values of each block."""
        if isinstance(text, LayerKeys):
            return text.layers
        return [self._projected(text, picture)] * len(self.blocks)

    def _tokens(self, z: Tensor, layout: Layout) -> Tensor:
        """Embed latents (B, F, C, H, W) as tokens (B, L, D)."""
        parts = [
            self._embed(z[:, span.frames], layout, segment)
            for segment, span in zip(layout.inputs, layout.spans, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _embed(self, z: Tensor, layout: Layout, segment: Segment) -> Tensor:
        full = segment.patch == "full"
        tokens: Tensor = (self.patch_embedding if full else self.far_patch_embedding)(z, layout)
        return tokens.to(self.compute_dtype)  # it may be trained in fp32 on a bf16 base

    def _run(self, number: int, block: nn.Module, *args: object) -> Tensor:
        """Run a block, checkpointed if it is its turn; its last argument is the cache, or None."""
        chosen = self.gradient_checkpointing and number % self.checkpoint_every_n_blocks == 0
        if chosen and torch.is_grad_enabled():
            # Flat, since a checkpoint keeps what is not a tensor: a cache would stay until the backward pass
            # even where an outer checkpoint makes it again.
            leaves, structure = tree_flatten(args)

            def run(*leaves: object) -> Tensor:
                *others, cache = tree_unflatten(leaves, structure)
                # a chunk's own keys, written again by each of its calls, are not read from the cache here
                unversioned = cache and tuple(part.data for part in cache)
                result: Tensor = block(*others, unversioned)
                return result

            out = checkpoint(
                run,
                *leaves,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self.checkpoint_contexts,
            )
        else:
            out = block(*args)
        assert isinstance(out, Tensor)
        return out

    def _output(self, h: Tensor, embedding: Tensor, layout: Layout) -> Tensor:
        """Velocity (B, F', C, H, W) of the output segments from tokens (B, L, D)."""
        table = self.scale_shift_table.float().unsqueeze(1)  # (1, 1, 2, D)
        shift, scale = (table + embedding.unsqueeze(2)).unbind(2)
        x = modulated(h, shift, scale, self.config.eps, layout.even_spans)
        parts = [
            self._unpatch(self.proj_out(x[:, span.tokens]), layout, segment)
            for segment, span in zip(layout.inputs, layout.spans, strict=True)
            if segment.is_output
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _unpatch(self, out: Tensor, layout: Layout, segment: Segment) -> Tensor:
        """Rearrange patches (B, L, high wide C) as frames (B, F, C, H, W)."""
        down, across = layout.grid_of(segment)
        if self.context is not None:
            out = self.context.gather_tokens(out, segment.frames, down * across)
        out = torch.unflatten(out, 1, (segment.frames, down, across))
        out = torch.unflatten(out, -1, (*layout.patch, -1))
        return out.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def _by_frame(t: Tensor) -> Tensor:
    """Times with a frame axis: (B, 1) where all frames share their time, else (B, F)."""
    return t.unsqueeze(1) if t.dim() == 1 else t


def kept_in_fp32(name: str) -> bool:
    """Whether ``store_as`` leaves a parameter in fp32."""
    return any(part in name for part in FP32_PARTS)


def on_meta(config: NetworkConfig) -> FlowMapTransformer:
    """A network without storage, to be filled by ``load_state_dict(..., assign=True)``."""
    with torch.device("meta"), _Undrawn():
        return FlowMapTransformer(config)


INITIAL = (Tensor.uniform_, Tensor.normal_, Tensor.div, Tensor.__truediv__)


class _Undrawn(TorchFunctionMode):
    """Skips what draws initial weights: to divide on the meta device, torch imports its compiler (0.6 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in INITIAL else func(*args, **(kwargs or {}))


def is_quantizable(name: str) -> bool:
    """Whether a parameter belongs to the matrices of the blocks, which nearly all weights are in."""
    return "blocks." in name and not kept_in_fp32(name)


def stored_as(weights: Mapping[str, LazyWeight], dtype: torch.dtype | None) -> dict[str, LazyWeight]:
    """Weights cast to a type when they are written; of fp8 the matrices of the blocks alone, others bf16."""
    if dtype == torch.float8_e4m3fn:
        return {name: one.to(weight_dtype(name, torch.bfloat16, dtype)) for name, one in weights.items()}
    return {name: one.to(dtype or one.dtype) for name, one in weights.items()}


def weight_dtype(name: str, dtype: torch.dtype, storage: torch.dtype | None = None) -> torch.dtype:
    """Type in which a parameter is stored.

    Args:
        name: Name of the parameter.
        dtype: Type of the products.
        storage: Type of the blocks' matrices; None: as the products.
    """
    if kept_in_fp32(name):
        return torch.float32
    return storage if storage is not None and is_quantizable(name) else dtype


def two_time_from(
    network: FlowMapTransformer, gate: float = 0.25, conditioning: Conditioning = "interpolate"
) -> FlowMapTransformer:
    """Turn a network with one time into a frozen flow map that starts equal to it and shares its weights.

    Args:
        network: Network with one time.
        gate: g of the interpolated conditioning (Sec. 4.2.1).
        conditioning: ``interpolate``: ``(1 - g) emb(t) + g emb0(r)``, equal to ``network`` at ``r = t``.
            ``zero-init`` (the ablation of Fig. 11): ``emb(t) + W0 emb0(t - r)`` with ``W0 = 0``, equal at any
            r.
    """
    assert not network.config.two_time, "the network already takes two times"
    zero_init = conditioning == "zero-init"
    config = replace(
        network.config, two_time=True, gate=gate, conditioning=conditioning, delta="t-r" if zero_init else "r"
    )
    weights = dict(network.state_dict())
    for name, value in network.condition_embedder.time_embedder.state_dict().items():
        weights[f"condition_embedder.delta_embedder.{name}"] = value.clone()
    if zero_init:
        like = weights["condition_embedder.time_embedder.linear_2.weight"]
        weights["condition_embedder.delta_proj.weight"] = torch.zeros_like(like)
    flow_map = on_meta(config)
    flow_map.load_state_dict(weights, assign=True)
    return flow_map.requires_grad_(False)


def folded(
    config: NetworkConfig, weights: Mapping[str, LazyWeight]
) -> tuple[NetworkConfig, dict[str, LazyWeight]]:
    """Express a zero-init network in the parameters of the diffusers classes, which have no ``W0``.

    ``e + W0 d`` equals ``(1 - g) e' + g d'`` where each embedder's last layer is divided by its share and
    ``W0`` is multiplied into the second's. At ``g = 1/2`` the division is exact.
    """
    weights = dict(weights)
    if config.conditioning != "zero-init":
        return config, weights
    w0 = weights.pop("condition_embedder.delta_proj.weight")
    for kind in ("weight", "bias"):
        time, delta = (f"condition_embedder.{part}_embedder.linear_2.{kind}" for part in ("time", "delta"))
        weights[time] = _doubled(weights[time], lambda value: value)
        weights[delta] = _doubled(weights[delta], lambda value: w0.load().float() @ value)
    return replace(config, conditioning="interpolate", gate=0.5), weights


def _doubled(weight: LazyWeight, through: Callable[[Tensor], Tensor]) -> LazyWeight:
    return LazyWeight(weight.shape, torch.float32, lambda: 2 * through(weight.load().float()))
