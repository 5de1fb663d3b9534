"""The transformer block and its parts: attention, feed-forward, modulation per frame.

Parameter names are those of the diffusers Wan and AnyFlow classes. Norms, rotations, modulation and residual
sums are fp32; matrix products and attention run in the weights' type, or autocast's. Modulation has one row
per frame, broadcast over the frame's tokens: one row per token would take gigabytes at full size.

Legend: B batch, F latent frames (1 where all frames share their times), L tokens, D width, E heads, d
channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from anyflow_cli.model.attention import SDPA, Kernel, attend
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.context_parallel import ContextGroup, real_keys
from anyflow_cli.model.layout import Group, Layout, Span
from anyflow_cli.model.rotary import rotate

TOKENS_AT_ONCE = 8192  # that are normalized and rotated in fp32

KeyValue = tuple[Tensor, ...]  # key and value; then, in an image-to-video network, those of the picture


class Projected(NamedTuple):
    """A condition in the network's width: text (B, L, D), and the picture's tokens (B, P, D)."""

    text: Tensor
    picture: Tensor | None = None


@dataclass(frozen=True)
class LayerKeys:
    """Keys and values (B, L, E, d) for each block, of a condition or of cached chunks.

    Cached chunks of a context group are (B, N, L, e, d), see ``context_parallel``.
    """

    layers: tuple[KeyValue, ...]

    def select(self, index: Tensor) -> LayerKeys:
        """Keep the samples ``index`` (N,) of the batch; it may repeat and reorder."""
        return LayerKeys(tuple(tuple(part[index] for part in layer) for layer in self.layers))

    @staticmethod
    def concat(parts: Sequence[LayerKeys]) -> LayerKeys:
        """Concatenate along the batch."""
        layers = zip(*(part.layers for part in parts), strict=True)
        return LayerKeys(tuple(tuple(map(torch.cat, zip(*batch, strict=True))) for batch in layers))


class RmsNorm(nn.Module):
    """Root mean square norm over the full width, across heads; the output is fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (..., D) of any type; fp32."""
        x = x.float()
        # vector_norm has a fused backward; the mean of squares does not.
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        return x * torch.rsqrt(square / x.shape[-1] + self.eps) * self.weight.float()


class Attention(nn.Module):
    """Projections and attention; the layout decides which tokens attend to which."""

    def __init__(self, config: NetworkConfig, *, over_pictures: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.kernel: Kernel = SDPA
        self.context: ContextGroup | None = None
        self.to_q = nn.Linear(config.dim, config.dim)
        self.to_k = nn.Linear(config.dim, config.dim)
        self.to_v = nn.Linear(config.dim, config.dim)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim)])
        self.norm_q = RmsNorm(config.dim, config.eps)
        self.norm_k = RmsNorm(config.dim, config.eps)
        if over_pictures:
            self.add_k_proj = nn.Linear(config.dim, config.dim)
            self.add_v_proj = nn.Linear(config.dim, config.dim)
            self.norm_added_k = RmsNorm(config.dim, config.eps)

    def split(self, x: Tensor) -> Tensor:
        """Split the width into heads, (B, L, D) to (B, L, E, d)."""
        return torch.unflatten(x, -1, (self.heads, -1))

    def over_video(self, x: Tensor, turns: Tensor, layout: Layout, cache: KeyValue | None) -> Tensor:
        """Self-attention of tokens (B, L, D) in the layout's groups; keys are cached after rotation."""
        value = self.split(self.to_v(x))
        # on a CPU the kernel's type depends on the number of queries
        dtype = torch.float32 if x.device.type == "cpu" else value.dtype
        query = rotated(self.to_q(x), self.norm_q, turns, dtype)
        key = rotated(self.to_k(x), self.norm_k, turns, dtype)
        if self.context is not None:
            return self._over_parts(query, key, value, layout, cache, self.context)
        if cache is not None:
            _write_cache(cache, (key, value), layout)
        cached_key, cached_value = cache or (None, None)
        parts = [
            attend(
                query[:, group.queries],
                _gather(key, group, cached_key),
                _gather(value, group, cached_value),
                self.kernel,
            )
            for group in layout.groups
        ]
        return self._project(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def _over_parts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        cache: KeyValue | None,
        context: ContextGroup,
    ) -> Tensor:
        """The same with the tokens of several processes: tensors are (B, N, L, e, d), tokens in parts."""
        query, key, value = (context.split_heads(part.to(value.dtype)) for part in (query, key, value))
        key, value = context.gather_keys(key), context.gather_keys(value)
        if cache is not None:
            _write_cache(cache, (key, value), layout)
        cached_key, cached_value = cache or (None, None)
        out = []
        for group, real in zip(layout.groups, real_keys(layout, key.device), strict=True):
            keys, values = (
                tokens.flatten(1, 2) if real is None else tokens.flatten(1, 2)[:, real]
                for tokens in (_gather(key, group, cached_key), _gather(value, group, cached_value))
            )
            queries = query[:, :, group.queries]
            attended = attend(queries.flatten(1, 2), keys, values, self.kernel)
            out.append(torch.unflatten(attended, 1, queries.shape[1:3]))
        return self._project(context.join_heads(torch.cat(out, dim=2)))

    def condition_keys(self, condition: Projected) -> KeyValue:
        """Keys and values of a condition's tokens (B, L, D), each (B, L, E, d)."""
        text, picture = condition
        value = self.split(self.to_v(text))
        keys = self.split(self.norm_k(self.to_k(text))).to(value.dtype), value
        if picture is None:
            return keys
        value = self.split(self.add_v_proj(picture))
        return *keys, self.split(self.norm_added_k(self.add_k_proj(picture))).to(value.dtype), value

    def over_condition(self, x: Tensor, keys: KeyValue) -> Tensor:
        """Cross-attention of tokens (B, L, D) to the keys and values of text and picture, added up."""
        query = self.split(self.norm_q(self.to_q(x)))
        pairs = zip(keys[::2], keys[1::2], strict=True)
        # shared keys may be of another type
        out = sum(attend(query, key, value, self.kernel).to(x.dtype) for key, value in pairs)
        assert isinstance(out, Tensor)
        return self._project(out)

    def _project(self, x: Tensor) -> Tensor:
        projected: Tensor = self.to_out[0](x.flatten(-2))
        return projected


