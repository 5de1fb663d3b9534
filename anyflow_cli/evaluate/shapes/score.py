"""Scores between 0 and 1 from the measurements of a clip.

A quality score falls linearly from 1 at the limit ``best``, slightly beyond the worst percentile of the
world's own clips, to 0 at ``worst``, where the defect is obvious to a person. Only the attributes that a
prompt names get semantic scores. ``piece_scores`` applies the scores of stills to each latent frame.

Legend: T frames, H W height and width, F latent frames.
"""

from __future__ import annotations

from collections.abc import Callable
from math import hypot, inf, log, prod

import numpy as np

from anyflow_cli.data.shapes_world import BACKGROUNDS, DIRECTIONS, DOT_COUNT, RGB, SHAPE_RADII, SPEEDS, Rgb
from anyflow_cli.evaluate.shapes.components import Floats
from anyflow_cli.evaluate.shapes.observe import Observation, edge_error, observe_parts
from anyflow_cli.evaluate.suite import Dimension, VideoPixels

DIMENSIONS = (
    Dimension("sharpness", "quality"),
    Dimension("temporal consistency", "quality"),
    Dimension("motion smoothness", "quality"),
    Dimension("dynamic degree", "quality", weight=0.5),  # VBench's weight
    Dimension("details", "quality"),
    Dimension("artefacts", "quality"),
    Dimension("shape", "semantic"),
    Dimension("colour", "semantic"),
    Dimension("size", "semantic"),
    Dimension("direction", "semantic"),
    Dimension("speed", "semantic"),
    Dimension("background", "semantic"),
)

LIMITS: dict[str, tuple[float, float]] = {
    #                     best   worst
    "steepness":         (0.95,  0.30),  # of edges, relative to the world's rendering
    "residual":          (0.40,  4.00),  # pixels from a straight uniform motion
    "area change":       (0.10,  0.60),  # standard deviation over mean
    "form change":       (0.16,  0.80),  # mean distance from the mean profile; about 0.4 between two shapes
    "colour change":     (5.00, 60.00),  # levels from the mean color
    "background change": (0.30, 16.00),  # levels from the mean background
    "dot likeness":      (0.95,  0.30),  # overlap with an ideal dot
    "stray area":        (2.00, 60.00),  # pixels per frame outside shape, dots and background
    "colour offset":     (8.00, 90.00),  # levels from the nearest color of the world
    "background offset": (4.00, 60.00),
    "size offset":       (0.12,  0.30),  # log of the ratio; halfway between the sizes is 0.30
    "speed offset":      (0.12,  0.38),  # log of the ratio; halfway between the speeds is 0.38
    "angle":             (10.0,  45.0),  # degrees
    "edge error":        (0.16,  0.90),  # pixels between the outlines of shape and ideal form
    #  relative to the conditioning image
    "first frame":       (2.00, 28.00),  # root mean square in levels; 8 for an autoencoder at 30 dB
    "form kept":         (0.20,  0.80),  # distance from the profile in the image
    "colour kept":       (6.00, 60.00),  # levels from the shape's color in the image
    "size kept":         (0.08,  0.40),  # log of the ratio of areas
    "background kept":   (2.00, 32.00),  # levels from the background in the image
    "jump":              (1.00,  6.00),  # pixels between the shape in the image and the start of its track
}  # fmt: skip
LEAST_TRAVEL = 3.0  # pixels per clip, below which a motion has no direction
SPEED_JITTER = 0.08  # relative variation of the world's own speeds
STILL = ("sharpness", "details", "artefacts", "shape", "colour", "size", "background")
VAE_STRIDE = 4  # frames per latent frame of Wan's VAE, whose first latent frame encodes one


def ramp(value: float, name: str) -> float:
    """Map ``best`` and better to 1, ``worst`` and worse to 0, linearly between them."""
    best, worst = LIMITS[name]
    return min(max((value - worst) / (best - worst), 0.0), 1.0)


# -- quality -------------------------------------------------------------------------------------------------


