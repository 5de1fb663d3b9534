"""Measurements of a clip: the dots, the moving shape in each frame, and everything else.

Values are in pixels and levels; ``score.py`` turns them into scores. Forms are classified by comparison with
clips rendered by the world, so a shape added to the world needs no change here.

Legend: T frames, H W height and width, D dots, S sectors of the angular profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np
from numpy.typing import NDArray

from anyflow_cli.data.shapes_world import (
    DOT_COUNT,
    DOT_RADIUS,
    HEIGHT,
    RGB,
    SHAPE_RADII,
    SHAPES,
    WIDTH,
    RgbPixels,
    Scene,
    outline_distance,
    render,
)
from anyflow_cli.evaluate.shapes.components import Floats, Mask, component_labels, largest_component
from anyflow_cli.evaluate.shapes.unmix import PALETTE_NAMES, Mixture, nearest_labels, square_norms, unmix

SECTORS = 16
SHAPE_SHARE = 0.25  # share of the shape's color above which a pixel may belong to the shape
DOT_SHARE = 0.25  # mean share of white over time above which a pixel may belong to a dot
LEAST_AREA = 20.0  # pixels; anything smaller is not a shape
LEAST_DOT = 3.0  # summed share of white, in pixels
DISC = "circle"
CORNERED = 0.4  # fraction of a form's corners above which a profile is that form rather than a disc
REACH = 5  # half width in pixels of the window around a dot
SHARPNESS_STRIDE = 4  # frames between those whose sharpness is measured
PIXEL_CENTERS = np.mgrid[:HEIGHT, :WIDTH] + 0.5  # y and x, (2, H, W)
FAINT = 12.0  # levels; smaller steps between adjacent pixels are not edges


@dataclass(frozen=True)
class Dots:
    """The best DOT_COUNT dots, or fewer: centers (D, 2) as x, y, and their quality."""

    centers: Floats
    likeness: Floats  # (D,) mean overlap with an ideal dot over frames, 0..1
    extra: int  # number of further dots
    stray: Floats  # (T,) white area outside the dots


@dataclass(frozen=True)
class Track:
    """The largest component of the shape's color in each frame; undefined where ``seen`` is false."""

    seen: Mask  # (T,)
    area: Floats  # (T,)
    center: Floats  # (T, 2) x, y
    color: Floats  # (T, 3)
    profile: Floats  # (T, S) share of the area in each sector around the center
    stray: Floats  # (T,) area of the shape's color outside the component
    start: Floats  # (2,) position at frame 0 of the best straight uniform motion
    step: Floats  # (2,) pixels per frame
    residual: float  # root mean square distance from that motion, in pixels


@dataclass(frozen=True)
class Observation:
    """All measurements of one clip."""

    mixture: Mixture
    presence: Floats  # (T, H, W) share of the shape, inpainted under the dots
    inside: Mask  # (T, H, W) pixels of the moving shape
    dots: Dots
    track: Track
    shape: str | None  # nearest form over the whole clip
    forms: tuple[str, ...]  # nearest form of each frame where the shape is seen
    radius: Floats  # radius of that form as the world defines it, of each frame where seen
    background_share: dict[str, float]  # share of each color among pixels that are neither shape nor dot
    background_levels: Floats  # (T, 3) mean background color of each frame
    unexplained: float  # residual of the mixture, in pixels per frame
    steepness: float  # of edges, relative to the world's rendering of the same scene


def observe(video: RgbPixels) -> Observation:
    """Measure a clip (T, H, W, 3)."""
    return observe_parts(video, [slice(0, len(video))])[0]


def observe_parts(video: RgbPixels, parts: Sequence[slice]) -> list[Observation]:
    """Measure consecutive parts of a clip (T, H, W, 3), each as a clip of its own.

    The parts differ in their estimated colors and their dots; the other measurements of a frame are taken in
    all frames at once.
    """
    labels = nearest_labels(video)
    mixtures = [unmix(video[part], labels[part]) for part in parts]
    dots = [_dots(mixture.white) for mixture in mixtures]
    white = np.concatenate([mixture.white for mixture in mixtures])
    presence = _filled(np.concatenate([mixture.shape for mixture in mixtures]), white, parts, dots)
    inside = largest_component(presence > SHAPE_SHARE, presence)
    grown = _grown(inside)
    outside = ~(grown | (white > 0.05))
    ground = np.concatenate([np.tile(m.background_rgb, (len(m.white), 1)) for m in mixtures])
    levels = _levels(video, outside, ground)
    observations = []
    for part, mixture, found, track in zip(
        parts, mixtures, dots, _tracks(video, presence, white, inside, grown, parts), strict=True
    ):
        seen = track.profile[track.seen]
        forms = _forms(np.vstack([seen, seen.mean(0)])) if len(seen) else ()
        shape = forms[-1] if forms else None
        observations.append(
            Observation(
                mixture=mixture,
                presence=presence[part],
                inside=inside[part],
                dots=found,
                track=track,
                shape=shape,
                forms=forms[:-1],
                radius=_radius(track, shape),
                background_share=_background_share(mixture, outside[part]),
                background_levels=levels[part],
                unexplained=float(mixture.unexplained.sum() / len(mixture.unexplained)),
                steepness=_steepness(video[part], mixture, found, track, shape) if shape else 0.0,
            )
        )
    return observations


