"""What a run reports: ``metrics.jsonl``, one JSON object a logged step, TensorBoard and trackers beside it.

A row holds the mean of each value over the steps since the row before. The open sums travel in the
checkpoint, and on resume rows written after the checkpoint are cut off, so that an interrupted run leaves
the same file as an undisturbed one, the fields ``seconds`` and ``memory`` aside.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from anyflow_cli.train.board import Board
from anyflow_cli.utils.files import atomic_write, disk_errors

Log = Callable[[Mapping[str, Any], int], None]


class Metrics:
    """Sums values step by step and writes a row every ``every`` steps. Only the main process writes."""

    def __init__(
        self, directory: Path, every: int, *, writes: bool, tensorboard: bool, log: Log | None = None
    ) -> None:
        self.path, self.every, self.writes = directory / "metrics.jsonl", every, writes
        self.log = log
        self.sums: dict[str, tuple[float, int]] = {}  # of the steps since the last row, and how many had it
        self.steps = 0
        self.since = time.perf_counter()
        self.board_directory = directory / "tensorboard" if tensorboard and writes else None
        self.board: Board | None = None

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        """Take in a step's values; the row, when this step closes one."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, count + 1
        self.steps += 1
        return self._close(step) if step % self.every == 0 else None

    def resume(self, step: int, extra: Mapping[str, Any]) -> None:
        """Continue after ``step``: take up the open sums, drop rows that this run will write again."""
        self.sums = {name: (total, count) for name, (total, count) in extra["sums"].items()}
        self.steps = extra["steps"]
        self._cut(step)

    def restart(self) -> None:
        """Begin at step 0: whatever an earlier start wrote before its first checkpoint goes."""
        self._cut(0)

    def _cut(self, step: int) -> None:
        if self.board_directory is not None:
            with disk_errors(self.board_directory):
                self.board = Board(self.board_directory, step)
        if self.writes and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            with atomic_write(self.path) as temporary:
                temporary.write_text("".join(line for line in lines if _written_by(line, step)))

    def state(self) -> dict[str, Any]:
        """The open sums, for the checkpoint."""
        return {"sums": dict(self.sums), "steps": self.steps}

    def _close(self, step: int) -> dict[str, Any]:
        means = {name: total / count for name, (total, count) in self.sums.items()}
        now = time.perf_counter()
        seconds = round((now - self.since) / self.steps, 4)
        row: dict[str, Any] = {"step": step, **means, "seconds": seconds, "memory": peak_memory()}
        self.sums, self.steps, self.since = {}, 0, now
        if self.writes:
            self._write(row)
        return row

    def _write(self, row: dict[str, Any]) -> None:
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.log is not None:
            self.log(row, row["step"])
        if self.board is not None:
            with disk_errors(self.board.path):
                self.board.add(row, row["step"])


def peak_memory() -> int:
    """Peak bytes so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _written_by(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:  # the last line of a killed run may be torn
        return False
