"""Sizes of the network, read from and written as the configuration of the diffusers classes.

Three classes share one architecture: ``WanTransformer3DModel`` (one time), ``AnyFlowTransformer3DModel`` (two
times) and ``AnyFlowFARTransformer3DModel`` (two times, causal). Two times with CLIP's tokens of a picture are
``AnyFlowImageTransformer3DModel``, a name of this package. The AnyFlow authors' own class,
``FAR_Wan_Transformer3DModel``, is each of them by its flags. A configuration that this network cannot
represent exactly is refused here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.families import refuse_type
from anyflow_cli.model.weights_io import FETCH
from anyflow_cli.utils.records import parse_record, read_bytes

if TYPE_CHECKING:
    from anyflow_cli.recipe import schema

Conditioning = Literal["interpolate", "zero-init"]

WAN = "WanTransformer3DModel"
ANYFLOW = "AnyFlowTransformer3DModel"
ANYFLOW_FAR = "AnyFlowFARTransformer3DModel"
ANYFLOW_IMAGE = "AnyFlowImageTransformer3DModel"  # with CLIP's tokens; diffusers has no class for it
CLASSES = (WAN, ANYFLOW, ANYFLOW_FAR)  # of diffusers
NVLABS = "FAR_Wan_Transformer3DModel"  # the authors' own class, for all kinds
SKYREELS = "SkyReelsV2Transformer3DModel"  # Wan's parameters; an input of the frame rate is folded into them
CAUSAL_WAN = "CausalWanTransformer3DModel"  # of FastVideo: Wan's parameters; its presets say how it is causal
WAN_LIKE = (SKYREELS, CAUSAL_WAN)
QK_NORM = "rms_norm_across_heads"

Size = Annotated[int, Field(ge=1, le=1 << 20)]
Even = Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)]
PatchSize = tuple[
    Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]
]


class TransformerConfig(BaseModel):
    """``config.json`` of a diffusers transformer: the fields that this network depends on."""

    class_name: str = Field(WAN, alias="_class_name")
    num_attention_heads: Size = 40
    attention_head_dim: Even = 128
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 40
    ffn_dim: Size = 13824
    in_channels: Size = 16
    out_channels: Size | None = 16
    text_dim: Size = 4096
    freq_dim: Even = 256
    patch_size: PatchSize = (1, 2, 2)
    cross_attn_norm: bool = True
    eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    rope_max_seq_len: Size = 1024
    qk_norm: str | None = QK_NORM
    image_dim: Size | None = None
    added_kv_proj_dim: int | None = None
    pos_embed_seq_len: Size | None = None
    gate_value: Annotated[float, Field(ge=0, le=1)] = 0.25
    deltatime_type: str = "r"
    compressed_patch_size: PatchSize = (1, 4, 4)
    full_chunk_limit: Size = 3
    chunk_partition: Annotated[tuple[Size, ...], Field(min_length=1, max_length=100_000)] | None = None
    sink_chunks: Annotated[int, Field(ge=0, le=100_000)] = 0  # of this package
    remembered_chunks: Annotated[int, Field(ge=0, le=100_000)] | None = None  # of this package
    init_flowmap_model: bool = False  # of the authors' own class
    init_far_model: bool = False  # of the authors' own class
    num_frame_per_block: int = 1  # of SkyReels-V2


@dataclass(frozen=True)
class CausalConfig:
    """Extra configuration of a causal (FAR) network.

    Attributes:
        compressed_patch: Patch height and width of compressed chunks.
        full_chunks: How many of the last chunks have full patches.
        partition: Latent frames per chunk.
        is_stated: Whether the model's files state the partition; older folders do not, then it is a default.
        compresses: Whether chunks before the full ones stay in the cache, compressed; else they are dropped.
        sink_chunks: How many of the first chunks stay in the cache with full patches.
        remember: Most compressed chunks in the cache of a longer video; None: as many as the partition has.
    """

    compressed_patch: tuple[int, int] = (4, 4)
    full_chunks: int = 3
    partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2)
    is_stated: bool = field(default=True, compare=False)
    compresses: bool = True
    sink_chunks: int = 0
    remember: int | None = None

    @classmethod
    def from_recipe(cls, settings: schema.CausalSection) -> CausalConfig:
        """The causal architecture of a recipe."""
        return cls(
            settings.compressed_patch,
            settings.full_chunks,
            settings.partition,
            sink_chunks=settings.sink_chunks,
            remember=settings.remember,
        )


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and time conditioning; the second time enters as ``r`` or ``t - r`` (``delta``).

    A model of two experts has two networks of these sizes, which meet at the time ``boundary``.
    """

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch: tuple[int, int] = (2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024  # carried for diffusers; rotations are computed for any length
    two_time: bool = False
    gate: float = 0.25
    delta: Literal["r", "t-r"] = "r"
    conditioning: Conditioning = "interpolate"
    causal: CausalConfig | None = None
    image_dim: int | None = None  # of CLIP's tokens; None: the network does not take them
    image_tokens: int | None = None  # CLIP's tokens with learned positions: of two pictures; None: none has
    boundary: float | None = None

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.head_dim

    @property
    def class_name(self) -> str:
        """Diffusers class with this configuration and these parameter names."""
        if not self.two_time:
            return WAN
        if self.image_dim is not None:
            return ANYFLOW_IMAGE
        return ANYFLOW if self.causal is None else ANYFLOW_FAR

    @classmethod
    def read(cls, path: Path) -> NetworkConfig:
        """Read a ``config.json``.

        Raises:
            UsageError: It is damaged, or describes a network that would be computed differently.
        """
        config = parse_record(read_bytes(path, FETCH), TransformerConfig, str(path), FETCH)
        return cls._from_transformer(config)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Convert the configuration of a diffusers class, as ``read`` does."""
        content = to_json(dict(config))
        return cls._from_transformer(parse_record(content, TransformerConfig, "The configuration", FETCH))

    @classmethod
    def _from_transformer(cls, config: TransformerConfig) -> NetworkConfig:
        if config.class_name == NVLABS:
            config = _as_diffusers(config)
        if config.class_name in WAN_LIKE:
            config = _as_wan(config)
        _refuse_unsupported(config)
        two_time = config.class_name != WAN
        return cls(
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            layers=config.num_layers,
            ffn_dim=config.ffn_dim,
            in_channels=config.in_channels,
            out_channels=config.out_channels or config.in_channels,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            patch=config.patch_size[1:],
            cross_attn_norm=config.cross_attn_norm,
            eps=config.eps,
            rope_max_seq_len=config.rope_max_seq_len,
            two_time=two_time,
            gate=config.gate_value if two_time else cls.gate,
            delta="t-r" if two_time and config.deltatime_type == "t-r" else "r",
            causal=_causal(config) if config.class_name == ANYFLOW_FAR else None,
            image_dim=config.image_dim,
            image_tokens=config.pos_embed_seq_len,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` of ``class_name``; fold a zero-init network first (``network.folded``)."""
        assert self.conditioning == "interpolate", "a zero-init network was not folded"
        config: dict[str, Any] = {
            "_class_name": self.class_name,
            "patch_size": [1, *self.patch],
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "cross_attn_norm": self.cross_attn_norm,
            "eps": self.eps,
            "image_dim": self.image_dim,
            "rope_max_seq_len": self.rope_max_seq_len,
        }
        if not self.two_time or self.image_dim is not None:
            added = None if self.image_dim is None else self.dim
            config |= {
                "qk_norm": QK_NORM, "added_kv_proj_dim": added, "pos_embed_seq_len": self.image_tokens,
            }  # fmt: skip
        if not self.two_time:
            return config
        config |= {"gate_value": self.gate, "deltatime_type": self.delta}
        if self.causal is not None:
            config |= {
                "compressed_patch_size": [1, *self.causal.compressed_patch],
                "full_chunk_limit": self.causal.full_chunks,
            }
            if self.causal.is_stated:
                config["chunk_partition"] = list(self.causal.partition)
            if self.causal.sink_chunks:
                config["sink_chunks"] = self.causal.sink_chunks
            if self.causal.remember is not None:
                config["remembered_chunks"] = self.causal.remember
        return config


def _as_diffusers(config: TransformerConfig) -> TransformerConfig:
    """The class of diffusers that the authors' own class is with these flags. Its default gate is 0."""
    if config.init_far_model and not config.init_flowmap_model:
        raise UsageError(
            "The transformer is a causal model with one time, which anyflow cannot run.",
            "Use an AnyFlow model, or the Wan model that it was made from.",
        )
    name = ANYFLOW_FAR if config.init_far_model else ANYFLOW if config.init_flowmap_model else WAN
    gate = config.gate_value if "gate_value" in config.model_fields_set else 0.0
    return config.model_copy(update={"class_name": name, "gate_value": gate})


def _as_wan(config: TransformerConfig) -> TransformerConfig:
    if config.num_frame_per_block > 1:
        raise UsageError(
            f"The transformer is a SkyReels-V2 in asynchronous mode, with blocks of "
            f"{config.num_frame_per_block} frames, which anyflow does not run.",
            "Set num_frame_per_block to 1 in its config.json for synchronous mode.",
        )
    return config.model_copy(update={"class_name": WAN})


def _causal(config: TransformerConfig) -> CausalConfig:
    patch, full = config.compressed_patch_size[1:], config.patch_size[1:]
    if any(small % large for small, large in zip(patch, full, strict=True)):
        raise UsageError(
            f"The transformer's compressed patches of {patch[0]}x{patch[1]} are not made of whole patches of "
            f"{full[0]}x{full[1]}.",
            FETCH,
        )
    stated = config.chunk_partition
    partition = CausalConfig.partition if stated is None else stated
    return CausalConfig(
        patch,
        config.full_chunk_limit,
        partition,
        is_stated=stated is not None,
        sink_chunks=config.sink_chunks,
        remember=config.remembered_chunks,
    )


def _refuse_unsupported(config: TransformerConfig) -> None:
    refuse_type(config.class_name, "The transformer")
    if config.class_name not in (*CLASSES, ANYFLOW_IMAGE):
        raise UsageError(
            f"The transformer is a {config.class_name!a}, which anyflow cannot run.",
            f"Use one of {', '.join(CLASSES)}.",
        )
    for name, patch in (
        ("patch_size", config.patch_size),
        ("compressed_patch_size", config.compressed_patch_size),
    ):
        if patch[0] != 1:  # a token never spans two latent frames
            raise UsageError(
                f"The transformer's {name} spans {patch[0]} latent frames instead of one.",
                "Use a model whose patch_size starts with 1, as that of every Wan 2 model does.",
            )
    width = config.num_attention_heads * config.attention_head_dim
    added = None if config.image_dim is None else width
    takes_pictures = config.class_name in (WAN, ANYFLOW_IMAGE)
    if config.added_kv_proj_dim != added or (added is not None and not takes_pictures):
        raise UsageError(
            f"The transformer takes image tokens of {config.image_dim} with projections from "
            f"{config.added_kv_proj_dim}, as no Wan does.",
            "Use the text-to-video or image-to-video model of the same family.",
        )
    if config.deltatime_type not in ("r", "t-r"):
        raise UsageError(
            f"The transformer's second time is {config.deltatime_type!a}; anyflow supports r and t-r.",
            "Use a model that diffusers can run.",
        )
    if config.qk_norm != QK_NORM:
        raise UsageError(
            f"The transformer normalizes queries and keys by {config.qk_norm!a}, not across heads.",
            "Use a Wan 2 model.",
        )
