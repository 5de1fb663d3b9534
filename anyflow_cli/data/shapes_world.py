"""The shapes world: an endless, seeded supply of short captioned clips.

One colored shape moves in a straight line over a plain background, behind four small white dots that do not
move. No caption mentions the dots: a few large sampling steps misplace several independent, sharp objects, so
the dots leave something to distill. ``shapes`` is the world of the built-in models; ``shapes-shifted`` has
colors and diagonal motions that those models never saw, for fine-tuning.

Legend: T frames, H W height and width in pixels; pixels are uint8 RGB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import hypot, sqrt
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Rgb = tuple[int, int, int]
RgbPixels = NDArray[np.uint8]

HEIGHT = WIDTH = 64
FRAMES = 33
FPS = 16

SHAPES = ("circle", "square", "triangle")
BACKGROUNDS: dict[str, Rgb] = {"gray": (128, 128, 128), "black": (14, 14, 14), "navy": (22, 28, 92)}
RGB: dict[str, Rgb] = {
    "red": (224, 44, 44), "green": (44, 190, 70), "blue": (70, 120, 250), "yellow": (244, 212, 44),
    "purple": (170, 60, 214), "orange": (246, 140, 30), "cyan": (44, 208, 220),
}  # fmt: skip
SHAPE_RADII = {"small": 6.0, "large": 11.0}  # of circles of equal visual weight, in pixels
SPEEDS = {"slowly": 0.4, "quickly": 0.85}  # pixels per frame
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up and left": (-sqrt(0.5), -sqrt(0.5)), "up and right": (sqrt(0.5), -sqrt(0.5)),
    "down and left": (-sqrt(0.5), sqrt(0.5)), "down and right": (sqrt(0.5), sqrt(0.5)),
}  # fmt: skip  # unit vectors, x to the right, y downwards
DOT_COLOR: Rgb = (250, 250, 250)
DOT_COUNT = 4
DOT_RADIUS = 2.2
DOT_REACH = 5  # pixels from a dot's center within which it is drawn
DOT_DISTANCE = 9.0  # between centres, so that dots never touch
# How often a caption leaves an attribute out.
OMITTED = {"size": 0.1, "direction": 0.1, "speed": 0.4, "background": 0.1}


@dataclass(frozen=True)
class Scene:
    """A clip's content: ``start`` is the center in frame 0, ``step`` the motion per frame, in pixels."""

    shape: str
    color: str
    size: str
    direction: str
    speed: str
    background: str
    radius: float
    start: tuple[float, float]
    step: tuple[float, float]
    dots: tuple[tuple[float, float], ...]
    omitted: frozenset[str] = frozenset()

    @property
    def caption(self) -> str:
        """The clip's caption, without the attributes it omits."""
        return _sentence(self, self.omitted)

    @property
    def full_caption(self) -> str:
        """A caption with every attribute."""
        return _sentence(self, frozenset())


@dataclass(frozen=True)
class ShapesWorld:
    """A family of scenes: the colors and directions that occur."""

    name: str
    colors: tuple[str, ...]
    directions: tuple[str, ...]

    def scene(self, seed: int, named: Mapping[str, str] = MappingProxyType({})) -> Scene:
        """Draw the scene of a seed; equal seeds give equal scenes on every machine.

        ``named`` fixes attributes (see ``parse_caption``); the seed determines the others.
        """
        rng = np.random.default_rng([seed, *self.name.encode()])
        size, speed = _pick(rng, SHAPE_RADII, named.get("size")), _pick(rng, SPEEDS, named.get("speed"))
        direction = _pick(rng, self.directions, named.get("direction"))
        radius = SHAPE_RADII[size] * rng.uniform(0.93, 1.07)
        pace = SPEEDS[speed] * rng.uniform(0.92, 1.08)
        step = (DIRECTIONS[direction][0] * pace, DIRECTIONS[direction][1] * pace)
        return Scene(
            shape=_pick(rng, SHAPES, named.get("shape")),
            color=_pick(rng, self.colors, named.get("colour")),
            size=size,
            direction=direction,
            speed=speed,
            background=_pick(rng, BACKGROUNDS, named.get("background")),
            radius=radius,
            start=(_start(rng, radius, step[0], WIDTH), _start(rng, radius, step[1], HEIGHT)),
            step=step,
            dots=_dots(rng),
            omitted=frozenset(name for name, share in OMITTED.items() if rng.random() < share),
        )


WORLDS = {
    "shapes": ShapesWorld("shapes", ("red", "green", "blue", "yellow"), ("left", "right", "up", "down")),
    "shapes-shifted": ShapesWorld(
        "shapes-shifted",
        ("purple", "orange", "cyan"),
        ("up and left", "up and right", "down and left", "down and right"),
    ),
}


