#!/usr/bin/env python
"""Kill a stage-2 run at random moments, start it again each time, compare its end with an undisturbed run.

    python scripts/kills.py [--kills 50] [--seed 0] [--lora]

The network has two layers and videos are three frames of 4x4 latents, so that a step takes milliseconds and a
checkpoint is written after each: many kills fall into the writing of one. Ends with exit code 1 if a single
bit of weights, averages, optimizers or metrics differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from anyflow_cli.runs.checkpoint import checkpoint_step, complete
from tests.train.small import same_run, trainer

LONGEST = 0.25  # seconds from a start's first checkpoint to its kill


def start(directory: Path, steps: int, lora: bool) -> int:
    """The run in a process of its own; gives its number."""
    process = os.fork()
    if process == 0:
        trainer(directory, "on-policy", lora=lora, steps=steps, checkpoint_every=1, log_every=1).run()
        os._exit(0)
    return process


def newest(directory: Path) -> int:
    """The step it would continue from."""
    return max(map(checkpoint_step, complete(directory / "checkpoints")), default=0)


def kill_once(directory: Path, steps: int, lora: bool, wait: float) -> tuple[int, bool]:
    """Start, wait for progress and a little longer, kill; the step reached, whether one was being written."""
    before = newest(directory)
    process = start(directory, steps, lora)
    while newest(directory) == before:
        time.sleep(0.002)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return newest(directory), any((directory / "checkpoints").glob(".step-*.partial"))


def main() -> None:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw, steps = random.Random(given.seed), 100_000
    with tempfile.TemporaryDirectory() as place:
        disturbed, other = Path(place, "disturbed"), Path(place, "undisturbed")
        found = [
            kill_once(disturbed, steps, given.lora, draw.uniform(0, LONGEST)) for _ in range(given.kills)
        ]
        last = found[-1][0] + 5
        for directory in (disturbed, other):
            _, status = os.waitpid(start(directory, last, given.lora), 0)
            assert status == 0, f"the run in {directory} failed"
        same_run(disturbed, other)
    writing = sum(partial for _, partial in found)
    print(f"{given.kills} kills in {last} steps, {writing} while a checkpoint was written: equal to the bit")


if __name__ == "__main__":
    main()
