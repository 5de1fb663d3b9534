"""Scores of single latent frames: uniformly high on clips of the world, low where a clip is damaged."""

from __future__ import annotations

import numpy as np

from anyflow_cli.data.shapes_world import render
from anyflow_cli.evaluate.shapes.score import latent_frame_slices, piece_scores
from tests.evaluate import damage
from tests.evaluate.damage import SCENES


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
