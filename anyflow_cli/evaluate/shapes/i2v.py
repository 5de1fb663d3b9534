"""Scores of a clip relative to its conditioning image: whether it starts with the image and continues it.

The image is measured as a clip of one frame, and every frame of the video is compared with it. The limits are
in the table of ``score.py``.

Legend: T frames, H W height and width.
"""

from __future__ import annotations

import hashlib
from math import hypot

import numpy as np

from anyflow_cli.data.shapes_world import WORLDS, parse_caption, render
from anyflow_cli.evaluate.shapes.observe import Observation, dot_likeness, observe
from anyflow_cli.evaluate.shapes.score import DIMENSIONS, LEAST_TRAVEL, SEMANTIC, pace_of, ramp
from anyflow_cli.evaluate.suite import Dimension, Image, VideoPixels

I2V_DIMENSIONS = (
    *(dimension for dimension in DIMENSIONS if dimension.group == "quality"),
    Dimension("first frame", "i2v"),
    Dimension("subject kept", "i2v"),
    Dimension("background kept", "i2v"),
    Dimension("motion from the image", "i2v"),
)


def image_for(world: str, prompt: str, seed: int) -> Image:
    """Render frame 0 (H, W, 3) of a clip with the attributes of a prompt, determined by prompt and seed."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:8], "big")
    frame: Image = render(WORLDS[world].scene(drawn, parse_caption(prompt)), 1)[0]
    return frame


def image_scores(
    video: VideoPixels, seen: Observation, image: Image, named: dict[str, str]
) -> dict[str, float]:
    """Score the dimensions of the group ``i2v`` for a clip (T, H, W, 3) and its measurements."""
    reference = observe(image[None])
    return {
        "first frame": _first_frame(video, image),
        "subject kept": _subject(seen, reference),
        "background kept": _background(seen, reference),
        "motion from the image": _motion(seen, reference, named),
    }


def _first_frame(video: VideoPixels, image: Image) -> float:
    difference = video[0].astype(np.float32) - image
    return ramp(float(np.sqrt((difference**2).mean())), "first frame")


def _subject(seen: Observation, reference: Observation) -> float:
    """Agreement of the shape's form, color and size with the image, mean over frames."""
    track, ideal = seen.track, reference.track
    if not ideal.seen.any():
        return 0.0
    forms = np.abs(track.profile - ideal.profile[0]).sum(1)
    colors = np.linalg.norm(track.color - ideal.color[0], axis=1)
    sizes = np.abs(np.log(np.maximum(track.area, 1e-3) / ideal.area[0]))
    frames = [
        ramp(float(form), "form kept") * ramp(float(color), "colour kept") * ramp(float(size), "size kept")
        for form, color, size in zip(forms, colors, sizes, strict=True)
    ]
    return float((np.array(frames) * track.seen).mean())


def _background(seen: Observation, reference: Observation) -> float:
    """Agreement of the background color, mean over frames, times how well the image's dots are preserved."""
    offsets = np.linalg.norm(seen.background_levels - reference.background_levels[0], axis=1)
    color = float(np.mean([ramp(float(offset), "background kept") for offset in offsets]))
    places = [(float(x), float(y)) for x, y in reference.dots.centers]
    dots = [ramp(dot_likeness(seen.mixture.white, place), "dot likeness") for place in places]
    return color * float(np.mean(dots)) if dots else color


def _motion(seen: Observation, reference: Observation, named: dict[str, str]) -> float:
    """Whether the shape starts at its position in the image and moves, in the named direction if any."""
    if not reference.track.seen.any():
        return 0.0
    away = seen.track.start - reference.track.center[0]
    onwards = min(1.0, pace_of(seen) * len(seen.track.seen) / LEAST_TRAVEL)
    if "direction" in named:
        onwards = SEMANTIC["direction"](seen, named["direction"])
    return ramp(hypot(*away), "jump") * onwards
