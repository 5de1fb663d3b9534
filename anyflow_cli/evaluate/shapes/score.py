"""From what was seen in a clip to scores between 0 and 1, dimension by dimension.

Every quality score runs linearly from 1 at what the world's own clips show (the limit ``best`` lies a little
outside of their worst percentile) to 0 at ``worst``, where a person would call the defect plain. Limits stand
in one table. Semantic scores exist only for the attributes a prompt names.

Legend: T frames.
"""

from __future__ import annotations

from collections.abc import Callable
from math import hypot, inf, log

import numpy as np

from anyflow_cli.data.shapes_world import BACKGROUNDS, DIRECTIONS, DOT_COUNT, RGB, SIZES, SPEEDS, Rgb
from anyflow_cli.evaluate.shapes.observe import Observation
from anyflow_cli.evaluate.shapes.unmix import Floats, rgb_array
from anyflow_cli.evaluate.suite import Dimension

DIMENSIONS = (
    Dimension("sharpness", "quality"),
    Dimension("temporal consistency", "quality"),
    Dimension("motion smoothness", "quality"),
    Dimension("dynamic degree", "quality", weight=0.5),  # as VBench weighs it
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
    "steepness":         (0.95,  0.30),  # of edges, against the world's drawing
    "residual":          (0.40,  4.00),  # pixels off a straight uniform motion
    "area change":       (0.10,  0.60),  # standard deviation over mean
    "form change":       (0.16,  0.80),  # mean distance from the mean form; two different shapes: about 0.4
    "colour change":     (5.00, 60.00),  # levels from the mean colour
    "background change": (0.30, 16.00),  # levels from the mean background
    "dot likeness":      (0.95,  0.30),  # overlap with an ideal dot
    "stray area":        (2.00, 60.00),  # pixels a frame that belong to nothing
    "colour offset":     (8.00, 90.00),  # levels from the nearest colour of the world
    "background offset": (4.00, 60.00),
    "size offset":       (0.12,  0.30),  # log of the ratio; half way between the sizes is 0.30
    "speed offset":      (0.12,  0.38),  # log of the ratio; half way between the speeds is 0.38
    "angle":             (10.0,  45.0),  # degrees
    #  against the picture that a video was to begin with
    "first frame":       (2.00, 28.00),  # root mean square of levels; an autoencoder at 30 dB: 8
    "form kept":         (0.20,  0.80),  # distance from the form in the picture
    "colour kept":       (6.00, 60.00),  # levels from the shape's colour in the picture
    "size kept":         (0.08,  0.40),  # log of the ratio of areas
    "background kept":   (2.00, 32.00),  # levels from the background in the picture
    "jump":              (1.00,  6.00),  # pixels from where the picture has the shape to where its way begins
}  # fmt: skip
LEAST_TRAVEL = 3.0  # pixels over the clip, below which a motion has no direction
SPEED_JITTER = 0.08  # by which the world's own speeds vary


def ramp(value: float, name: str) -> float:
    """1 at the limit ``best`` and beyond, 0 at ``worst`` and beyond, linear between."""
    best, worst = LIMITS[name]
    return float(np.clip((value - worst) / (best - worst), 0, 1))


# -- quality -------------------------------------------------------------------------------------------------


def quality_notes(seen: Observation) -> dict[str, float]:
    """The measurements that quality is judged by, under the names of the limits."""
    track = seen.track
    strays = track.stray.mean() + seen.dots.stray.mean() + seen.unexplained
    return {
        "steepness": seen.steepness,
        "residual": track.residual,
        "area change": _spread(track.area[track.seen]),
        "form change": float(_distances(track.profile[track.seen], 1).mean()) if track.seen.any() else inf,
        "colour change": float(_distances(track.colour[track.seen], 2).mean()) if track.seen.any() else inf,
        "background change": float(_distances(seen.background_levels, 2).mean()),
        "stray area": float(strays),
        "colour offset": _offset(seen.mixture.colour_rgb, RGB) if seen.mixture.colour else inf,
        "background offset": _offset(seen.mixture.background_rgb, BACKGROUNDS),
        "seen": float(track.seen.mean()),
        "speed": pace_of(seen),
    }


