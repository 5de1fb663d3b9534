"""Dimensions of image-to-video: the world's clips score high, each defect lowers its own dimension."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from anyflow_cli.data.shapes_world import (
    BACKGROUNDS,
    FRAMES,
    SHAPES,
    WORLDS,
    RgbPixels,
    Scene,
    parse_caption,
    render,
)
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.suite import Image, SuiteResult, summarize
from tests.evaluate import damage
from tests.evaluate.damage import Damage, after

SUITE = ShapesSuite(task="i2v")
SCENES = [replace(s, start=(32 - 16 * s.step[0], 32 - 16 * s.step[1])) for s in damage.SCENES[:6]]  # inside
PROMPTS = [scene.full_caption for scene in SCENES]
I2V = tuple(d.name for d in SUITE.dimensions if d.group == "i2v")


def images(scenes: list[Scene]) -> list[Image]:
    return [render(scene, 1)[0] for scene in scenes]


@lru_cache(maxsize=16)
def scored(change: Damage) -> SuiteResult:
    return summarize(SUITE, SUITE.score([change(scene) for scene in SCENES], PROMPTS, images(SCENES)))


@pytest.mark.parametrize("world", list(WORLDS))
def test_clips_conditioned_on_their_own_first_frame_score_close_to_100(world: str) -> None:
    suite, scenes = ShapesSuite(world, "i2v"), [WORLDS[world].scene(seed) for seed in range(12)]
    scores = suite.score([render(s) for s in scenes], [s.caption for s in scenes], images(scenes))
    result = summarize(suite, scores)
    assert not result.missing
    assert min(result.dimensions.values()) >= 97
    assert result.groups.keys() == {"quality", "i2v"}
    assert result.total == pytest.approx(sum(v for v in result.groups.values() if v) / 2)


def other_start(scene: Scene) -> RgbPixels:
    """Replace the background of the first frame."""
    return np.concatenate([damage.wrong_background(scene)[:1], render(scene)[1:]])


def frozen(scene: Scene) -> RgbPixels:
    """Repeat the image."""
    return np.repeat(render(scene, 1), FRAMES, axis=0)


def changed(**values: object) -> Damage:
    """Keep the first frame and render all others with other attributes."""
    change = damage.redrawn(**values)
    return lambda scene: np.concatenate([render(scene, 1), change(scene)[1:]])


def displaced(scene: Scene) -> RgbPixels:
    """Displace the shape by eight pixels across its motion from the second frame on."""
    x, y = scene.start
    start = (x, y + 8) if scene.step[0] else (x + 8, y)
    return np.concatenate([render(scene, 1), render(replace(scene, start=start))[1:]])


DEFECTS: dict[str, tuple[Damage, str, float]] = {
    # defect            its own dimension and the bound that it must reach
    "other start":    (other_start, "first frame", 10),
    "other shape":    (changed(shape=lambda s: after(SHAPES, s.shape)), "subject kept", 50),
    "other colour":   (changed(color=lambda s: after(damage.WORLD.colors, s.color)), "subject kept", 10),
    "other size":     (changed(radius=lambda s: 0.7 * s.radius), "subject kept", 10),
    "other ground":   (changed(background=lambda s: after(BACKGROUNDS, s.background)), "background kept", 10),
    "no dots":        (changed(dots=()), "background kept", 10),
    "dots elsewhere": (changed(dots=lambda s: tuple((64 - x, y) for x, y in s.dots)), "background kept", 25),
    "displaced":      (displaced, "motion from the image", 10),
    "frozen":         (frozen, "motion from the image", 5),
    "backwards":      (changed(step=lambda s: (-s.step[0] / 4, -s.step[1] / 4)), "motion from the image", 5),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_lowers_its_own_dimension(defect: str) -> None:
    change, own, most = DEFECTS[defect]
    result = scored(change)
    assert result.dimensions[own] <= most, result.dimensions
    assert {n: result.dimensions[n] for n in I2V if n != own and result.dimensions[n] < 90} == {}


def test_a_uniform_clip_scores_zero() -> None:
    empty = [np.full((FRAMES, 64, 64, 3), 255, np.uint8)] * len(SCENES)
    result = summarize(SUITE, SUITE.score(empty, PROMPTS, images(SCENES)))
    assert result.groups["i2v"] is not None
    assert result.groups["i2v"] < 1


@pytest.mark.parametrize(
    "prompt", ["a small red circle moving left slowly on a navy background", "a blue square"]
)
def test_the_image_shows_what_the_prompt_names(prompt: str) -> None:
    made = SUITE.images([prompt], [7])
    assert made is not None
    seen = ShapesSuite().score([np.repeat(made[0][None], FRAMES, axis=0)], [prompt])[0]
    assert all(seen.right[name] for name in parse_caption(prompt) if name not in ("direction", "speed"))


def test_the_image_is_determined_by_prompt_and_seed() -> None:
    first = SUITE.images(["a red circle"] * 3, [1, 1, 2])
    assert first is not None
    assert (first[0] == first[1]).all()
    assert (first[0] != first[2]).any()
    assert ShapesSuite().images(["a red circle"], [1]) is None
