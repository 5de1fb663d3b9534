"""Segments of videos and pictures: which parts of a directory of clips become samples, and in which format.

A *format* is a bucket: frames, rate and size that a segment is converted to. Cutting is one of

    head      the start of each video
    uniform   ``count`` segments, evenly spread from start to end
    slide     a segment every ``stride`` frames, by default its own length, as many as fit
    scenes    as ``slide``, within each scene

A scene ends where the picture changes at once: the mean absolute difference of two consecutive frames, as
32x32 gray values in [0, 1], is above ``CUT`` and above ``CUT_RATIO`` times the median of the eight around it.

A picture has the format of one frame with the nearest aspect ratio; without such a format it is not read. A
video, or a scene, has of the formats that it fills the one with the nearest aspect ratio, of these the
longest, of these the one nearest in area. Legend: T frames.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from anyflow_cli.data.clips import PICTURE_SUFFIXES, ClipFile
from anyflow_cli.data.shards import Natural
from anyflow_cli.data.video import (
    DECODE_SECONDS,
    SANDBOX,
    ClipFormat,
    UnusableClipError,
    ffmpeg,
    picture_size,
    probe,
)
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import json_sha256, write_json
from anyflow_cli.utils.records import read_record

CUTS_FILE = ".segments.json"
Cutting = Literal["head", "uniform", "slide", "scenes"]
CUT, CUT_RATIO, CUT_WINDOW = 0.1, 4.0, 4  # the window is on either side
GRAY_SIDE = 32
UNKNOWN = 1 << 30  # frames of a video without a stated duration, in which any format fits


@dataclass(frozen=True)
class ClipSegment:
    """A part of a clip: its format, and its first frame at the format's rate."""

    clip: ClipFile
    format: ClipFormat
    start: int = 0


@dataclass(frozen=True)
class SegmentRules:
    """How clips are cut.

    Attributes:
        formats: The formats, of one rate; the first serves what cannot be measured.
        cutting: Which parts of a video become segments.
        count: Segments per video, for ``uniform``.
        stride: Frames from one segment to the next, for ``slide`` and ``scenes``; None: their length.
    """

    formats: tuple[ClipFormat, ...]
    cutting: Cutting = "head"
    count: int = 4
    stride: int | None = None

    @property
    def has_pictures(self) -> bool:
        """Whether pictures are samples of one frame."""
        return any(one.frames == 1 for one in self.formats)

    @property
    def are_default(self) -> bool:
        """Whether each clip is one segment of the only format, so that none has to be measured."""
        return self.cutting == "head" and len(self.formats) == 1


def cut_clips(clips: Sequence[ClipFile], rules: SegmentRules) -> list[ClipSegment]:
    """List the segments of all clips: by format, then in the order of the clips.

    A clip that cannot be measured, or is too short for every format, becomes one segment, whose encoding says
    what is wrong with it.
    """
    if rules.are_default:
        return [ClipSegment(clip, rules.formats[0]) for clip in clips]
    found = [segment for clip in clips for segment in _segments(clip, rules)]
    return sorted(found, key=lambda segment: rules.formats.index(segment.format))


class CutRecord(BaseModel):
    """Segments found before: the clip, the format and the first frame of each, and what they follow from."""

    key: str
    segments: list[tuple[Natural, Natural, Natural]]


def remembered_cuts(
    clips: Sequence[ClipFile], rules: SegmentRules, file: Path, *, save: bool
) -> list[ClipSegment]:
    """Like ``cut_clips``, with the result of an earlier start in ``file``, since measuring decodes videos."""
    if rules.are_default:
        return cut_clips(clips, rules)
    stats = [[str(clip.path), clip.caption is None, clip.path.stat().st_size, clip.path.stat().st_mtime_ns]
             for clip in clips]  # fmt: skip
    key = json_sha256([stats, asdict(rules)])
    with suppress(UsageError, IndexError):  # missing, damaged, or of other clips
        record = read_record(file, CutRecord)
        if record.key == key:
            found = record.segments
            return [ClipSegment(clips[clip], rules.formats[number], start) for clip, number, start in found]
    segments = cut_clips(clips, rules)
    if save:
        places = {clip.path: number for number, clip in enumerate(clips)}
        listed = [(places[one.clip.path], rules.formats.index(one.format), one.start) for one in segments]
        write_json(file, CutRecord(key=key, segments=listed).model_dump())
    return segments