def rotated(x: Tensor, norm: nn.Module, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalized and rotated heads (B, L, E, d) of x (B, L, D), in ``dtype``.

    Both steps are fp32. Without gradient they take ``TOKENS_AT_ONCE`` tokens at a time, so that x is never in
    fp32 as a whole.
    """

    def turn(x: Tensor, turns: Tensor) -> Tensor:
        heads: Tensor = torch.unflatten(norm(x), -1, (-1, 2 * turns.shape[-2]))
        return rotate(heads, turns).to(dtype)

    if dtype == torch.float32 or x.shape[1] <= TOKENS_AT_ONCE or torch.is_grad_enabled():
        return turn(x, turns)
    out = x.new_empty(*x.shape[:2], x.shape[2] // (2 * turns.shape[-2]), 2 * turns.shape[-2], dtype=dtype)
    pieces = (torch.split(part, TOKENS_AT_ONCE, dim) for part, dim in ((x, 1), (turns, 0), (out, 1)))
    for tokens, own, place in zip(*pieces, strict=True):
        place.copy_(turn(tokens, own))
    return out


def _gather(x: Tensor, group: Group, cache: Tensor | None) -> Tensor:
    """Keys or values that a group attends to, of x and the cache; a view if they are one range of either.

    The cache has those of x already; with gradient they are taken from x.
    """
    if cache is None or not group.cached:
        parts = [_tokens(x, tokens) for tokens in group.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)
    if group.in_cache is not None and not torch.is_grad_enabled():
        return _tokens(cache, group.in_cache)
    own = [_tokens(x, tokens).to(cache.dtype) for tokens in group.keys]
    return torch.cat([*(_tokens(cache, place) for place in group.cached), *own], dim=-3)


def _write_cache(cache: KeyValue, new: KeyValue, layout: Layout) -> None:
    """Write keys and values of the input to the layout's places in the cache, without gradient."""
    for stored, x in zip(cache, new, strict=True):
        for write in layout.writes:
            _tokens(stored, write.cache).copy_(_tokens(x, write.tokens).detach())


def _tokens(x: Tensor, tokens: slice) -> Tensor:
    """A range of the tokens of x (..., L, E, d)."""
    return x[..., tokens, :, :]


class GeluLinear(nn.Module):
    """Linear layer and GELU (tanh approximation)."""

    def __init__(self, dim: int, width: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, width)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., width)."""
        return nnf.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Two layers; the identity between them stands for the dropout of the diffusers classes."""

    def __init__(self, dim: int, inner: int, out: int, approximate: str = "tanh") -> None:
        super().__init__()
        up, down = GeluLinear(dim, inner, approximate), nn.Linear(inner, out)
        self.net = nn.Sequential(up, nn.Identity(), down)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, dim) to (B, L, out)."""
        out: Tensor = self.net(x)
        return out


class Block(nn.Module):
    """Self-attention, text attention and feed-forward; the first and last modulated by the times."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = Attention(config)
        self.attn2 = Attention(config, over_pictures=config.image_dim is not None)
        self.norm2 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else None
        self.ffn = FeedForward(config.dim, config.ffn_dim, config.dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        h: Tensor,
        condition: Projected | KeyValue,
        modulation: Tensor,
        turns: Tensor,
        layout: Layout,
        cache: KeyValue | None = None,
    ) -> Tensor:
        """Update the tokens.

        Args:
            h: Tokens (B, L, D).
            condition: Projected condition, or its keys and values (B, L', E, d) each.
            modulation: Modulation by the times (B, F, 6, D), added to the block's own table.
            turns: Rotations of the tokens (L, 1, d / 2, 2).
            layout: Token layout.
            cache: Keys and values (B, L', E, d) that the layout reads and writes.
        """
        rows = (self.scale_shift_table.float().unsqueeze(1) + modulation).unbind(2)  # 6 of (B, F, D)
        shift_attn, scale_attn, gate_attn, shift_ffn, scale_ffn, gate_ffn = rows
        spans = layout.even_spans
        x = modulated(h, shift_attn, scale_attn, self.eps, spans)
        h = gated(h, self.attn1.over_video(x, turns, layout, cache), gate_attn, spans)
        keys = self.attn2.condition_keys(condition) if isinstance(condition, Projected) else condition
        normed = h if self.norm2 is None else fp32_norm(h, self.norm2)
        h = h + self.attn2.over_condition(normed, keys)
        x = modulated(h, shift_ffn, scale_ffn, self.eps, spans)
        return gated(h, self.ffn(x), gate_ffn, spans)

    def condition_keys(self, condition: Projected) -> KeyValue:
        """Keys and values of a projected condition, each (B, L', E, d)."""
        return self.attn2.condition_keys(condition)


