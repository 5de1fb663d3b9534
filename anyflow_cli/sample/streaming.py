"""A causal model's video while it is made: each finished chunk is decoded, encoded and written at once.

The clock starts when the prompt is read, with the model already open, and stops for the first frame when its
bytes are written: what a viewer waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from anyflow_cli.data.video import Pixels
from anyflow_cli.errors import AnyflowError
from anyflow_cli.sample.fragmented_mp4 import Fragments
from anyflow_cli.sample.sampler import Steps, VideoSampler
from anyflow_cli.utils.contact_sheet import picked

STDOUT = 1


class Pace(NamedTuple):
    """When each part of a video was written: seconds, and the frames that were there by then."""

    seconds: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def first(self) -> float:
        """Seconds to the first frame."""
        return self.seconds[0]

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames[-1] / self.seconds[-1]

    def said(self, fps: int) -> str:
        """The figures in words; at what rate the video plays tells whether a viewer has to wait."""
        return (
            f"first frame after {self.first:.2f} s, {self.frames[-1]} frames in {self.seconds[-1]:.2f} s, "
            f"{self.rate:.1f} a second (plays at {fps})"
        )


def stream_video(
    sampler: VideoSampler, prompt: str, seed: int, nfe: Steps, *takers: Callable[[Pixels], None]
) -> Pace:
    """Make a video and give each part to all of ``takers``."""
    start = time.perf_counter()
    seconds: list[float] = []
    frames: list[int] = []
    for pixels in sampler.stream(prompt, seed, nfe):
        for take in takers:
            take(pixels)
        frames.append(sum(frames[-1:]) + len(pixels))
        seconds.append(time.perf_counter() - start)
    return Pace(tuple(seconds), tuple(frames))


class Shown:
    """What ``sheets.pick_frames`` picks, of a video that comes in parts."""

    def __init__(self, frames: int, count: int) -> None:
        self._wanted = set(picked(frames, min(count, frames)))
        self._passed = 0
        self._kept: list[Pixels] = []

    def pass_by(self, pixels: Pixels) -> None:
        """Keep what is wanted of the next part."""
        wanted = [i for i in range(len(pixels)) if self._passed + i in self._wanted]
        self._kept.append(pixels[wanted])
        self._passed += len(pixels)

    @property
    def frames(self) -> Pixels:
        """The frames kept, (count, height, width, 3)."""
        return np.concatenate(self._kept)


def stream_to_stdout(sampler: VideoSampler, prompt: str, seed: int, nfe: Steps) -> Pace:
    """Send the growing mp4 to standard output, for a player."""
    fragments = Fragments(sampler.model.fps)
    with open(os.dup(STDOUT), "wb", buffering=0) as out:

        def write(pixels: Pixels) -> None:
            rest = memoryview(fragments.next(pixels))
            while rest:  # a pipe may take less than all
                rest = rest[out.write(rest) or 0 :]

        try:
            return stream_video(sampler, prompt, seed, nfe, write)
        except BrokenPipeError as error:
            raise AnyflowError(
                "The reader of the stream went away before its end.", "Keep the player open."
            ) from error