# -- dots ----------------------------------------------------------------------------------------------------


def _dots(white: Floats) -> Dots:
    """Find static white components."""
    mean = white.mean(0)
    labels = component_labels(mean > DOT_SHARE)
    mass = np.bincount(labels.ravel(), mean.ravel())[1:]
    y, x = PIXEL_CENTERS
    found = []
    for number in np.flatnonzero(mass >= LEAST_DOT):
        weight = mean * (labels == number + 1)
        total = weight.sum()
        center = ((weight * x).sum() / total, (weight * y).sum() / total)
        found.append((dot_likeness(white, center), center))
    found.sort(reverse=True)
    best = found[:DOT_COUNT]
    near = np.zeros((HEIGHT, WIDTH), bool)
    for _, (cx, cy) in best:
        near |= (abs(x[:1] - cx) <= REACH) & (abs(y[:, :1] - cy) <= REACH)
    centers = np.array([center for _, center in best], np.float32).reshape(-1, 2)
    likeness = np.array([value for value, _ in best], np.float32)
    return Dots(centers, likeness, len(found) - len(best), (white * ~near).sum((1, 2)))


def dot_likeness(white: Floats, center: tuple[float, float]) -> float:
    """Overlap of the white around ``center`` with an ideal dot: sum of minima over sum of maxima."""
    column, row = int(center[0]), int(center[1])
    rows = slice(max(row - REACH, 0), min(row + REACH + 1, HEIGHT))
    columns = slice(max(column - REACH, 0), min(column + REACH + 1, WIDTH))
    y, x = PIXEL_CENTERS[:, rows, columns]
    ideal = np.clip(0.5 - (np.hypot(x - center[0], y - center[1]) - DOT_RADIUS), 0, 1)
    seen = white[:, rows, columns]
    overlap = np.minimum(seen, ideal).sum((1, 2)) / np.maximum(seen, ideal).sum((1, 2))
    return float(overlap.mean())


# -- the moving shape ----------------------------------------------------------------------------------------


def _filled(shape: Floats, white: Floats, parts: Sequence[slice], dots: Sequence[Dots]) -> Floats:
    """Shares of the shape (T, H, W), inpainted under each dot of each part."""
    reach = 2 * REACH
    margin = ((0, 0), (reach, reach), (reach, reach))
    filled, visible = np.pad(shape, margin), np.pad((white <= 0.05).astype(np.float32), margin)
    windows = [
        (part, slice(int(y), int(y) + 2 * reach), slice(int(x), int(x) + 2 * reach))
        for part, found in zip(parts, dots, strict=True)
        for x, y in found.centers
    ]
    if not windows:
        return shape
    within, free = (np.concatenate([a[window] for window in windows]) for a in (filled, visible))
    around = within * free
    near = around.any((1, 2))
    around[near] = _box(around[near]) / np.maximum(_box(free[near]), 1e-3)
    within = np.where(free == 0, around, within)
    for window in windows:
        count = window[0].stop - window[0].start
        filled[window], within = within[:count], within[count:]
    return filled[:, reach:-reach, reach:-reach]


def _box(values: Floats, reach: int = 3) -> Floats:
    """Sum over a square window of 2 reach + 1 pixels, (T, H, W)."""
    for axis in (1, 2):
        along = np.moveaxis(values, axis, 0)
        total = np.zeros_like(along)
        for offset in range(-reach, reach + 1):
            after, before = max(offset, 0), max(-offset, 0)
            total[before : len(total) - after] += along[after : len(along) - before]
        values = np.moveaxis(total, 0, axis)
    return values


