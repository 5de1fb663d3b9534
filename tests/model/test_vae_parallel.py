"""Several processes that each have rows of the picture decode what one process does, up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from anyflow_cli.model.context_parallel import context_groups
from anyflow_cli.model.encoders import VideoVAE
from tests.model.helpers import distance
from tests.train.ranks import start

TOLERANCE = 1e-5  # fp32, relative to the largest value
KINDS: dict[str, dict[str, Any]] = {
    "Wan 2.1": {},
    "Wan 2.2": {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
                "scale_factor_spatial": 16},
}  # fmt: skip


def random_vae(kind: str) -> VideoVAE:
    """A small VAE of which all weights matter, equal in every process."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    statistics: dict[str, Any] = {"latents_mean": [0.1] * 4, "latents_std": [1.5] * 4}
    model = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **statistics, **KINDS[kind])
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return VideoVAE(model)


def check(kind: str, size: int, rows: int) -> None:
    latents = torch.randn(1, 3, 4, rows, 5, generator=torch.Generator().manual_seed(1))
    alone, shared = random_vae(kind), random_vae(kind)
    shared.share(context_groups(size, [size], "cpu")[size])
    wanted = alone.decode(latents)
    assert distance(shared.decode(latents), wanted) < TOLERANCE
    decoding = shared.decoding()
    streamed = torch.cat([decoding(latents[:, :1]), decoding(latents[:, 1:])], dim=1)
    assert distance(streamed, wanted) < TOLERANCE
    tiled = [in_tiles(vae, latents) for vae in (alone, shared)]
    assert distance(tiled[1], tiled[0]) < TOLERANCE
    assert distance(tiled[0], wanted) > 1e-3


def in_tiles(vae: VideoVAE, latents: Tensor) -> Tensor:
    """The same in tiles of 4 latents, of which two are blended."""
    space = vae.spatial_factor
    vae._model.enable_tiling(4 * space, 4 * space, 2 * space, 2 * space)
    return vae.decode(latents)


def run_all(size: int, all_rows: tuple[int, ...]) -> None:
    distributed.init_process_group("gloo")
    for kind in KINDS:
        for rows in all_rows:
            check(kind, size, rows)


def test_two_processes_decode_what_one_does() -> None:
    """Rows divide or not, as they do in the last tiles; a tile of one row is decoded by both."""
    assert start(2, run_all, 2, (5,)) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [4, 2])
def test_four_processes_decode_what_one_does(size: int) -> None:
    assert start(4, run_all, size, (7, 8)) == [0] * 4
