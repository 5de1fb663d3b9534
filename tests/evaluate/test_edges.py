"""Edge fidelity: the distance of a shape's outline from the ideal form, in pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf

import numpy as np
import pytest
from numpy.typing import NDArray

from anyflow_cli.data import shapes_world
from anyflow_cli.data.shapes_world import FRAMES, WORLDS, Scene, render
from anyflow_cli.evaluate.shapes.observe import edge_error, observe
from anyflow_cli.evaluate.shapes.suite import EDGE_FIDELITY, score_video, score_videos
from tests.evaluate import damage
from tests.evaluate.damage import SCENES

OUTLINE = shapes_world.outline_distance


@contextmanager
def outlines(amplitude: float, waves: int) -> Iterator[None]:
    """Render shapes whose outline is a sine wave around the ideal one."""

    def wavy(
        shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float
    ) -> NDArray[np.float32]:
        waviness = np.float32(amplitude) * np.sin(waves * np.arctan2(dy, dx))
        return np.asarray(OUTLINE(shape, dx, dy, radius) + waviness)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_world, "outline_distance", wavy)
        yield


def error_of(scene: Scene) -> float:
    return edge_error(observe(render(scene)))


@pytest.mark.parametrize("world", list(WORLDS))
def test_clips_of_the_world_have_faithful_edges(world: str) -> None:
    scenes = [WORLDS[world].scene(seed) for seed in range(48)]
    errors = [error_of(scene) for scene in scenes]
    assert np.median(errors) < 0.06
    assert np.quantile(errors, 0.98) < 0.16  # the limit below which nothing is taken off
    result = score_videos([render(s) for s in scenes[:12]], [s.caption for s in scenes[:12]], world)
    assert (result.figures[EDGE_FIDELITY] or 0) > 99


@pytest.mark.parametrize("amplitude", [0.5, 1.0, 2.0])
def test_the_error_is_the_mean_displacement_of_the_outline(amplitude: float) -> None:
    with outlines(amplitude, waves=5):
        errors = [error_of(scene) for scene in SCENES]
    assert np.mean(errors) == pytest.approx(amplitude * 2 / np.pi, rel=0.1)  # mean of a rectified sine


def test_a_blob_has_a_lower_fidelity_and_the_same_total_as_without_the_figure() -> None:
    prompts = [scene.full_caption for scene in SCENES[:6]]
    clean = score_videos([render(scene) for scene in SCENES[:6]], prompts)
    with outlines(1.0, waves=3):
        blobs = score_videos([render(scene) for scene in SCENES[:6]], prompts)
    assert (blobs.figures[EDGE_FIDELITY] or 0) < 60 < 95 < (clean.figures[EDGE_FIDELITY] or 0)
    assert EDGE_FIDELITY not in clean.dimensions


def test_blur_and_a_missing_shape_lower_it() -> None:
    blurred = score_video(damage.blur(SCENES[0]), SCENES[0].full_caption).notes[EDGE_FIDELITY]
    assert blurred < 0.5
    empty = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    assert edge_error(observe(empty)) == inf
    assert score_video(empty, "a red circle").notes[EDGE_FIDELITY] == 0
    half = score_video(damage.vanishing(SCENES[1]), SCENES[1].full_caption).notes[EDGE_FIDELITY]
    assert half == pytest.approx(16 / 33, abs=0.02)