def quality_notes(seen: Observation) -> dict[str, float]:
    """Measurements behind the quality scores, by the names of their limits."""
    track = seen.track
    return _still_notes(seen) | {
        "residual": track.residual,
        "area change": _spread(track.area[track.seen]),
        "form change": float(_distances(track.profile[track.seen], 1).mean()) if track.seen.any() else inf,
        "colour change": float(_distances(track.color[track.seen], 2).mean()) if track.seen.any() else inf,
        "background change": float(_distances(seen.background_levels, 2).mean()),
        "speed": pace_of(seen),
    }


def _still_notes(seen: Observation) -> dict[str, float]:
    track = seen.track
    strays = track.stray.mean() + seen.dots.stray.mean() + seen.unexplained
    return {
        "steepness": seen.steepness,
        "stray area": float(strays),
        "colour offset": _offset(seen.mixture.color_rgb, RGB) if seen.mixture.color else inf,
        "background offset": _offset(seen.mixture.background_rgb, BACKGROUNDS),
        "seen": float(track.seen.mean()),
    }


def quality_scores(seen: Observation, named: dict[str, str]) -> dict[str, float]:
    """Score all quality dimensions; the prompt only affects the dynamic degree."""
    notes = quality_notes(seen)
    steady = _product(notes, "area change", "form change", "colour change", "background change")
    return _still_quality(seen, notes) | {
        "temporal consistency": notes["seen"] * steady,
        "motion smoothness": notes["seen"] * ramp(notes["residual"], "residual"),
        "dynamic degree": _dynamic_degree(notes["speed"], named.get("speed")),
    }


def _still_quality(seen: Observation, notes: dict[str, float]) -> dict[str, float]:
    return {
        "sharpness": notes["seen"] * ramp(notes["steepness"], "steepness"),
        "details": _details(seen),
        "artefacts": _product(notes, "stray area", "colour offset", "background offset"),
    }


def _product(notes: dict[str, float], *names: str) -> float:
    return prod(ramp(notes[name], name) for name in names)


def _dynamic_degree(pace: float, speed: str | None) -> float:
    """1 within the world's speeds (or the named one), proportionally less outside of them."""
    paces = [SPEEDS[speed]] if speed else list(SPEEDS.values())
    low, high = min(paces) * (1 - SPEED_JITTER), max(paces) * (1 + SPEED_JITTER)
    return min(1.0, pace / low, high / pace) if pace > 0 else 0.0


def _details(seen: Observation) -> float:
    """Quality of the dots, which no prompt names: likeness, with missing and extra dots penalized."""
    drawn = sum(ramp(float(value), "dot likeness") for value in seen.dots.likeness) / DOT_COUNT
    return drawn * DOT_COUNT / (DOT_COUNT + seen.dots.extra)


def edge_fidelity(seen: Observation) -> float:
    """How straight and round the shape's edges are: reported beside the scores, not part of Total."""
    return float(seen.track.seen.mean()) * ramp(edge_error(seen), "edge error")


# -- attributes named by the prompt --------------------------------------------------------------------------


def semantic_scores(seen: Observation, named: dict[str, str]) -> dict[str, float]:
    """Score each attribute in ``named``."""
    return {name: SEMANTIC[name](seen, value) for name, value in named.items()}


def right_attributes(seen: Observation, named: dict[str, str]) -> dict[str, bool]:
    """Whether the clip as a whole shows the named value of each attribute rather than another one."""
    shown = shown_attributes(seen)
    return {name: shown[name] == value for name, value in named.items()}


def shown_attributes(seen: Observation) -> dict[str, str | None]:
    """The nearest value of each attribute; None where no shape is seen."""
    if not seen.forms:
        return dict.fromkeys(SEMANTIC, None) | {"background": seen.mixture.background}
    pace = pace_of(seen)
    travels = pace * len(seen.track.seen) >= LEAST_TRAVEL
    return {
        "shape": seen.shape,
        "colour": _nearest_color(seen.track.color[seen.track.seen].mean(0), RGB),
        "size": _nearest_ratio(float(np.median(seen.radius)), SHAPE_RADII),
        "direction": min(DIRECTIONS, key=lambda name: _angle(seen, name)) if travels else None,
        "speed": _nearest_ratio(pace, SPEEDS) if travels else None,
        "background": seen.mixture.background,
    }


