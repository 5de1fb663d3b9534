"""Sizes of a pipeline that are known before it is downloaded: of a published Wan model, or of a local folder.

All published models have the same text encoder, UMT5-XXL, and all but Wan 2.2 TI2V-5B the VAE of Wan 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.layouts.components import component_config
from anyflow_cli.model.layouts.expert_files import split_places
from anyflow_cli.model.lora_formats import split_loras
from anyflow_cli.model.pipeline_io import BUILT_IN, component, has_components, read_config, resolve_pipeline

UMT5_XXL = {
    "vocab_size": 256_384, "d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10_240,
    "relative_attention_num_buckets": 32,
}  # fmt: skip


CLIP_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "image_size": 224,
    "patch_size": 14,
}


class PipelineSizes(NamedTuple):
    """Configurations of a pipeline's parts."""

    network: NetworkConfig
    text: Mapping[str, Any] = UMT5_XXL
    vae: Mapping[str, Any] = {}  # of diffusers' class, whose defaults are those of Wan 2.1
    image: Mapping[str, Any] = CLIP_H

    @property
    def text_sizes(self) -> dict[str, int]:
        """Configuration of the text encoder, with UMT5-XXL's values where it states none."""
        return {key: self.text.get(key, value) for key, value in UMT5_XXL.items()}

    @property
    def text_parameters(self) -> int:
        """Weights of the encoder: gated feed-forward, a table of relative positions in every layer."""
        size = self.text_sizes
        dim, heads = size["d_model"], size["num_heads"]
        attention = 4 * dim * heads * size["d_kv"] + size["relative_attention_num_buckets"] * heads
        layer = attention + 3 * dim * size["d_ff"] + 2 * dim
        return int(size["vocab_size"] * dim + size["num_layers"] * layer + dim)

    @property
    def image_parameters(self) -> int:
        """Weights of CLIP's vision tower, where the network takes its tokens."""
        if self.network.image_dim is None:
            return 0
        dim, inner, layers, image, patch = (self.image.get(key, value) for key, value in CLIP_H.items())
        embeddings = dim * (3 * patch**2 + 1 + (image // patch) ** 2 + 1)
        layer = 4 * dim * (dim + 1) + 2 * dim * inner + inner + dim + 4 * dim
        return int(embeddings + layers * layer + 4 * dim)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a video's latents."""
        space, time = self.vae.get("scale_factor_spatial") or 8, self.vae.get("scale_factor_temporal") or 4
        return (frames - 1) // time + 1, self.network.out_channels, height // space, width // space


def pipeline_sizes(address: str, components: str | None = None) -> PipelineSizes:
    """The sizes of the model at ``address``; nothing is downloaded.

    A model without text encoder and VAE has those of ``components``.
    """
    address = split_loras(address)[0]
    if address in KNOWN_MODELS:
        known = KNOWN_MODELS[address]
        return PipelineSizes(known.network, vae=known.vae)
    is_here = Path(address).expanduser().exists() or split_places(address) is not None
    if address not in BUILT_IN and not is_here:
        hint = f"Name a local folder, or one of {', '.join(KNOWN_MODELS)}."
        raise UsageError(f"The sizes of {address} are not known without its files.", hint)
    folder = resolve_pipeline(address)
    if not has_components(folder) and components is not None:
        other = pipeline_sizes(components)
        return other._replace(network=read_config(folder))
    network = read_config(folder)
    parts = ("text_encoder", "vae", "image_encoder")[: 2 if network.image_dim is None else 3]
    return PipelineSizes(network, *(component_config(component(folder, part)) for part in parts))
