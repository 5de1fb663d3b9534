"""The built-in suite: the shapes world judged from pixels alone, by classical vision and no learned weights.

``unmix`` takes pixels apart, ``observe`` measures, ``score`` judges, ``conditioned`` holds a clip to the
picture it was to begin with, ``pieces`` judges along a clip, ``frechet`` compares whole sets. This file ties
them into a suite and offers ``score_videos`` to whoever has videos and prompts at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from anyflow_cli.data.shapes_world import FRAMES, HEIGHT, WIDTH, WORLDS, parse_caption
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.shapes.frechet import distance_to_world, features
from anyflow_cli.evaluate.shapes.i2v import I2V_DIMENSIONS, image_for, image_scores
from anyflow_cli.evaluate.shapes.observe import observe
from anyflow_cli.evaluate.shapes.pieces import piece_scores
from anyflow_cli.evaluate.shapes.score import (
    DIMENSIONS,
    quality_notes,
    quality_scores,
    right_attributes,
    semantic_scores,
)
from anyflow_cli.evaluate.suite import (
    IMAGE_TO_VIDEO,
    TEXT_TO_VIDEO,
    Assessment,
    Dimension,
    Image,
    SuiteClip,
    SuiteResult,
    VideoPixels,
    VideoScore,
    mean_of_videos,
    summarise,
)
from anyflow_cli.recipe.schema import ModelSection, Task

PROMPT_SEED = 2**41  # of the first scene whose caption is a prompt; far from training and from the reference


@dataclass(frozen=True)
class ShapesSuite:
    """The suite for one of the worlds; with the task ``i2v``, every video is given its first frame."""

    world: str = "shapes"
    task: Task = "t2v"
    version: int = 2
    from_files: bool = False

    @property
    def name(self) -> str:
        """``shapes``, or the name of the other world, and the task where it is not text to video."""
        return self.world if self.task == "t2v" else f"{self.world}-{self.task}"

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Quality, and what the prompt names; or quality, and what the picture shows."""
        return DIMENSIONS if self.task == "t2v" else I2V_DIMENSIONS

    @property
    def groups(self) -> Mapping[str, float]:
        """VBench's, or VBench-I2V's."""
        return TEXT_TO_VIDEO if self.task == "t2v" else IMAGE_TO_VIDEO

    def check(self, model: ModelSection) -> None:
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

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """First frames of clips of the world that show what the prompts name."""
        if self.task == "t2v":
            return None
        return [image_for(self.world, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Score clips one by one."""
        given = [None] * len(videos) if images is None else images
        return [score_video(*each) for each in zip(videos, prompts, given, strict=True)]

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Sum up what was seen while the videos were made."""
        return mean_of_videos([clip.score for clip in clips])

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Fréchet distance to fresh clips of the world."""
        return distance_to_world(self.world, features)


def score_videos(videos: Iterable[VideoPixels], prompts: Sequence[str], world: str = "shapes") -> SuiteResult:
    """Score clips (T, H, W, 3) uint8 against their prompts; the one call for training scripts."""
    suite = ShapesSuite(world)
    clips = list(videos)
    if len(clips) != len(prompts):
        message = f"There are {len(clips)} videos for {len(prompts)} prompts."
        raise UsageError(message, "Give one prompt a video.")
    return summarise(suite, suite.score(clips, prompts))


def score_video(video: VideoPixels, prompt: str, image: Image | None = None) -> VideoScore:
    """Score one clip (T, H, W, 3) uint8, also against the picture (H, W, 3) it was to begin with, if any."""
    _check(video)
    named = parse_caption(prompt)
    seen = observe(video)
    given = {} if image is None else image_scores(video, seen, image, named)
    return VideoScore(
        scores=quality_scores(seen, named) | semantic_scores(seen, named) | given,
        right=right_attributes(seen, named),
        features=features(video),
        notes={name: value for name, value in quality_notes(seen).items() if isfinite(value)},
        pieces=piece_scores(video, named),
    )


def _check(video: VideoPixels) -> None:
    if video.dtype != np.uint8 or video.shape != (FRAMES, HEIGHT, WIDTH, 3):
        raise UsageError(
            f"The suite shapes scores uint8 clips of shape {(FRAMES, HEIGHT, WIDTH, 3)}, "
            f"and this one is {video.dtype} {video.shape}.",
            "Evaluate a model of the shapes world, for example with the recipe `tiny`.",
        )