def _grown(mask: Mask) -> Mask:
    """Dilate a mask (T, H, W) by its four neighbors."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    grown[:, :, 1:] |= mask[:, :, :-1]
    grown[:, :, :-1] |= mask[:, :, 1:]
    return grown


def _tracks(
    video: RgbPixels, presence: Floats, white: Floats, inside: Mask, grown: Mask, parts: Sequence[slice]
) -> list[Track]:
    frames = len(video)
    t, y, x = _nonzero(grown & (presence > 0))
    weight = presence[t, y, x]
    area = np.bincount(t, weight, minlength=frames)
    seen = area >= LEAST_AREA
    safe = np.maximum(area, 1e-6)
    center = np.stack([np.bincount(t, weight * (axis + 0.5), minlength=frames) / safe for axis in (x, y)], 1)
    dx, dy = x + 0.5 - center[t, 0], y + 0.5 - center[t, 1]
    color = _core_colors(video, inside & (presence > 0.9) & (white < 0.05))
    profile = (_sectors(t, dx, dy, weight, frames) / safe[:, None]).astype(np.float32)
    stray = np.where(grown, 0, presence).sum((1, 2))
    tracks = []
    for part in parts:
        start, step, residual = _straight(center[part], seen[part])
        tracks.append(
            Track(
                seen=seen[part],
                area=area[part].astype(np.float32),
                center=center[part].astype(np.float32),
                color=color[part],
                profile=profile[part],
                stray=stray[part],
                start=start,
                step=step,
                residual=residual,
            )
        )
    return tracks


def _nonzero(mask: Mask) -> tuple[NDArray[np.intp], ...]:
    """Indices of the set pixels of a mask (T, H, W); faster than NumPy's for a few of many."""
    return np.unravel_index(np.flatnonzero(mask), mask.shape)


def _sectors(t: NDArray[np.intp], dx: Floats, dy: Floats, weight: Floats, frames: int) -> NDArray[np.float64]:
    """Area in each sector (T, S); a pixel is split linearly between its two nearest sectors."""
    angle = (np.arctan2(dy, dx) / (2 * np.pi) % 1.0) * SECTORS
    first = np.floor(angle).astype(np.intp)
    part = angle - first
    slots = frames * SECTORS
    total = np.bincount(t * SECTORS + first % SECTORS, weight * (1 - part), minlength=slots)
    total = total + np.bincount(t * SECTORS + (first + 1) % SECTORS, weight * part, minlength=slots)
    return np.asarray(total.reshape(frames, SECTORS))


def _core_colors(video: RgbPixels, core: Mask) -> Floats:
    """Mean color of the inner part of the shape in each frame, (T, 3)."""
    t, y, x = _nonzero(core)
    pixels = video[t, y, x].astype(np.float32)
    count = np.maximum(np.bincount(t, minlength=len(video)), 1)
    sums = [np.bincount(t, pixels[:, c], minlength=len(video)) for c in range(3)]
    return np.asarray(np.stack(sums, 1) / count[:, None], np.float32)


def _straight(center: NDArray[np.float64], seen: Mask) -> tuple[Floats, Floats, float]:
    """Fit a uniform motion to the track (T, 2) where seen: start, step, root mean square residual."""
    if seen.sum() < 3:
        first = center[seen][:1].sum(0)  # zero where the shape is never seen
        return first.astype(np.float32), np.zeros(2, np.float32), float("inf")
    time = np.flatnonzero(seen).astype(np.float64)
    design = np.stack([np.ones_like(time), time], 1)
    fit, *_ = np.linalg.lstsq(design, center[seen], rcond=None)
    residual = float(np.sqrt(((design @ fit - center[seen]) ** 2).sum(1).mean()))
    return fit[0].astype(np.float32), fit[1].astype(np.float32), residual


# -- form and size -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Mean appearance of one shape as the world renders it, over its sizes."""

    name: str
    profile: Floats  # (S,)
    unit_area: float  # area over radius squared


@lru_cache(maxsize=1)
def _known_forms() -> dict[str, Form]:
    return {name: _known_form(name) for name in SHAPES}


def _known_form(name: str) -> Form:
    tracks = [_drawn_track(name, radius) for radius in SHAPE_RADII.values()]
    areas = [float(t.area.mean()) / r**2 for t, r in zip(tracks, SHAPE_RADII.values(), strict=True)]
    profile = np.mean([track.profile.mean(0) for track in tracks], axis=0)
    return Form(name, np.asarray(profile, np.float32), float(np.mean(areas)))


def _drawn_track(name: str, radius: float) -> Track:
    # A fractional step, so that the mean covers all sub-pixel positions of the edge.
    color, start, step = next(iter(RGB)), (24, 26), (0.37, 0.23)
    video = render(Scene(name, color, "", "right", "slowly", "black", radius, start, step, ()))
    mixture = unmix(video, nearest_labels(video))
    inside = mixture.shape > SHAPE_SHARE
    return _tracks(video, mixture.shape, mixture.white, inside, _grown(inside), [slice(0, len(video))])[0]


