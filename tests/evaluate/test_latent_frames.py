"""Scores of single latent frames: uniformly high on clips of the world, low where a clip is damaged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyflow_cli.data.shapes_world import render
from anyflow_cli.evaluate.shapes.observe import observe, observe_parts
from anyflow_cli.evaluate.shapes.score import latent_frame_slices, piece_scores
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from tests.evaluate import damage
from tests.evaluate.damage import SCENES, Damage


def test_each_frame_belongs_to_one_latent_frame() -> None:
    parts = latent_frame_slices(33)
    assert [t for part in parts for t in range(33)[part]] == list(range(33))
    assert [part.stop - part.start for part in parts] == [1] + [4] * 8


def test_clips_of_the_world_score_high_at_every_latent_frame() -> None:
    pieces = [piece_scores(render(scene), {"shape": scene.shape, "colour": scene.color}) for scene in SCENES]
    for name in pieces[0][0]:
        mean = np.mean([[piece[name] for piece in clip] for clip in pieces], axis=0)
        assert mean.min() > 0.97, name


def test_a_defect_affects_only_its_own_latent_frames() -> None:
    scene = SCENES[0]
    whole, spoiled = render(scene), damage.blur(scene)
    mixed = piece_scores(np.concatenate([whole[:13], spoiled[13:]]), {})
    assert mixed[:4] == piece_scores(whole, {})[:4]
    assert mixed[4:] == piece_scores(spoiled, {})[4:]
    assert max(piece["sharpness"] for piece in mixed[4:]) < 0.5


@pytest.mark.parametrize(
    "spoil", [damage.noise, damage.vanishing, damage.ghost, damage.flicker, damage.no_dots]
)
def test_parts_are_measured_together_as_alone(spoil: Damage) -> None:
    video, parts = spoil(SCENES[2]), latent_frame_slices(33)
    for part, together in zip(parts, observe_parts(video, parts), strict=True):
        alone = observe(video[part])
        for name, value in vars(alone.track).items():
            assert np.array_equal(value, getattr(together.track, name)), name
        for name, value in vars(alone.dots).items():
            assert np.array_equal(value, getattr(together.dots, name)), name
        for name in ("forms", "steepness", "unexplained", "background_share"):
            assert getattr(alone, name) == getattr(together, name), name


def test_latent_frames_are_left_out_on_request() -> None:
    videos, prompts = [render(scene) for scene in SCENES[:2]], [scene.caption for scene in SCENES[:2]]
    scored = ShapesSuite().score(videos, prompts)
    assert ShapesSuite(pieces=False).score(videos, prompts) == [replace(s, pieces=()) for s in scored]
