"""The pictures that a teacher's videos start and end with, by index: of a table, or of a shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from anyflow_cli.data.clips import VIDEO_SUFFIXES
from anyflow_cli.data.prompts import PicturePaths, read_pictures
from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.data.video import ClipFormat, Pixels, UnusableClipError, from_pixels, read_image, read_start
from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.files import json_sha256


@dataclass(frozen=True)
class GivenPictures:
    """Pictures by index.

    Attributes:
        recipe: Size of the videos, the world, and whether there is a last picture.
        files: A table's, repeated until all indices have some; None: first and last frames of the world.
    """

    recipe: Recipe
    files: Sequence[PicturePaths] | None

    def of(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Pictures (3, H, W) in [0, 1] of a video: its first frame, and its last where the model takes it."""
        first, last = self._rendered(index) if self.files is None else self._read(index)
        given = first if last is None else np.stack((first, last))
        tensors = from_pixels(given.reshape(-1, *first.shape))
        return tensors[0], None if last is None else tensors[1]

    @property
    def record(self) -> str:
        """What determines the pictures, for the provenance: their paths and sizes, or the world."""
        if self.files is None:
            return f"the world {self.recipe.data.world}"
        named = [
            [str(path), path.stat().st_size] for files in self.files for path in files if path is not None
        ]
        return json_sha256(named)

    def _read(self, index: int) -> tuple[Pixels, Pixels | None]:
        assert self.files is not None
        first, last = self.files[index % len(self.files)]
        return self._picture(first), None if last is None else self._picture(last)

    def _picture(self, path: Path) -> Pixels:
        """A picture, or the first frame of a video."""
        model = self.recipe.model
        wanted = ClipFormat(1, model.fps, model.height, model.width)
        read = read_start if path.suffix.lower() in VIDEO_SUFFIXES else read_image
        try:
            clip = read(path, wanted)
        except UnusableClipError as error:
            hint = "Name a picture or a video in the table of prompts."
            raise UsageError(f"{path}: {error.message}.", hint) from error
        pixels: Pixels = clip.pixels[0]
        return pixels

    def _rendered(self, index: int) -> tuple[Pixels, Pixels | None]:
        from PIL import Image, ImageOps

        model = self.recipe.model
        clip = render(WORLDS[self.recipe.data.world].scene(self.recipe.synthesize.seed + index), model.frames)
        ends = [clip[0], *[clip[-1]] * (model.pictures == "first-last")]
        fitted = [ImageOps.fit(Image.fromarray(frame), (model.width, model.height)) for frame in ends]
        pixels: list[Any] = [np.asarray(frame, np.uint8) for frame in fitted]
        return pixels[0], pixels[1] if len(pixels) > 1 else None


def given_pictures(recipe: Recipe) -> GivenPictures | None:
    """The pictures of a recipe's data set; None where its videos are made from text alone.

    Raises:
        UsageError: The model needs pictures and the table of prompts names none.
    """
    rule = recipe.model.pictures
    if rule == "none":
        return None
    if recipe.data.prompts is None:
        return GivenPictures(recipe, None) if recipe.model.needs_pictures else None
    files = read_pictures(Path(recipe.data.prompts))
    if files is None:
        if recipe.model.needs_pictures:
            raise UsageError(
                f"Recipe {recipe.name} makes videos from pictures; {recipe.data.prompts} has no column "
                "'image'.",
                "Give a table (.csv, .jsonl, .parquet) with the columns prompt and image, and last_image for "
                "first-last.",
            )
        return None
    if rule == "first-last" and any(last is None for _, last in files):
        raise UsageError(f"{recipe.data.prompts} has rows without a last_image.", "Name one in each row.")
    return GivenPictures(recipe, [(first, last if rule == "first-last" else None) for first, last in files])
