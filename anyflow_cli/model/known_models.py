"""Facts about published models that are needed before their files are downloaded.

Sizes of the networks: the ``config.json`` files of the repositories on the Hugging Face Hub. Download sizes:
the transformer (fp32 for Wan, bf16 for AnyFlow), the UMT5-XXL encoder and the VAE (both fp32; the encoder of
Wan 2.2 A14B is bf16, by its number of shards). Those of I2V, FLF2V and TI2V models are computed, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.layouts.components import VAE_22

APACHE = "Apache-2.0"
NON_COMMERCIAL = "NVIDIA, non-commercial use only"

_WAN_1B = NetworkConfig(heads=12, head_dim=128, layers=30, ffn_dim=8960)
_WAN_14B = NetworkConfig(heads=40, head_dim=128, layers=40, ffn_dim=13824)
_WAN_5B = NetworkConfig(heads=24, head_dim=128, layers=30, ffn_dim=14336, in_channels=48, out_channels=48)
_I2V_14B = replace(_WAN_14B, in_channels=36, image_dim=1280)


class KnownModel(NamedTuple):
    """A published pipeline.

    Attributes:
        network: Sizes of its transformer.
        license: License of its weights.
        download: Size of its files in GB (10^9 bytes).
        vae: Configuration of its VAE where it differs from the defaults of diffusers' class, Wan 2.1's.
    """

    network: NetworkConfig
    license: str
    download: int
    vae: Mapping[str, Any] = {}


KNOWN_MODELS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": KnownModel(_WAN_1B, APACHE, 29),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": KnownModel(_WAN_14B, APACHE, 80),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": KnownModel(_WAN_5B, APACHE, 45, VAE_22),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": KnownModel(replace(_WAN_14B, boundary=0.875), APACHE, 126),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": KnownModel(
        replace(_WAN_14B, in_channels=36, boundary=0.9), APACHE, 126
    ),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": KnownModel(_I2V_14B, APACHE, 91),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": KnownModel(_I2V_14B, APACHE, 91),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": KnownModel(replace(_I2V_14B, image_tokens=514), APACHE, 91),
    "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers": KnownModel(
        replace(_WAN_1B, two_time=True), NON_COMMERCIAL, 26
    ),
    "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers": KnownModel(
        replace(_WAN_14B, two_time=True), NON_COMMERCIAL, 52
    ),
    "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers": KnownModel(
        replace(_WAN_1B, two_time=True, causal=CausalConfig()), NON_COMMERCIAL, 26
    ),
    "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers": KnownModel(
        replace(_WAN_14B, two_time=True, causal=CausalConfig()), NON_COMMERCIAL, 52
    ),
}
