"""The autoencoder trains on all frames at once and is used frame by frame through caches: both agree."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample

from tests.scripts.script import load


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``scripts/tiny/vae.py`` as a module."""
    return load("tiny/vae.py")


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_a_pass_over_all_frames_equals_the_cached_passes(
    script: ModuleType, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**{**script.CONFIG, "base_dim": 8}).eval()
    video = torch.rand(2, 3, frames, 16, 16) - 0.5
    with torch.no_grad():
        cached = vae.encode(video).latent_dist.parameters
        latents = cached.chunk(2, dim=1)[0]
        pixels = vae.decode(latents).sample
        for patched in (WanCausalConv3d, WanResample):
            monkeypatch.setattr(patched, "forward", patched.forward)
        monkeypatch.setattr(AutoencoderKLWan, "_encode", AutoencoderKLWan._encode)
        script.pass_all_frames_at_once()
        assert torch.allclose(vae.encode(video).latent_dist.parameters, cached, atol=1e-5)
        assert torch.allclose(script.decode(vae, latents).clamp(-1, 1), pixels, atol=1e-5)
