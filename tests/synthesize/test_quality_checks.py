from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.data.video import from_pixels
from anyflow_cli.synthesize.quality_checks import MOVED, find_defect

LATENTS = torch.zeros(3, 4, 8, 8)


def clip(world: str = "shapes", seed: int = 0) -> Tensor:
    return from_pixels(render(WORLDS[world].scene(seed)))


@pytest.mark.parametrize("world", WORLDS)
def test_clips_of_the_worlds_pass(world: str) -> None:
    assert [find_defect(LATENTS, clip(world, seed)) for seed in range(30)] == [None] * 30


def test_each_fault_is_named() -> None:
    video = clip()
    hole = video.clone()
    hole[5, 1, 2, 3] = float("nan")
    assert find_defect(LATENTS, hole) == "not finite"
    assert find_defect(LATENTS + float("inf"), video) == "not finite"
    assert find_defect(LATENTS, torch.full_like(video, 0.02)) == "black"
    assert find_defect(LATENTS, video[:1].expand_as(video)) == "frozen"
    assert find_defect(LATENTS, (video - video.mean() > 0).float()) == "saturated"


def test_flicker_is_not_motion() -> None:
    still = clip()[:1].expand(33, -1, -1, -1)
    flicker = still + MOVED / 2 * (
        torch.rand(33, 1, 64, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    )
    assert find_defect(LATENTS, flicker.clamp(0, 1)) == "frozen"


def test_a_single_frame_is_not_frozen() -> None:
    assert find_defect(LATENTS, clip()[:1]) is None