def render(scene: Scene, frames: int = FRAMES, first: int = 0) -> RgbPixels:
    """Draw frames of a scene from frame ``first`` on, with edges one pixel soft: (T, H, W, 3)."""
    time = np.arange(first, first + frames, dtype=np.float32)[:, None, None]
    dx = _axis(WIDTH)[None, None, :] - (scene.start[0] + scene.step[0] * time)
    dy = _axis(HEIGHT)[None, :, None] - (scene.start[1] + scene.step[1] * time)
    video = np.broadcast_to(np.asarray(BACKGROUNDS[scene.background], np.float32), (frames, HEIGHT, WIDTH, 3))
    video = _paint(video, outline_distance(scene.shape, dx, dy, scene.radius), RGB[scene.color])
    for x, y in scene.dots:
        columns, rows = (slice(max(int(c) - DOT_REACH, 0), max(int(c) + DOT_REACH, 0)) for c in (x, y))
        dot = np.hypot(_axis(WIDTH)[None, columns] - x, _axis(HEIGHT)[rows, None] - y) - DOT_RADIUS
        video[:, rows, columns] = _paint(video[:, rows, columns], dot[None], DOT_COLOR)
    return np.round(video).astype(np.uint8)


def parse_caption(caption: str) -> dict[str, str]:
    """Find the attributes that a caption names: shape, colour, size, direction, speed and background.

    In other sentences than captions of the worlds it finds the same words and ignores the rest. The keys
    are names of the suite's dimensions, as evaluations have stored them since version 0.1.
    """
    words = re.findall(r"[a-z]+", caption.lower())
    found: dict[str, str] = {}
    for name, before in zip(words[1:], words, strict=False):
        if name == "background" and before in BACKGROUNDS:
            found["background"] = before
    for name, values in (("shape", SHAPES), ("size", SHAPE_RADII), ("colour", RGB), ("speed", SPEEDS)):
        named = [word for word in words if word in values]
        if named:
            found[name] = named[0]
    text = " ".join(words)
    directions = [name for name in DIRECTIONS if re.search(rf"\b{name}\b", text)]
    if directions:
        found["direction"] = max(directions, key=len)  # "up and left" names neither "up" nor "left" alone
    return found


def _sentence(scene: Scene, omitted: frozenset[str]) -> str:
    said = {
        "size": f"{scene.size} ",
        "direction": f" moving {scene.direction}",
        "speed": f" {scene.speed}",
        "background": f" on a {scene.background} background",
    }
    # A speed without a direction would read badly: "a red circle slowly".
    hidden = omitted | {"speed"} if "direction" in omitted else omitted
    size, direction, speed, background = ("" if name in hidden else text for name, text in said.items())
    return f"a {size}{scene.color} {scene.shape}{direction}{speed}{background}"


def _pick(rng: np.random.Generator, values: Iterable[str], named: str | None) -> str:
    """Draw one of the values; a named one replaces it without changing later draws."""
    names = tuple(values)
    drawn = names[int(rng.integers(len(names)))]
    return named or drawn


def _start(rng: np.random.Generator, radius: float, step: float, length: int) -> float:
    travel = step * (FRAMES - 1)
    low, high = radius + 1 + max(0.0, -travel), length - 1 - radius - max(0.0, travel)
    return float(rng.uniform(low, high))


def _dots(rng: np.random.Generator) -> tuple[tuple[float, float], ...]:
    dots: list[tuple[float, float]] = []
    while len(dots) < DOT_COUNT:
        x, y = (float(v) for v in rng.uniform(4, (WIDTH - 4, HEIGHT - 4)))
        if all(hypot(x - a, y - b) >= DOT_DISTANCE for a, b in dots):
            dots.append((x, y))
    return tuple(dots)


def _axis(length: int) -> NDArray[np.float32]:
    return np.arange(length, dtype=np.float32) + np.float32(0.5)


def outline_distance(
    shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float | NDArray[np.float32]
) -> NDArray[np.float32]:
    """Signed distance to the outline of a shape, in pixels, negative inside, (T, H, W)."""
    if shape == "circle":
        return np.asarray(np.hypot(dx, dy) - radius)
    if shape == "square":
        return np.asarray(np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius)
    side = 0.866 * np.abs(dx) - 0.5 * dy  # an upright triangle: two slanted sides and the base
    return np.asarray(np.maximum(side, dy) - 0.56 * radius)


def _paint(video: NDArray[np.float32], distance: NDArray[np.float32], color: Rgb) -> NDArray[np.float32]:
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    return np.asarray(video * (1 - cover) + np.asarray(color, np.float32) * cover, dtype=np.float32)
