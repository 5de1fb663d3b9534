"""The built-in suite: the shapes world judged from pixels alone, by classical vision and no learned weights.

``unmix`` takes pixels apart, ``observe`` measures, ``score`` judges, ``frechet`` compares whole sets. This
file ties them into a suite and offers ``score_videos`` to whoever has videos and prompts at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from anyflow_cli.data.world import FRAMES, HEIGHT, WIDTH, WORLDS, parse_caption
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.shapes.frechet import distance_to_world, features
from anyflow_cli.evaluate.shapes.observe import observe
from anyflow_cli.evaluate.shapes.score import (
    DIMENSIONS,
    quality_notes,
    quality_scores,
    right_attributes,
    semantic_scores,
)
from anyflow_cli.evaluate.suite import (
    TEXT_TO_VIDEO,
    Dimension,
    SuiteResult,
    Video,
    VideoScore,
    summarise,
)
from anyflow_cli.recipe.schema import Model

PROMPT_SEED = 2**41  # of the first scene whose caption is a prompt; far from training and from the reference


@dataclass(frozen=True)
class ShapesSuite:
    """The suite for one of the worlds."""

    world: str = "shapes"
    version: int = 1
    dimensions: tuple[Dimension, ...] = DIMENSIONS
    groups: Mapping[str, float] = field(default_factory=lambda: TEXT_TO_VIDEO)

    @property
    def name(self) -> str:
        """``shapes``, or the name of the other world."""
        return self.world

    def check(self, model: Model) -> None:
        """Refuse videos of another size than the world's."""
        if (model.frames, model.height, model.width) != (FRAMES, HEIGHT, WIDTH):
            raise UsageError(
                f"The suite {self.name} scores {FRAMES} frames of {HEIGHT}x{WIDTH}, "
                f"and this recipe makes {model.frames} frames of {model.height}x{model.width}.",
                "Evaluate a model of the shapes world, for example with the recipe `tiny`.",
            )

    def prompts(self, count: int) -> list[str]:
        """Captions of scenes nobody trains on."""
        return [WORLDS[self.world].scene(PROMPT_SEED + i).caption for i in range(count)]

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> list[VideoScore]:
        """Score clips one by one."""
        return [score_video(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Fréchet distance to fresh clips of the world."""
        return distance_to_world(self.world, features)


def score_videos(videos: Iterable[Video], prompts: Sequence[str], world: str = "shapes") -> SuiteResult:
    """Score clips (T, H, W, 3) uint8 against their prompts; the one call for training scripts."""
    suite = ShapesSuite(world)
    clips = list(videos)
    if len(clips) != len(prompts):
        message = f"There are {len(clips)} videos for {len(prompts)} prompts."
        raise UsageError(message, "Give one prompt a video.")
    return summarise(suite, suite.score(clips, prompts))


def score_video(video: Video, prompt: str) -> VideoScore:
    """Score one clip (T, H, W, 3) uint8."""
    _check(video)
    named = parse_caption(prompt)
    seen = observe(video)
    return VideoScore(
        scores=quality_scores(seen, named) | semantic_scores(seen, named),
        right=right_attributes(seen, named),
        features=features(video),
        notes={name: value for name, value in quality_notes(seen).items() if isfinite(value)},
    )


def _check(video: Video) -> None:
    if video.dtype != np.uint8 or video.shape != (FRAMES, HEIGHT, WIDTH, 3):
        raise UsageError(
            f"The suite shapes scores uint8 clips of shape {(FRAMES, HEIGHT, WIDTH, 3)}, "
            f"and this one is {video.dtype} {video.shape}.",
            "Evaluate a model of the shapes world, for example with the recipe `tiny`.",
        )
