"""Defects of clips of the shapes world, each of the kind that one dimension measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import (
    BACKGROUNDS,
    FRAMES,
    SHAPES,
    SPEEDS,
    WORLDS,
    RgbPixels,
    Scene,
    render,
)

Damage = Callable[[Scene], RgbPixels]
WORLD = WORLDS["shapes"]
SCENES = [WORLD.scene(seed) for seed in range(16)]


def redrawn(**changes: Any) -> Damage:
    """Render the scene with other attributes; a value may be a function of the scene."""

    def draw(scene: Scene) -> RgbPixels:
        values = {name: value(scene) if callable(value) else value for name, value in changes.items()}
        return render(replace(scene, **values))

    return draw


def levels(change: Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]) -> Damage:
    """Change the levels of the clip."""

    def spoil(scene: Scene) -> RgbPixels:
        changed = change(render(scene).astype(np.float64), np.random.default_rng(0))
        return np.clip(np.round(changed), 0, 255).astype(np.uint8)

    return spoil


def blurred(video: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Gaussian blur over height and width."""
    x = np.arange(-9, 10)
    kernel = np.exp(-(x**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    for axis in (1, 2):
        pad = [(9, 9) if a == axis else (0, 0) for a in range(4)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(video, pad, mode="edge"), 19, axis=axis)
        video = np.asarray(windows @ kernel)
    return video


def blurred_by(sigma: float, video: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Blur with the signature that ``levels`` expects."""
    return blurred(video, sigma)


def saturated(video: NDArray[np.float64], strength: float) -> NDArray[np.float64]:
    """Increase the saturation."""
    gray = video.mean(-1, keepdims=True)
    return np.asarray(gray + strength * (video - gray))


def other_pace(scene: Scene) -> RgbPixels:
    """The same direction at the other speed, through the center so that the shape stays inside."""
    slow, quick = SPEEDS["slowly"], SPEEDS["quickly"]
    factor = quick / slow if scene.speed == "slowly" else slow / quick
    step = (scene.step[0] * factor, scene.step[1] * factor)
    return render(replace(scene, step=step, start=(32 - 16 * step[0], 32 - 16 * step[1])))


def jittered(scene: Scene) -> RgbPixels:
    """Jitter the shape around its path."""
    rng = np.random.default_rng(0)
    frames = []
    for time in range(FRAMES):
        x, y = (scene.start[i] + scene.step[i] * time + rng.normal(0, 2) for i in (0, 1))
        frames.append(render(replace(scene, start=(x, y)), 1)[0])
    return np.stack(frames)


def vanishing(scene: Scene) -> RgbPixels:
    """Remove the shape in the second half."""
    half = FRAMES // 2
    return np.concatenate([render(scene)[:half], render(replace(scene, radius=0.01))[half:]])


def after(values: tuple[str, ...] | dict[str, Any], value: str) -> str:
    """The next value, cyclically."""
    names = tuple(values)
    return names[(names.index(value) + 1) % len(names)]


wrong_shape = redrawn(shape=lambda s: after(SHAPES, s.shape))
wrong_colour = redrawn(color=lambda s: after(WORLD.colors, s.color))
wrong_size = redrawn(radius=lambda s: 11.0 if s.size == "small" else 6.0)
wrong_background = redrawn(background=lambda s: after(BACKGROUNDS, s.background))
no_dots = redrawn(dots=())
a_dot_less = redrawn(dots=lambda s: s.dots[1:])
a_dot_more = redrawn(dots=lambda s: (*s.dots, (3.0, 61.0)))
blur = levels(partial(blurred_by, 1.2))
noise = levels(lambda v, rng: v + rng.normal(0, 8, v.shape))
flicker = levels(lambda v, rng: v * rng.uniform(0.85, 1.15, (len(v), 1, 1, 1)))
saturation = levels(lambda v, _: saturated(v, 1.7))
ghost = levels(lambda v, _: 0.6 * v + 0.4 * np.roll(v, 12, axis=2))


def frozen(scene: Scene) -> RgbPixels:
    """Repeat one frame."""
    return np.repeat(render(scene)[16:17], FRAMES, axis=0)


def reversed_motion(scene: Scene) -> RgbPixels:
    """Reverse the clip."""
    return np.ascontiguousarray(render(scene)[::-1])
