"""Streaming of a causal model's video: each finished chunk is decoded, encoded and written at once.

Times start when the prompt is read, with the model already open. The first frame counts when its bytes are
written: a viewer waits that long.
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
from anyflow_cli.utils.contact_sheet import spaced_frames

STDOUT = 1


class StreamTiming(NamedTuple):
    """Per part of a video: seconds until it was written, and the frames written by then."""

    seconds: tuple[float, ...]
    frames: tuple[int, ...]

    @property
    def first(self) -> float:
        """Seconds to the first frame."""
        return self.seconds[0]

    @property
    def rate(self) -> float:
        """Frames per second."""
        return self.frames[-1] / self.seconds[-1]

    def summary(self, fps: int) -> str:
        """The figures in words, with the rate at which the video plays."""
        return (
            f"first frame after {self.first:.2f} s, {self.frames[-1]} frames in {self.seconds[-1]:.2f} s, "
            f"{self.rate:.1f} per second (plays at {fps})"
        )


def stream_video(
    sampler: VideoSampler, prompt: str, seed: int, nfe: Steps, *consumers: Callable[[Pixels], None]
) -> StreamTiming:
    """Sample a video and pass each part to all ``consumers``."""
    start = time.perf_counter()
    seconds: list[float] = []
    frames: list[int] = []
    for pixels in sampler.stream(prompt, seed, nfe):
        for consume in consumers:
            consume(pixels)
        frames.append(sum(frames[-1:]) + len(pixels))
        seconds.append(time.perf_counter() - start)
    return StreamTiming(tuple(seconds), tuple(frames))


class FramePicker:
    """Keeps the frames that a contact sheet shows, of a video that arrives in parts."""

    def __init__(self, frames: int, count: int) -> None:
        self._wanted = set(spaced_frames(frames, min(count, frames)))
        self._seen = 0
        self._kept: list[Pixels] = []

    def add(self, pixels: Pixels) -> None:
        """Look at the next part."""
        self._kept.append(pixels[[i for i in range(len(pixels)) if self._seen + i in self._wanted]])
        self._seen += len(pixels)

    @property
    def frames(self) -> Pixels:
        """The frames kept, (count, height, width, 3)."""
        return np.concatenate(self._kept)


def stream_to_stdout(sampler: VideoSampler, prompt: str, seed: int, nfe: Steps) -> StreamTiming:
    """Write the growing mp4 to standard output, for a player."""
    fragments = Fragments(sampler.model.fps)
    with open(os.dup(STDOUT), "wb", buffering=0) as out:

        def write(pixels: Pixels) -> None:
            rest = memoryview(fragments.encode(pixels))
            while rest:  # a pipe may accept only part of it
                rest = rest[out.write(rest) or 0 :]

        try:
            return stream_video(sampler, prompt, seed, nfe, write)
        except BrokenPipeError as error:
            raise AnyflowError(
                "The player closed the stream before its end.", "Keep the player open."
            ) from error
