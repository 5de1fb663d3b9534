"""The built-in suite: clips of the shapes world, scored from pixels by classical vision.

``unmix`` decomposes pixels, ``observe`` measures clips, ``score`` turns measurements into scores, ``i2v``
compares a clip with its conditioning image, and ``frechet`` compares sets of clips. This module combines them
into a suite; ``score_videos`` scores any videos and prompts in one call.
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
from anyflow_cli.evaluate.shapes.score import (
    DIMENSIONS,
    edge_fidelity,
    piece_scores,
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
    summarize,
)
from anyflow_cli.recipe.schema import ModelSection, Task

EDGE_FIDELITY = "edge fidelity"
PROMPT_SEED = 2**41  # scene of the first prompt; far from the training and the reference scenes


@dataclass(frozen=True)
class ShapesSuite:
    """The suite of one world; with the task ``i2v``, each video is conditioned on its first frame.

    ``pieces`` says whether to score each latent frame too, which takes longer than all other scores.
    """

    world: str = "shapes"
    task: Task = "t2v"
    version: int = 2
    from_files: bool = False
    pieces: bool = True

    @property
    def name(self) -> str:
        """Name of the world, with the task appended unless it is text-to-video."""
        return self.world if self.task == "t2v" else f"{self.world}-{self.task}"

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Quality and semantic dimensions; for ``i2v`` quality and agreement with the image."""
        return DIMENSIONS if self.task == "t2v" else I2V_DIMENSIONS

    @property
    def figures(self) -> tuple[str, ...]:
        """Edge fidelity."""
        return (EDGE_FIDELITY,)

    @property
    def groups(self) -> Mapping[str, float]:
        """Weights of VBench, or of VBench-I2V."""
        return TEXT_TO_VIDEO if self.task == "t2v" else IMAGE_TO_VIDEO

    def check(self, model: ModelSection) -> None:
        """Raise a UsageError for a model whose videos differ in size from the world's."""
        if (model.frames, model.height, model.width) != (FRAMES, HEIGHT, WIDTH):
            raise UsageError(
                f"The suite {self.name} scores videos of {FRAMES} frames at {HEIGHT}x{WIDTH}; "
                f"this recipe generates {model.frames} frames at {model.height}x{model.width}.",
                "Evaluate a model of the shapes world, for example with the recipe tiny.",
            )

    def prompts(self, count: int) -> list[str]:
        """Captions of scenes that are not in any training data."""
        return [WORLDS[self.world].scene(PROMPT_SEED + i).caption for i in range(count)]

    def images(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image] | None:
        """First frames of clips of the world with the attributes the prompts name."""
        if self.task == "t2v":
            return None
        return [image_for(self.world, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]

    def score(
        self, videos: Sequence[VideoPixels], prompts: Sequence[str], images: Sequence[Image] | None = None
    ) -> list[VideoScore]:
        """Score clips one by one."""
        conditions = [None] * len(videos) if images is None else images
        each = zip(videos, prompts, conditions, strict=True)
        return [score_video(*clip, pieces=self.pieces) for clip in each]

    def assess(self, clips: Sequence[SuiteClip], directory: Path) -> Assessment:
        """Average the scores that were taken while the videos were generated."""
        return mean_of_videos([clip.score for clip in clips])

    def distance(self, features: Sequence[Sequence[float]]) -> float | None:
        """Fréchet distance to fresh clips of the world."""
        return distance_to_world(self.world, features)


def score_videos(videos: Iterable[VideoPixels], prompts: Sequence[str], world: str = "shapes") -> SuiteResult:
    """Score clips (T, H, W, 3) uint8 against their prompts."""
    suite = ShapesSuite(world)
    clips = list(videos)
    if len(clips) != len(prompts):
        raise UsageError(
            f"There are {len(clips)} videos but {len(prompts)} prompts.", "Give one prompt per video."
        )
    return summarize(suite, suite.score(clips, prompts))


def score_video(
    video: VideoPixels, prompt: str, image: Image | None = None, *, pieces: bool = True
) -> VideoScore:
    """Score one clip (T, H, W, 3) uint8, also against its conditioning image (H, W, 3) if there is one.

    Without ``pieces``, its latent frames are not scored.
    """
    _check(video)
    named = parse_caption(prompt)
    seen = observe(video)
    notes = quality_notes(seen) | {EDGE_FIDELITY: edge_fidelity(seen)}
    kept = {} if image is None else image_scores(video, seen, image, named)
    return VideoScore(
        scores=quality_scores(seen, named) | semantic_scores(seen, named) | kept,
        right=right_attributes(seen, named),
        features=features(video),
        notes={name: value for name, value in notes.items() if isfinite(value)},
        pieces=piece_scores(video, named) if pieces else (),
    )


def _check(video: VideoPixels) -> None:
    if video.dtype != np.uint8 or video.shape != (FRAMES, HEIGHT, WIDTH, 3):
        raise UsageError(
            f"The suite shapes scores uint8 clips of shape {(FRAMES, HEIGHT, WIDTH, 3)}; "
            f"this clip is {video.dtype} {video.shape}.",
            "Evaluate a model of the shapes world, for example with the recipe tiny.",
        )
