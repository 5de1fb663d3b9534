"""Synthesis by several processes that are killed at random moments; run as a script, it prints what happened.

    python -m tests.synthesize.kills DIRECTORY KILLS SEED

The processes are forked from this one, which has imported everything and holds no thread, so that a start
takes milliseconds. Samples come from their seeds, without a model; nothing else is replaced.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import anyflow_cli.synthesize.run as synthesis
from anyflow_cli.data.shards import MANIFEST, LatentSample, Rejection
from anyflow_cli.flow.noise import noise
from anyflow_cli.recipe.schema import DataSection, ModelSection, Recipe, SynthesizeSection
from anyflow_cli.synthesize.job import SynthesisJob, prepare_synthesis

SHARDS, SIZE = 160, 4
SHAPE = (9, 8, 8, 8)
SECONDS = 0.004  # that a sample takes to make


class Quick:
    """Samples from their index alone; each shard that is begun is written to a log."""

    negative = torch.zeros(2, 8)

    def __init__(self, log: Path) -> None:
        self.log = log

    def results(self, indices: range) -> Iterator[LatentSample | Rejection]:
        with self.log.open("a") as log:
            log.write(f"{indices.start // SIZE}\n")
        for index in indices:
            time.sleep(SECONDS)
            yield LatentSample(
                index, f"caption {index}", noise(index, SHAPE), torch.ones(3, 8), {"seed": index}
            )

    def report(self) -> None:
        """Nothing to report."""


def job_of(directory: Path) -> SynthesisJob:
    """The same job for all."""
    model = ModelSection(teacher="tiny", precision="fp32")  # which nobody loads
    made = SynthesizeSection(count=SHARDS * SIZE - 2, shard_size=SIZE)
    return prepare_synthesis(
        Recipe(name="t", model=model, data=DataSection(), synthesize=made), directory / "data"
    )


def start(directory: Path, rank: int, ranks: int) -> int:
    """Fork a process that makes what is missing; its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    synthesis._source = lambda job: Quick(directory / "begun.txt")
    try:
        synthesis.run_synthesis(job_of(directory))
        os._exit(0)
    finally:
        os._exit(1)


def main(directory: Path, kills: int, seed: int) -> None:
    """Rounds of 1 to 5 processes, all killed one after another; at last a round that is left alone."""
    directory.mkdir(parents=True, exist_ok=True)
    draw, killed, rounds, failed = random.Random(seed), 0, 0, 0
    before: set[str] = set()
    while True:
        rounds += 1
        ranks = draw.choice((4, 4, 4, 1, 2, 3, 5)) if killed < kills else 4
        children = [start(directory, rank, ranks) for rank in range(ranks)]
        if killed < kills:
            for child in draw.sample(children, ranks):
                time.sleep(draw.uniform(0, 0.3))
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        killed += codes.count(-signal.SIGKILL)
        failed += sum(code not in (0, -signal.SIGKILL) for code in codes)
        there = {path.name for path in (directory / "data").glob("[0-9]*.tar")}
        assert before <= there, "a complete shard went"
        before = there
        if (directory / "data" / MANIFEST).exists():
            break
    lost = len((directory / "begun.txt").read_text().split()) - SHARDS
    found = {"rounds": rounds, "killed": killed, "failed": failed, "shards lost": lost}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
