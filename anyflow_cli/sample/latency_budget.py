"""How many steps fit into a number of seconds, from what a step costs here and now.

A video takes ``rest + n * step`` seconds: every step evaluates the network once (or twice, guided) in each
chunk, and the rest is what any number of steps needs: decoding first of all, and writing the file.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import Tensor

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import AnyflowError
from anyflow_cli.sample.sampler import VideoSampler

FEW, MORE = 1, 5
REPEATS = 2
MOST_STEPS = 50  # no model is trained for more

log = logging.getLogger(__name__)


class SamplingCost(NamedTuple):
    """Seconds of a video: for each step, and beside the steps."""

    step: float
    rest: float

    def of(self, steps: int) -> float:
        """Seconds of a video at so many steps."""
        return self.rest + steps * self.step


def measure_cost(sampler: VideoSampler, prompt: str) -> SamplingCost:
    """Make a video of this shape a few times at two step counts, after one to warm up.

    The fastest of each counts: what else runs on a machine only ever adds.
    """
    network: dict[int, float] = {}
    for steps in (FEW, *REPEATS * (FEW, MORE)):
        latents = next(sampler.latents([prompt], [0], steps))
        network[steps] = min(network.get(steps, math.inf), sampler.latency.network)
    finished = min(_seconds_to_file(sampler, latents) for _ in range(REPEATS))
    difference = (network[MORE] - network[FEW]) / (MORE - FEW)
    step = max(difference, network[MORE] / (2 * MORE))  # never so little that half of the time were no steps
    return SamplingCost(step, network[FEW] - FEW * step + finished)


def _seconds_to_file(sampler: VideoSampler, latents: Tensor) -> float:
    """From latents (1, F, C, H, W) on: decode them, write the video."""
    begun = time.perf_counter()
    video = sampler.decode(latents)[0]
    with TemporaryDirectory() as folder:
        write_mp4(Path(folder, "video.mp4"), video, sampler.model.fps)
    return time.perf_counter() - begun


def steps_within(seconds: float, sampler: VideoSampler, prompt: str) -> int:
    """The largest number of steps, up to ``MOST_STEPS``, whose video is made within ``seconds``."""
    cost = measure_cost(sampler, prompt)
    fitting = [steps for steps in range(1, MOST_STEPS + 1) if cost.of(steps) <= seconds]
    if not fitting:
        raise AnyflowError(
            f"A video of one step takes {cost.of(1):.2f} s here, more than the {seconds:g} s allowed.",
            "Allow more seconds, or make fewer (--frames) or smaller frames (--set model.height=...).",
        )
    picked = fitting[-1]
    log.info(
        "A step takes %.3f s and a video %.3f s beside its steps: %d steps, %.2f s of the %g s allowed.",
        *cost, picked, cost.of(picked), seconds,
    )  # fmt: skip
    return picked
