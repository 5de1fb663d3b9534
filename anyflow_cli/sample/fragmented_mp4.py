"""Fragmented mp4: a video that plays while it is being sampled.

Each part is encoded separately, starts with a key frame and becomes one fragment (``moof`` and ``mdat``),
complete as soon as it is written. A single long-running encoder would hold back the last frame of every part,
and with it the whole first part of a causal video, which is one frame. Encoders start each part at time and
number zero, so both are set here, in the boxes that hold them (ISO/IEC 14496-12, 8.8). A growing file is
called ``NAME.part.mp4`` and renamed when it is complete; after a kill it can still be played.

Legend: T frames, H W height and width in pixels; parts are uint8 (T, H, W, 3).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from anyflow_cli.data.video import BITEXACT, H264, Pixels, ffmpeg, last_line, raw_video_input
from anyflow_cli.errors import AnyflowError
from anyflow_cli.utils.files import disk_errors

TICKS = 1000  # of the video's clock, per frame
# One key frame per part, hence one fragment. The file has the head of the first part, where x264 writes what
# it derives from these values: they must be the same for all parts.
SINGLE = ["-bf", "0", "-g", "1000000", "-sc_threshold", "0"]
FRAGMENTED = ["-movflags", "+empty_moov+default_base_moof+frag_keyframe", "-f", "mp4", "-"]

WriteFrames = Callable[[Pixels], None]


@contextmanager
def growing_mp4(path: Path, fps: int) -> Iterator[WriteFrames]:
    """Yield a function that appends frames; ``path`` exists once the block ends without an error."""
    part = partial_path(path)
    fragments = Fragments(fps)
    with disk_errors(path), part.open("wb", buffering=0) as file:

        def write(pixels: Pixels) -> None:
            file.write(fragments.encode(pixels))

        yield write
        os.fsync(file.fileno())
        os.replace(part, path)


def partial_path(path: Path) -> Path:
    """Name of a file while it grows."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


class Fragments:
    """Encodes a video part by part."""

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._frames = self._count = 0

    def encode(self, pixels: Pixels) -> bytes:
        """Encode the next frames as one fragment, after the file's head if they are the first."""
        kinds = (b"moof", b"mdat") if self._count else (b"ftyp", b"moov", b"moof", b"mdat")
        boxes = [(kind, box) for kind, box in _boxes(_encode_alone(pixels, self._fps)) if kind in kinds]
        assert sum(kind == b"moof" for kind, _ in boxes) == 1, "a part of several fragments"
        self._count += 1
        encoded = b"".join(self._with_position(box) if kind == b"moof" else box for kind, box in boxes)
        self._frames += len(pixels)
        return encoded

    def _with_position(self, moof: bytes) -> bytes:
        """Set a fragment's sequence number and start time."""
        positioned = bytearray(moof)
        number, clock = moof.index(b"mfhd") + 8, moof.index(b"tfdt") + 8  # after name, version and flags
        assert moof[clock - 4] == 1, "a time of 32 bits"
        positioned[number : number + 4] = self._count.to_bytes(4, "big")
        positioned[clock : clock + 8] = (self._frames * TICKS).to_bytes(8, "big")
        return bytes(positioned)


def _encode_alone(pixels: Pixels, fps: int) -> bytes:
    """Encode one part as a fragmented mp4 of its own."""
    clock = ["-video_track_timescale", str(fps * TICKS)]
    options = [*raw_video_input(pixels, fps), *H264, *SINGLE, *clock, *BITEXACT, *FRAGMENTED]
    result = ffmpeg(options, np.ascontiguousarray(pixels).tobytes())
    if result.returncode:
        raise AnyflowError(
            f"ffmpeg could not encode {len(pixels)} frames: {last_line(result)}.", "Check the free memory."
        )
    return result.stdout


def _boxes(mp4: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each top-level box."""
    start = 0
    while start < len(mp4):
        size = int.from_bytes(mp4[start : start + 4], "big")
        yield mp4[start + 4 : start + 8], mp4[start : start + size]
        start += size
