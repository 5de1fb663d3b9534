"""A video that plays while it is being made: fragmented mp4, part after part.

Each part is encoded on its own, begins with a key frame and becomes one fragment (``moof`` and ``mdat``) that
is complete when it is written. One long-running encoder would hold back the last frame of every part, and
with it the whole first part of a causal video, which is one frame. The parts' clocks and numbers all start at
zero, so both are set here, in the boxes that carry them (ISO/IEC 14496-12, 8.8). While it grows a file is
called ``NAME.part.mp4``; it gets its name when it is whole, and what a kill leaves can be played.

Legend: T frames, H W height and width in pixels; parts are uint8 (T, H, W, 3).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from anyflow_cli.data.video import PLAYED, SAME_BYTES, Pixels, ffmpeg, last_line, raw_input
from anyflow_cli.errors import AnyflowError
from anyflow_cli.utils.files import disk_errors

TICKS = 1000  # of the video's clock, a frame
# One key frame a part, hence one fragment. The head of the file is the first part's, and x264 writes there
# what it derives from these values: they are the same for all.
SINGLE = ["-bf", "0", "-g", "1000000", "-sc_threshold", "0"]
FRAGMENTED = ["-movflags", "+empty_moov+default_base_moof+frag_keyframe", "-f", "mp4", "-"]

WriteBytes = Callable[[Pixels], None]


@contextmanager
def growing(path: Path, fps: int) -> Iterator[WriteBytes]:
    """Yield what adds a part to the video; ``path`` is there when the block ends well."""
    part = part_of(path)
    fragments = Fragments(fps)
    with disk_errors(path), part.open("wb", buffering=0) as file:

        def write(pixels: Pixels) -> None:
            file.write(fragments.next(pixels))

        yield write
        os.fsync(file.fileno())
        os.replace(part, path)


def part_of(path: Path) -> Path:
    """What a file is called while it grows."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


class Fragments:
    """The bytes of a video, in the parts in which it comes."""

    def __init__(self, fps: int) -> None:
        self._fps = fps
        self._frames = self._count = 0

    def next(self, pixels: Pixels) -> bytes:
        """What follows the bytes given so far: one fragment, with the file's head before the first."""
        kinds = (b"moof", b"mdat") if self._count else (b"ftyp", b"moov", b"moof", b"mdat")
        boxes = [(kind, box) for kind, box in _boxes(_encoded(pixels, self._fps)) if kind in kinds]
        assert sum(kind == b"moof" for kind, _ in boxes) == 1, "a part of several fragments"
        self._count += 1
        made = b"".join(self._placed(box) if kind == b"moof" else box for kind, box in boxes)
        self._frames += len(pixels)
        return made

    def _placed(self, moof: bytes) -> bytes:
        """The fragment with its number and its time."""
        placed = bytearray(moof)
        number, clock = moof.index(b"mfhd") + 8, moof.index(b"tfdt") + 8  # after name, version and flags
        assert moof[clock - 4] == 1, "a time of 32 bits"
        placed[number : number + 4] = self._count.to_bytes(4, "big")
        placed[clock : clock + 8] = (self._frames * TICKS).to_bytes(8, "big")
        return bytes(placed)


def _encoded(pixels: Pixels, fps: int) -> bytes:
    """One part as a fragmented mp4 of its own."""
    clock = ["-video_track_timescale", str(fps * TICKS)]
    options = [*raw_input(pixels, fps), *PLAYED, *SINGLE, *clock, *SAME_BYTES, *FRAGMENTED]
    result = ffmpeg(options, np.ascontiguousarray(pixels).tobytes())
    if result.returncode:
        reason = last_line(result.stderr.decode(errors="replace"))
        raise AnyflowError(
            f"ffmpeg could not encode {len(pixels)} frames: {reason}.", "Is there memory left?"
        )
    return result.stdout


def _boxes(mp4: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and bytes of each box of a file."""
    start = 0
    while start < len(mp4):
        size = int.from_bytes(mp4[start : start + 4], "big")
        yield mp4[start + 4 : start + 8], mp4[start : start + size]
        start += size
