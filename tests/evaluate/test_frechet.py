"""The Fréchet distance against closed forms, and the feature space against known defects."""

from __future__ import annotations

import numpy as np
import pytest

from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.evaluate.shapes.frechet import distance_to_world, features, frechet_distance
from tests.evaluate import damage
from tests.evaluate.damage import Damage


def test_diagonal_gaussians_have_the_closed_form_distance() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(200_000, 3)), rng.normal(size=(200_000, 3)) * [1, 2, 3] + [1, 0, 0]
    # |m - n|^2 + sum (s - t)^2
    assert frechet_distance(one, two) == pytest.approx(1 + 0 + 1 + 4, rel=0.02)


def test_it_is_zero_for_equal_sets_symmetric_and_invariant_to_rotation() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(100, 5)), rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, two) == pytest.approx(frechet_distance(two, one))
    assert frechet_distance(one @ turn, two @ turn) == pytest.approx(frechet_distance(one, two))


def test_fewer_clips_than_features_are_allowed() -> None:
    rng = np.random.default_rng(2)
    assert frechet_distance(rng.normal(size=(10, 64)), rng.normal(size=(500, 64))) > 0


def test_a_clip_has_64_finite_reproducible_features() -> None:
    values = features(render(damage.SCENES[0]))
    assert len(values) == 64
    assert np.isfinite(values).all()
    assert values == features(render(damage.SCENES[0]))


@pytest.mark.parametrize("spoil", [damage.blur, damage.noise, damage.ghost, damage.frozen, damage.no_dots])
def test_damaged_clips_are_farther_away_than_fresh_ones(spoil: Damage) -> None:
    scenes = [WORLDS["shapes"].scene(seed) for seed in range(32)]
    fresh = distance_to_world("shapes", [features(render(scene)) for scene in scenes])
    spoiled = distance_to_world("shapes", [features(spoil(scene)) for scene in scenes])
    assert fresh is not None
    assert spoiled is not None
    assert spoiled > 1.3 * fresh


def test_one_clip_has_no_distance() -> None:
    assert distance_to_world("shapes", [features(render(damage.SCENES[0]))]) is None