def _segments(clip: ClipFile, rules: SegmentRules) -> Iterator[ClipSegment]:
    moving = [one for one in rules.formats if one.frames > 1] or list(rules.formats)
    try:
        if clip.path.suffix.lower() in PICTURE_SUFFIXES:
            pictures = [one for one in rules.formats if one.frames == 1]
            yield ClipSegment(clip, nearest_format(pictures, *picture_size(clip.path), 1))
            return
        stream = probe(clip.path)
        total = UNKNOWN if stream.seconds is None else math.floor(stream.seconds * moving[0].fps + 0.5)
        scenes = [(0, total)]
        if rules.cutting == "scenes" and clip.caption is not None:
            scenes = scenes_of(clip.path, moving[0].fps)
    except UnusableClipError:
        yield ClipSegment(clip, moving[0])
        return
    fitting = [scene for scene in scenes if scene[1] - scene[0] >= min(one.frames for one in moving)]
    for first, last in fitting or scenes[:1]:
        wanted = nearest_format(moving, *stream.shown_size, last - first)
        for start in starts(last - first, wanted.frames, rules):
            yield ClipSegment(clip, wanted, first + start)


def starts(total: int, length: int, rules: SegmentRules) -> list[int]:
    """First frames of the segments of ``length`` in ``total`` frames; one even if it does not fit."""
    room = total - length
    if rules.cutting == "head" or room <= 0 or total == UNKNOWN:
        return [0]
    if rules.cutting == "uniform":
        return sorted({round(room * i / max(rules.count - 1, 1)) for i in range(rules.count)})
    return list(range(0, room + 1, rules.stride or length))


def nearest_format(formats: Sequence[ClipFormat], height: int, width: int, frames: int) -> ClipFormat:
    """The format of a clip of this size and length: by aspect ratio, then length, then area."""
    shortest = min(one.frames for one in formats)
    filled = [one for one in formats if one.frames <= frames] or [
        one for one in formats if one.frames == shortest
    ]

    def distance(one: ClipFormat) -> tuple[float, int, float]:
        aspect = abs(math.log(one.width * height / (one.height * width)))
        return round(aspect, 6), -one.frames, abs(math.log(one.width * one.height / (width * height)))

    return min(filled, key=distance)


def scenes_of(path: Path, fps: int) -> list[tuple[int, int]]:
    """First and one past the last frame of each scene of a video.

    Raises:
        UnusableClipError: It cannot be decoded.
    """
    filters = f"fps={fps},scale={GRAY_SIDE}:{GRAY_SIDE}:flags=area,format=gray"
    output = ["-map", "0:V:0", "-vf", filters, "-f", "rawvideo", "-"]
    result = ffmpeg([*SANDBOX, "-i", f"file:{path}", *output], seconds=DECODE_SECONDS)
    frames = np.frombuffer(result.stdout, np.uint8)
    frames = frames[: len(frames) // GRAY_SIDE**2 * GRAY_SIDE**2].reshape(-1, GRAY_SIDE**2)
    if not len(frames):
        raise UnusableClipError("unreadable")
    cuts = find_cuts(frames / np.float32(255))
    return list(zip([0, *cuts], [*cuts, len(frames)], strict=True))


def find_cuts(frames: NDArray[np.floating[Any]]) -> list[int]:
    """Numbers of the frames (T, values) that begin a new scene."""
    changes = np.abs(np.diff(frames, axis=0)).mean(1)
    cuts = []
    for number, change in enumerate(changes):
        around = np.delete(
            changes[max(number - CUT_WINDOW, 0) : number + CUT_WINDOW + 1], min(number, CUT_WINDOW)
        )
        if change > CUT and (not len(around) or change > CUT_RATIO * np.median(around)):
            cuts.append(number + 1)
    return cuts