def _shape_score(seen: Observation, name: str) -> float:
    return seen.forms.count(name) / len(seen.track.seen)


def _color_score(seen: Observation, name: str) -> float:
    frames = seen.track.color[seen.track.seen]
    return sum(_nearest_color(color, RGB) == name for color in frames) / len(seen.track.seen)


def _size_score(seen: Observation, name: str) -> float:
    ratios = np.abs(np.log(np.maximum(seen.radius, 1e-3) / SHAPE_RADII[name]))
    return sum(ramp(float(ratio), "size offset") for ratio in ratios) / len(seen.track.seen)


def _direction_score(seen: Observation, name: str) -> float:
    travel = min(1.0, pace_of(seen) * len(seen.track.seen) / LEAST_TRAVEL)
    return ramp(_angle(seen, name), "angle") * travel


def _speed_score(seen: Observation, name: str) -> float:
    pace = pace_of(seen)
    return ramp(abs(log(pace / SPEEDS[name])), "speed offset") if pace > 0 else 0.0


def _background_score(seen: Observation, name: str) -> float:
    return seen.background_share[name]


SEMANTIC: dict[str, Callable[[Observation, str], float]] = {
    "shape": _shape_score,
    "colour": _color_score,
    "size": _size_score,
    "direction": _direction_score,
    "speed": _speed_score,
    "background": _background_score,
}


# -- along the video -----------------------------------------------------------------------------------------


def piece_scores(video: VideoPixels, named: dict[str, str]) -> tuple[dict[str, float], ...]:
    """Score the frames of each latent frame of a clip (T, H, W, 3) as a clip of its own, (F,).

    Only dimensions that a still image shows, because the first latent frame has a single frame. A model's
    chunks consist of latent frames, so their scores are means of these.
    """
    shown = {name: value for name, value in named.items() if name in STILL}
    scored = []
    for seen in observe_parts(video, latent_frame_slices(len(video))):
        scores = _still_quality(seen, _still_notes(seen)) | semantic_scores(seen, shown)
        scored.append({name: scores[name] for name in STILL if name in scores})
    return tuple(scored)


def latent_frame_slices(frames: int) -> list[slice]:
    """The frames that each latent frame encodes, (F,)."""
    return [slice(0, 1), *(slice(i, i + VAE_STRIDE) for i in range(1, frames, VAE_STRIDE))]


# -- small measurements --------------------------------------------------------------------------------------


def pace_of(seen: Observation) -> float:
    """Speed in pixels per frame."""
    return hypot(*seen.track.step)


def _angle(seen: Observation, direction: str) -> float:
    """Angle between the motion and a direction, in degrees."""
    (x, y), (dx, dy) = DIRECTIONS[direction], seen.track.step
    return float(np.degrees(np.arccos(np.clip((x * dx + y * dy) / max(hypot(dx, dy), 1e-9), -1, 1))))


def _spread(values: Floats) -> float:
    return float(values.std() / values.mean()) if len(values) else inf


def _distances(values: Floats, order: int) -> Floats:
    """Distance of each frame's vector from the mean over frames, (T,)."""
    return np.asarray(np.linalg.norm(values - values.mean(0), ord=order, axis=1), np.float32)


def _offset(color: Floats, palette: dict[str, Rgb]) -> float:
    differences = color - np.array(list(palette.values()), np.float32)
    return float(np.sqrt(min(each @ each for each in differences)))


def _nearest_color(color: Floats, palette: dict[str, Rgb]) -> str:
    differences = color - np.array(list(palette.values()), np.float32)
    return list(palette)[int(np.linalg.norm(differences, axis=1).argmin())]


def _nearest_ratio(value: float, known: dict[str, float]) -> str:
    return min(known, key=lambda name: abs(log(max(value, 1e-3) / known[name])))
