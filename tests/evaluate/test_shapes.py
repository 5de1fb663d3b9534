"""The suite on intact and damaged clips of the world: each defect lowers its own dimension."""

from __future__ import annotations

import time
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import FRAMES, HEIGHT, WIDTH, WORLDS, render
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.shapes.suite import ShapesSuite, score_video, score_videos
from anyflow_cli.evaluate.suite import SuiteResult
from tests.evaluate import damage
from tests.evaluate.damage import SCENES, Damage

NAMES = tuple(dimension.name for dimension in ShapesSuite().dimensions)
PROMPTS = [scene.full_caption for scene in SCENES]


@lru_cache(maxsize=32)
def scored(damage_of: Damage) -> SuiteResult:
    return score_videos([damage_of(scene) for scene in SCENES], PROMPTS)


@pytest.mark.parametrize("world", list(WORLDS))
def test_clips_of_the_world_score_close_to_100(world: str) -> None:
    scenes = [WORLDS[world].scene(seed) for seed in range(32)]
    result = score_videos([render(s) for s in scenes], [s.caption for s in scenes], world)
    assert not result.missing
    assert min(result.dimensions.values()) >= 97
    assert result.total is not None
    assert result.total >= 99
    assert result.correct == 100


# Upper bounds that each defect must reach in its own dimensions; all others keep at least 90.
DEFECTS: dict[str, tuple[Damage, dict[str, float], set[str]]] = {
    # defect                        its own dimensions: at most           may drop with them
    "shape":      (damage.wrong_shape,      {"shape": 5},                         set()),
    "colour":     (damage.wrong_colour,     {"colour": 5},                        set()),
    "size":       (damage.wrong_size,       {"size": 5},                          set()),
    "background": (damage.wrong_background, {"background": 5},                    set()),
    "reversed":   (damage.reversed_motion,  {"direction": 5},                     set()),
    "pace":       (damage.other_pace,       {"speed": 5, "dynamic degree": 60},   set()),
    "frozen":     (damage.frozen,           {"dynamic degree": 5},                {"direction", "speed"}),
    "jitter":     (damage.jittered,         {"motion smoothness": 60},            set()),
    "blur":       (damage.blur,             {"sharpness": 25},                    {"details"}),
    "noise":      (damage.noise,            {"artefacts": 60},                    {"sharpness"}),
    "saturation": (damage.saturation,       {"artefacts": 60},                    set()),
    "flicker":    (damage.flicker,          {"temporal consistency": 30},
                   {"artefacts", "motion smoothness", "details", "colour", "size", "shape"}),
    "ghost":      (damage.ghost,            {"artefacts": 60, "details": 60},
                   {"sharpness", "shape", "size", "colour", "motion smoothness"}),
    "a dot less": (damage.a_dot_less,       {"details": 75},                      set()),
    "a dot more": (damage.a_dot_more,       {"details": 80},                      {"artefacts"}),
    "vanishing":  (damage.vanishing,        {"temporal consistency": 60, "motion smoothness": 60},
                   {"shape", "colour", "size", "sharpness"}),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_lowers_its_own_dimension(defect: str) -> None:
    damage_of, own, with_it = DEFECTS[defect]
    result = scored(damage_of)
    for name, most in own.items():
        assert result.dimensions[name] <= most, (name, result.dimensions)
    others = set(NAMES) - set(own) - with_it
    assert {n: result.dimensions[n] for n in others if result.dimensions[n] < 90} == {}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_lowers_total(defect: str) -> None:
    total = scored(DEFECTS[defect][0]).total
    assert total is not None
    assert total < 97.5


def test_a_stronger_defect_lowers_scores_more() -> None:
    steps = [damage.levels(partial(damage.blurred_by, sigma)) for sigma in (0.4, 0.7, 1.2)]
    scores = [score_videos([defect(s) for s in SCENES[:6]], PROMPTS[:6]).dimensions for defect in steps]
    for name in ("sharpness", "details"):
        assert scores[0][name] > scores[1][name] + 10 > scores[2][name] + 20


@pytest.mark.parametrize("level", [0, 255])
def test_a_uniform_clip_scores_zero(level: int) -> None:
    empty = np.full((FRAMES, HEIGHT, WIDTH, 3), level, np.uint8)
    result = score_videos([empty] * len(PROMPTS), PROMPTS)
    assert result.groups["quality"] == 0
    assert result.correct == 0


def test_random_pixels_score_close_to_zero() -> None:
    rng = np.random.default_rng(0)
    static = [rng.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8) for _ in PROMPTS]
    result = score_videos(static, PROMPTS)
    assert result.total is not None
    assert result.total < 10


# Sums of all quality scores, of all semantic scores, and of all scores of latent frames, of scene 3.
SUMS = {
    "clean": (6.000000, 6.000000, 63.000000),
    "noise": (4.686083, 5.969697, 51.109180),
    "blur": (4.394310, 5.727273, 45.509256),
    "ghost": (2.930019, 5.268853, 36.871873),
    "flicker": (4.928058, 5.989707, 61.696601),
    "vanishing": (4.454545, 4.454545, 42.000000),
    "a dot more": (5.560299, 6.000000, 59.043753),
    "jitter": (5.405105, 5.999992, 62.994778),
}


@pytest.mark.parametrize("name", SUMS)
def test_scores_are_the_recorded_ones(name: str) -> None:
    damage_of = DEFECTS[name][0] if name in DEFECTS else render
    score = score_video(damage_of(SCENES[3]), PROMPTS[3])
    quality = [value for key, value in score.scores.items() if key not in score.right]
    semantic = [score.scores[key] for key in score.right]
    pieces = [value for piece in score.pieces for value in piece.values()]
    sums = [sum(map(float, values)) for values in (quality, semantic, pieces)]
    assert sums == pytest.approx(SUMS[name], abs=1e-5)


def test_only_attributes_named_by_the_prompt_are_scored() -> None:
    score = score_video(render(SCENES[0]), f"a {SCENES[0].color} {SCENES[0].shape}")
    assert set(score.right) == {"colour", "shape"}
    assert "size" not in score.scores
    assert "sharpness" in score.scores


def test_a_video_is_correct_only_if_all_named_attributes_are_right() -> None:
    spoiled = [damage.wrong_colour(SCENES[0]), *(render(scene) for scene in SCENES[1:4])]
    assert score_videos(spoiled, PROMPTS[:4]).correct == 75


def test_prompts_are_fixed_and_varied() -> None:
    suite = ShapesSuite()
    assert suite.prompts(64)[:16] == suite.prompts(16)
    assert len(set(suite.prompts(64))) > 55


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8),
        np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((5, HEIGHT, WIDTH, 3), np.uint8),
    ],
)
def test_a_clip_of_another_shape_or_type_is_refused(video: NDArray[Any]) -> None:
    with pytest.raises(UsageError, match=r"shape \(33, 64, 64, 3\)") as error:
        score_video(video, "a red circle")
    assert error.value.hint


def test_counts_must_agree() -> None:
    with pytest.raises(UsageError, match="1 videos but 2 prompts"):
        score_videos([render(SCENES[0])], PROMPTS[:2])


def test_a_clip_takes_milliseconds() -> None:
    clips = [render(scene) for scene in SCENES[:8]]
    score_video(clips[0], PROMPTS[0])
    start = time.process_time()
    for clip in clips:
        score_video(clip, PROMPTS[0])
    assert (time.process_time() - start) / len(clips) < 0.25  # about 0.06 on a busy core
