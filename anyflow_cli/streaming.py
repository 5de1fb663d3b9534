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

from anyflow_cli.data.clips import Pixels
from anyflow_cli.data.fragments import Fragments
from anyflow_cli.errors import AnyflowError
from anyflow_cli.sample import Sampler, Steps

STDOUT = 1


class Pace(NamedTuple):
    """Seconds to the first frame and to the last one, and their number."""

    first: float
    total: float
    frames: int

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.frames / self.total

    def said(self, fps: int) -> str:
        """The figures in words; at what rate the video plays tells whether a viewer has to wait."""
        return (
            f"first frame after {self.first:.2f} s, {self.frames} frames in {self.total:.2f} s, "
            f"{self.rate:.1f} a second (plays at {fps})"
        )


def stream_video(
    sampler: Sampler, prompt: str, seed: int, nfe: Steps, *takers: Callable[[Pixels], None]
) -> Pace:
    """Make a video and give each part to all of ``takers``."""
    start = time.perf_counter()
    first, frames = 0.0, 0
    for pixels in sampler.stream(prompt, seed, nfe):
        for take in takers:
            take(pixels)
        frames += len(pixels)
        first = first or time.perf_counter() - start
    return Pace(first, time.perf_counter() - start, frames)


class Shown:
    """What ``sheets.pick_frames`` picks, of a video that comes in parts."""

    def __init__(self, frames: int, count: int) -> None:
        self._wanted = set(np.linspace(0, frames - 1, min(count, frames)).round().astype(int).tolist())
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


def stream_to_stdout(sampler: Sampler, prompt: str, seed: int, nfe: Steps) -> Pace:
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