def quality_scores(seen: Observation, named: dict[str, str]) -> dict[str, float]:
    """All quality dimensions; what the prompt says matters to the dynamic degree alone."""
    notes = quality_notes(seen)

    def judged(*names: str) -> float:
        return float(np.prod([ramp(notes[name], name) for name in names]))

    steady = judged("area change", "form change", "colour change", "background change")
    return {
        "sharpness": notes["seen"] * judged("steepness"),
        "temporal consistency": notes["seen"] * steady,
        "motion smoothness": notes["seen"] * judged("residual"),
        "dynamic degree": _dynamic_degree(notes["speed"], named.get("speed")),
        "details": _details(seen),
        "artefacts": judged("stray area", "colour offset", "background offset"),
    }


def _dynamic_degree(pace: float, speed: str | None) -> float:
    """1 where it moves as fast as the world would (as the named speed, if any), less in proportion."""
    paces = [SPEEDS[speed]] if speed else list(SPEEDS.values())
    low, high = min(paces) * (1 - SPEED_JITTER), max(paces) * (1 + SPEED_JITTER)
    return min(1.0, pace / low, high / pace) if pace > 0 else 0.0


def _details(seen: Observation) -> float:
    """The dots nobody asked for: each as round, white and still as the world's; none missing, none extra."""
    drawn = sum(ramp(float(value), "dot likeness") for value in seen.dots.likeness) / DOT_COUNT
    return drawn * DOT_COUNT / (DOT_COUNT + seen.dots.extra)


# -- what the prompt names -----------------------------------------------------------------------------------


def semantic_scores(seen: Observation, named: dict[str, str]) -> dict[str, float]:
    """Scores of the attributes in ``named``."""
    return {name: SEMANTIC[name](seen, value) for name, value in named.items()}


def right_attributes(seen: Observation, named: dict[str, str]) -> dict[str, bool]:
    """For each attribute in ``named``, whether the clip as a whole shows it rather than any other value."""
    shown = shown_attributes(seen)
    return {name: shown[name] == value for name, value in named.items()}


def shown_attributes(seen: Observation) -> dict[str, str | None]:
    """The caption a viewer would give: the nearest value of each attribute, None where nothing is seen."""
    if not seen.forms:
        return dict.fromkeys(SEMANTIC, None) | {"background": seen.mixture.background}
    pace = pace_of(seen)
    travels = pace * len(seen.track.seen) >= LEAST_TRAVEL
    return {
        "shape": seen.shape,
        "colour": _nearest_colour(seen.track.colour[seen.track.seen].mean(0), RGB),
        "size": _nearest_ratio(float(np.median(seen.radius)), SIZES),
        "direction": min(DIRECTIONS, key=lambda name: _angle(seen, name)) if travels else None,
        "speed": _nearest_ratio(pace, SPEEDS) if travels else None,
        "background": seen.mixture.background,
    }


def _shape_score(seen: Observation, name: str) -> float:
    return seen.forms.count(name) / len(seen.track.seen)


def _colour_score(seen: Observation, name: str) -> float:
    frames = seen.track.colour[seen.track.seen]
    return sum(_nearest_colour(colour, RGB) == name for colour in frames) / len(seen.track.seen)


def _size_score(seen: Observation, name: str) -> float:
    ratios = np.abs(np.log(np.maximum(seen.radius, 1e-3) / SIZES[name]))
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
    "colour": _colour_score,
    "size": _size_score,
    "direction": _direction_score,
    "speed": _speed_score,
    "background": _background_score,
}


# -- small measures ------------------------------------------------------------------------------------------


def pace_of(seen: Observation) -> float:
    """Pixels a frame."""
    return hypot(*seen.track.step)


def _angle(seen: Observation, direction: str) -> float:
    """Degrees between the motion and a direction."""
    (x, y), (dx, dy) = DIRECTIONS[direction], seen.track.step
    return float(np.degrees(np.arccos(np.clip((x * dx + y * dy) / max(hypot(dx, dy), 1e-9), -1, 1))))


def _spread(values: Floats) -> float:
    return float(values.std() / values.mean()) if len(values) else inf


def _distances(values: Floats, order: int) -> Floats:
    """Distance of each frame's vector from the mean over frames, (T,)."""
    return np.asarray(np.linalg.norm(values - values.mean(0), ord=order, axis=1), np.float32)


def _offset(colour: Floats, palette: dict[str, Rgb]) -> float:
    return float(min(np.linalg.norm(colour - rgb_array(rgb)) for rgb in palette.values()))


def _nearest_colour(colour: Floats, palette: dict[str, Rgb]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - rgb_array(palette[name]))))


def _nearest_ratio(value: float, known: dict[str, float]) -> str:
    return min(known, key=lambda name: abs(log(max(value, 1e-3) / known[name])))
