"""How a clip's quality changes along it: each latent frame's own frames, judged as a clip of its own.

Only what a still shows is judged, so that a first latent frame of one frame is held to the same as the
others. Pieces are those of the VAE and not of a model's chunks; so a clip is judged once, and its chunks,
whichever they are, are means of its pieces.

Legend: T frames, F latent frames.
"""

from __future__ import annotations

from anyflow_cli.evaluate.shapes.observe import observe
from anyflow_cli.evaluate.shapes.score import quality_scores, semantic_scores
from anyflow_cli.evaluate.suite import VideoPixels

FRAMES_A_LATENT = 4  # of Wan's VAE; the first latent frame has one
STILL = ("sharpness", "details", "artefacts", "shape", "colour", "size", "background")


def latent_frames(frames: int) -> list[slice]:
    """The frames of each latent frame, (F,) slices of ``frames``."""
    return [slice(0, 1), *(slice(i, i + FRAMES_A_LATENT) for i in range(1, frames, FRAMES_A_LATENT))]


def piece_scores(video: VideoPixels, named: dict[str, str]) -> tuple[dict[str, float], ...]:
    """Raw scores of the pieces of a clip (T, H, W, 3), in order."""
    return tuple(_still_scores(video[part], named) for part in latent_frames(len(video)))


def _still_scores(piece: VideoPixels, named: dict[str, str]) -> dict[str, float]:
    seen = observe(piece)
    scores = quality_scores(seen, named) | semantic_scores(seen, named)
    return {name: scores[name] for name in STILL if name in scores}
