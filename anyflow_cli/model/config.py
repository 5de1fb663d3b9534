"""Sizes of the network, read from and written as the configuration of the diffusers classes.

Three classes share one architecture: ``WanTransformer3DModel`` (one time), ``AnyFlowTransformer3DModel`` (two
times) and ``AnyFlowFARTransformer3DModel`` (two times, causal). A configuration that this network cannot
represent exactly is refused here, before a weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from anyflow_cli.errors import UsageError

if TYPE_CHECKING:
    from anyflow_cli.recipe import schema

Conditioning = Literal["interpolate", "zero-init"]

WAN = "WanTransformer3DModel"
ANYFLOW = "AnyFlowTransformer3DModel"
ANYFLOW_FAR = "AnyFlowFARTransformer3DModel"
CLASSES = (WAN, ANYFLOW, ANYFLOW_FAR)
QK_NORM = "rms_norm_across_heads"


@dataclass(frozen=True)
class CausalConfig:
    """What a causal (FAR) network adds: a second patch size for the past, and how frames fall into chunks."""

    compressed_patch: tuple[int, int] = (4, 4)
    full_chunks: int = 3
    partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2)

    @classmethod
    def from_recipe(cls, settings: schema.CausalSection) -> CausalConfig:
        """The architecture that a recipe asks for."""
        return cls(settings.compressed_patch, settings.full_chunks, settings.partition)


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes and time conditioning. The second time enters as ``r`` or ``t - r`` (``delta``)."""

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

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.head_dim

    @property
    def class_name(self) -> str:
        """The diffusers class whose configuration and parameter names these are."""
        if not self.two_time:
            return WAN
        return ANYFLOW if self.causal is None else ANYFLOW_FAR

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NetworkConfig:
        """Read a ``config.json``; refuse what this network would compute differently."""
        name = config.get("_class_name", WAN)
        if name not in CLASSES:
            raise UsageError(
                f"The transformer is a {name}, which anyflow cannot run.", f"Use one of {', '.join(CLASSES)}."
            )
        _refuse_unsupported(config)
        two_time = name != WAN
        return cls(
            heads=_number(config, "num_attention_heads", 40),
            head_dim=_number(config, "attention_head_dim", 128),
            layers=_number(config, "num_layers", 40),
            ffn_dim=_number(config, "ffn_dim", 13824),
            in_channels=_number(config, "in_channels", 16),
            out_channels=_number(
                config, "out_channels" if config.get("out_channels", 16) else "in_channels", 16
            ),
            text_dim=_number(config, "text_dim", 4096),
            freq_dim=_number(config, "freq_dim", 256),
            patch=_spatial(config.get("patch_size", (1, 2, 2))),
            cross_attn_norm=bool(config.get("cross_attn_norm", True)),
            eps=float(config.get("eps", 1e-6)),
            rope_max_seq_len=_number(config, "rope_max_seq_len", 1024),
            two_time=two_time,
            gate=float(config.get("gate_value", 0.25)) if two_time else cls.gate,
            delta=config.get("deltatime_type", "r") if two_time else "r",
            causal=_causal(config) if name == ANYFLOW_FAR else None,
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The ``config.json`` of ``class_name``. Zero-init networks are folded first (``network.folded``)."""
        assert self.conditioning == "interpolate", "fold a zero-init network before writing it"
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
            "image_dim": None,
            "rope_max_seq_len": self.rope_max_seq_len,
        }
        if not self.two_time:
            one_time = {"qk_norm": QK_NORM, "added_kv_proj_dim": None, "pos_embed_seq_len": None}
            return config | one_time
        config |= {"gate_value": self.gate, "deltatime_type": self.delta}
        if self.causal is not None:
            config |= {
                "compressed_patch_size": [1, *self.causal.compressed_patch],
                "full_chunk_limit": self.causal.full_chunks,
                "chunk_partition": list(self.causal.partition),
            }
        return config


def _causal(config: Mapping[str, Any]) -> CausalConfig:
    return CausalConfig(
        compressed_patch=_spatial(config.get("compressed_patch_size", (1, 4, 4))),
        full_chunks=_number(config, "full_chunk_limit", 3),
        partition=tuple(int(n) for n in config.get("chunk_partition", CausalConfig.partition)),
    )


def _number(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise UsageError(
            f"The transformer's config.json says {key} is {value!r}, which is no size.",
            "Fetch or save it again.",
        )
    return value


def _spatial(patch: Any) -> tuple[int, int]:
    """Height and width of a ``(1, height, width)`` patch: a token never spans two latent frames."""
    frames, height, width = (int(n) for n in patch)
    if frames != 1:
        raise UsageError(
            f"The transformer's patches span {frames} latent frames; anyflow needs patches within one frame.",
            "Use a model whose patch_size starts with 1, as every Wan 2 model's does.",
        )
    return height, width


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise UsageError(
            "The transformer takes image embeddings (an image-to-video Wan), which anyflow does not train.",
            "Use the text-to-video model of the same family.",
        )
    if config.get("deltatime_type", "r") not in ("r", "t-r"):
        raise UsageError(
            f"The transformer's second time is {config['deltatime_type']!r}; anyflow knows r and t-r.",
            "Use a model that diffusers can run.",
        )
    if config.get("qk_norm", QK_NORM) != QK_NORM:
        raise UsageError(
            f"The transformer normalises queries and keys by {config['qk_norm']!r}, not across heads.",
            "Use a Wan 2 model.",
        )
