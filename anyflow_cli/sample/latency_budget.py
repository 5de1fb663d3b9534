"""The largest step count whose video takes at most a given time, from measured costs.

A video takes ``fixed + n * step`` seconds: each step evaluates the network once per chunk (twice with
guidance); decoding and writing the file take the same time at any number of steps.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import AnyflowError
from anyflow_cli.sample.sampler import VideoSampler

FEW, MORE = 1, 5
REPEATS = 2
MAX_STEPS = 50  # no model is trained for more

log = logging.getLogger(__name__)


class VideoCost(NamedTuple):
    """Seconds per step, and seconds of a video that do not depend on its steps."""

    step: float
    fixed: float

    def at(self, steps: int) -> float:
        """Seconds of a video at so many steps."""
        return self.fixed + steps * self.step


def measure_cost(sampler: VideoSampler, prompt: str) -> VideoCost:
    """Sample a video a few times at two step counts, after a warm-up, and take the fastest of each.

    Other work on the machine only ever adds time.
    """
    network: dict[int, float] = {}
    for steps in (FEW, *REPEATS * (FEW, MORE)):
        latents = next(sampler.latents([prompt], [0], steps))
        network[steps] = min(network.get(steps, math.inf), sampler.latency.network)
    output = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        video = sampler.decode(latents)[0]
        with TemporaryDirectory() as folder:
            write_mp4(Path(folder, "video.mp4"), video, sampler.model.fps)
        output = min(output, time.perf_counter() - start)
    difference = (network[MORE] - network[FEW]) / (MORE - FEW)
    step = max(difference, network[MORE] / (2 * MORE))  # at least half of the network's time is steps
    return VideoCost(step, network[FEW] - FEW * step + output)


def steps_within(seconds: float, sampler: VideoSampler, prompt: str) -> int:
    """The largest number of steps, up to ``MAX_STEPS``, at which a video takes at most ``seconds``."""
    cost = measure_cost(sampler, prompt)
    fitting = [steps for steps in range(1, MAX_STEPS + 1) if cost.at(steps) <= seconds]
    if not fitting:
        raise AnyflowError(
            f"A video of one step takes {cost.at(1):.2f} s here, more than the {seconds:g} s allowed.",
            "Allow more seconds, or sample fewer (--frames) or smaller frames (--set model.height=...).",
        )
    log.info(
        "A step takes %.3f s, everything else %.3f s: %d steps take %.2f s of the %g s allowed.",
        *cost, fitting[-1], cost.at(fitting[-1]), seconds,
    )  # fmt: skip
    return fitting[-1]