def fp32_norm(h: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Layer norm in fp32 of tokens (B, L, D) of any type, which the output has, too."""
    weight, bias = norm.weight.float(), norm.bias.float()
    return nnf.layer_norm(h.float(), (h.shape[-1],), weight, bias, norm.eps).to(h.dtype)


def modulated(h: Tensor, shift: Tensor, scale: Tensor, eps: float, spans: Sequence[Span]) -> Tensor:
    """``norm(h) (1 + scale) + shift`` in fp32, of tokens (B, L, D) and one row (B, F, D) per frame."""
    normed = nnf.layer_norm(h.float(), (h.shape[-1],), eps=eps)
    return by_frame(_scale_and_shift, (normed,), (shift, 1 + scale), spans).to(h.dtype)


def gated(h: Tensor, update: Tensor, gate: Tensor, spans: Sequence[Span]) -> Tensor:
    """``h + update gate`` in fp32, of tokens (B, L, D) and one row (B, F, D) per frame."""
    return by_frame(torch.addcmul, (h.float(), update), (gate,), spans).to(h.dtype)


def _scale_and_shift(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, scale)


def by_frame(
    op: Callable[..., Tensor], tokens: Sequence[Tensor], rows: Sequence[Tensor], spans: Sequence[Span]
) -> Tensor:
    """Apply ``op(*tokens, *rows)``, each row (B, F, D) broadcast over its frame's tokens (B, L, D)."""
    if rows[0].shape[1] == 1:  # all frames share their times
        return op(*tokens, *rows)
    parts = [
        op(
            *(torch.unflatten(x[:, span.tokens], 1, (span.frame_count, -1)) for x in tokens),
            *(row[:, span.frames].unsqueeze(2) for row in rows),
        ).flatten(1, 2)
        for span in spans
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
