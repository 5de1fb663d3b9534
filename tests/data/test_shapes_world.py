"""Scenes of the world: what is named is shown, and everything else is as the seed has it."""

from __future__ import annotations

from dataclasses import replace

from anyflow_cli.data.shapes_world import SHAPE_RADII, WORLDS, parse_caption

WORLD = WORLDS["shapes"]


def test_a_named_scene_shows_what_is_named() -> None:
    caption = "a large purple triangle moving up and left quickly on a navy background"
    for seed in range(8):
        assert parse_caption(WORLD.scene(seed, parse_caption(caption)).full_caption) == parse_caption(caption)


def test_what_is_not_named_stays_as_the_seed_has_it() -> None:
    for seed in range(8):
        scene = WORLD.scene(seed)
        other = WORLD.scene(seed, {"colour": "cyan"})
        assert other == replace(scene, color="cyan")
        larger = WORLD.scene(seed, {"size": "large"})
        assert larger.radius > 0.9 * SHAPE_RADII["large"]
        assert (larger.shape, larger.color, larger.background) == (
            scene.shape,
            scene.color,
            scene.background,
        )
