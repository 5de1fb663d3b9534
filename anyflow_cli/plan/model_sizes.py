"""Sizes of a pipeline that are known before it is fetched: the published Wan models, or a local folder's own.

Sources: the ``config.json`` files of the repositories named below on the Hugging Face Hub; the encoder and
the autoencoder are the same in all of them. Parameter counts follow from the sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.layouts.components import component_config
from anyflow_cli.model.pipeline_io import BUILT_IN, component, read_config, resolve_pipeline


@dataclass(frozen=True)
class TextSizes:
    """A UMT5 encoder: gated feed-forward, a table of relative positions in every layer. UMT5-XXL's sizes."""

    vocabulary: int = 256_384
    dim: int = 4096
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10_240
    buckets: int = 32

    @property
    def parameters(self) -> int:
        """Number of weights."""
        attention = 4 * self.dim * self.heads * self.head_dim + self.buckets * self.heads
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        return self.vocabulary * self.dim + self.layers * layer + self.dim


@dataclass(frozen=True)
class Pipeline:
    """Sizes of a pipeline's parts. ``vae``: the configuration of diffusers' class; empty, it is Wan 2.1's."""

    network: NetworkConfig
    text: TextSizes = TextSizes()
    vae: Mapping[str, Any] = field(default_factory=dict)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents."""
        space = int(self.vae.get("scale_factor_spatial") or 8)
        time = int(self.vae.get("scale_factor_temporal") or 4)
        return (frames - 1) // time + 1, self.network.in_channels, height // space, width // space


def pipeline_of(address: str) -> Pipeline:
    """The sizes of the model at ``address``; nothing is fetched."""
    if address in KNOWN_MODELS:
        return Pipeline(KNOWN_MODELS[address].network)
    folder = Path(address).expanduser()
    if address in BUILT_IN or folder.is_dir():
        return _read(resolve_pipeline(address))
    raise UsageError(
        f"The sizes of {address} are not known without its files.",
        f"Name a local folder, or one of {', '.join(KNOWN_MODELS)}.",
    )


def _read(folder: Path) -> Pipeline:
    text = component_config(component(folder, "text_encoder"))
    vae = component_config(component(folder, "vae"))
    return Pipeline(read_config(folder), _text_sizes(text), vae)


def _text_sizes(config: Mapping[str, Any]) -> TextSizes:
    names = {
        "vocabulary": "vocab_size", "dim": "d_model", "layers": "num_layers", "heads": "num_heads",
        "head_dim": "d_kv", "ffn_dim": "d_ff", "buckets": "relative_attention_num_buckets",
    }  # fmt: skip
    return TextSizes(**{name: int(config[key]) for name, key in names.items() if key in config})