def _forms(profiles: Floats) -> tuple[str, ...]:
    """Classify each profile (N, S) by its corners, else as a disc.

    A matched filter: the projection on a form's deviation from the disc, 1 for the world's own rendering. The
    threshold is below one half because the typical defect of corners is that they are rounded.
    """
    disc = _known_forms()[DISC].profile
    cornered = [form for name, form in _known_forms().items() if name != DISC]
    corners = np.stack([form.profile - disc for form in cornered], axis=1)  # (S, forms)
    present = (profiles - disc) @ corners / (corners**2).sum(0)
    best = present.argmax(1)
    sharp = present.max(1) >= CORNERED
    return tuple(cornered[i].name if is_sharp else DISC for i, is_sharp in zip(best, sharp, strict=True))


def edge_error(seen: Observation) -> float:
    """Mean distance between the outlines of the shape and of its ideal form, in pixels; inf without a shape.

    It is the area between the two outlines, which blur increases too, over the length of the ideal one.
    Pixels under dots are left out.
    """
    if seen.shape is None:
        return inf
    frames = np.flatnonzero(seen.track.seen)
    y, x = PIXEL_CENTERS.astype(np.float32)
    across, down = seen.track.center[frames].T[..., None, None]  # each (T, 1, 1)
    distance = outline_distance(seen.shape, x - across, y - down, seen.radius[:, None, None])  # (T, H, W)
    visible = seen.mixture.white[frames] <= 0.05
    near = _grown(_grown(seen.inside[frames]))
    presence = np.where(near, seen.presence[frames], 0)
    area = (np.abs(presence - np.clip(0.5 - distance, 0, 1)) * visible).sum((1, 2))
    length = ((np.abs(distance) < 1) * visible).sum((1, 2)) / 2
    return float((area / np.maximum(length, 1)).mean())


# -- the rest of the frame -----------------------------------------------------------------------------------


def _background_share(mixture: Mixture, outside: Mask) -> dict[str, float]:
    counts = np.bincount(mixture.labels[outside], minlength=len(PALETTE_NAMES))
    return dict(zip(PALETTE_NAMES, (counts / max(counts.sum(), 1)).tolist(), strict=True))


def _levels(video: RgbPixels, outside: Mask, ground: Floats) -> Floats:
    """Mean color outside the shape and the dots in each frame, (T, 3); ``ground`` if there is none."""
    t, y, x = _nonzero(~outside)  # few pixels, so their sum is subtracted from that of the frame
    inner = np.stack([np.bincount(t, video[t, y, x, c], minlength=len(video)) for c in range(3)], 1)
    count = outside.sum((1, 2))[:, None]
    whole = np.ones(HEIGHT * WIDTH, np.float32) @ video.reshape(len(video), -1, 3).astype(np.float32)
    sums = whole - inner
    return np.where(count > 0, sums / np.maximum(count, 1), ground).astype(np.float32)


def _radius(track: Track, shape: str | None) -> Floats:
    """Radius in each frame where the shape is seen, from its area."""
    unit = _known_forms()[shape].unit_area if shape else 1.0
    return np.asarray(np.sqrt(track.area[track.seen] / unit), np.float32)


def _steepness(video: RgbPixels, mixture: Mixture, dots: Dots, track: Track, shape: str) -> float:
    """Steepness of edges relative to the world's rendering of the measured scene."""
    scene = Scene(
        shape=shape,
        color=mixture.color or next(iter(RGB)),
        size="",
        direction="",
        speed="",
        background=mixture.background,
        radius=float(np.median(_radius(track, shape))),
        start=(float(track.start[0]), float(track.start[1])),
        step=(SHARPNESS_STRIDE * float(track.step[0]), SHARPNESS_STRIDE * float(track.step[1])),
        dots=tuple((float(x), float(y)) for x, y in dots.centers),
    )
    ideal = render(scene, len(video[::SHARPNESS_STRIDE]))
    return _edge_steepness(video[::SHARPNESS_STRIDE]) / max(_edge_steepness(ideal), 1e-6)


def _edge_steepness(video: RgbPixels) -> float:
    """Mean step between adjacent pixels, in levels; weighted by its square so that noise is negligible."""
    levels = video.astype(np.float32)
    cubes = squares = 0.0
    for axis in (1, 2):
        square = square_norms(np.diff(levels, axis=axis))
        edge = square[square > FAINT**2]
        cubes, squares = cubes + float((edge**1.5).sum()), squares + float(edge.sum())
    return cubes / squares if squares else 0.0
