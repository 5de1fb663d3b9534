"""What a run reports: ``metrics.jsonl`` with one JSON object per row, TensorBoard, and experiment trackers.

A row holds the mean of each value over the steps since the previous row. The open sums are part of the
checkpoint, and on resume the rows after the checkpoint are dropped, so an interrupted run leaves the same
file as an undisturbed one except for ``seconds`` and ``memory``. TensorBoard hides such rows too; Weights &
Biases and trackio keep them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import atomic_write, disk_errors
from anyflow_cli.utils.records import parse_record

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

TrackerLog = Callable[[Mapping[str, Any], int], None]
PROJECT = "anyflow"  # at the trackers


class Metrics:
    """Sums values over steps and writes a row every ``every`` steps; only the main process ``writes``."""

    def __init__(
        self, directory: Path, every: int, *, writes: bool, tensorboard: bool, log: TrackerLog | None = None
    ) -> None:
        self.path, self.every, self.writes, self.log = directory / "metrics.jsonl", every, writes, log
        self.sums: dict[str, tuple[float, int]] = {}  # since the last row: sum, and steps that had the value
        self.steps = 0
        self.since = time.perf_counter()
        self.tensorboard_directory = directory / "tensorboard" if tensorboard and writes else None
        self.tensorboard: SummaryWriter | None = None

    def add(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        """Add a step's values; return the row if this step ends one."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, count + 1
        self.steps += 1
        return self._end_row(step) if step % self.every == 0 else None

    def resume(self, step: int, sums: Mapping[str, tuple[float, int]], steps: int) -> None:
        """Continue after ``step`` from the open sums of a checkpoint."""
        self.sums, self.steps = dict(sums), steps
        self._drop_rows_after(step)

    def restart(self) -> None:
        """Begin at step 0: drop the rows of an earlier start that saved no checkpoint."""
        self._drop_rows_after(0)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self.tensorboard is not None:
            with suppress(OSError):  # raised before: each row was flushed
                self.tensorboard.close()
            self.tensorboard = None

    def _drop_rows_after(self, step: int) -> None:
        if self.tensorboard_directory is not None:
            self.close()
            with disk_errors(self.tensorboard_directory):
                self.tensorboard = _open_tensorboard(self.tensorboard_directory, step)
        if self.writes and self.path.exists():
            kept = b"".join(_rows_until(self.path, step))
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(kept)

    def _end_row(self, step: int) -> dict[str, Any]:
        means = {name: total / count for name, (total, count) in self.sums.items()}
        now = time.perf_counter()
        seconds = round((now - self.since) / self.steps, 4)
        row: dict[str, Any] = {"step": step, **means, "seconds": seconds, "memory": peak_memory()}
        self.sums, self.steps, self.since = {}, 0, now
        if self.writes:
            with disk_errors(self.path), self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            if self.log is not None:
                self.log(row, step)
        if self.tensorboard is not None:
            with disk_errors(Path(self.tensorboard.log_dir)):
                for name, value in row.items():
                    self.tensorboard.add_scalar(name, value, step)
                self.tensorboard.flush()
        return row


def _open_tensorboard(directory: Path, step: int) -> SummaryWriter:
    """A new file of events that hides the rows after ``step`` in the files of earlier starts."""
    from torch.utils.tensorboard.writer import SummaryWriter

    report = threading.excepthook

    def report_unless_raised(failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread prints no traceback: ``flush`` raises its disk errors in the main thread."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    threading.excepthook = report_unless_raised
    return SummaryWriter(str(directory), purge_step=step + 1)


def peak_memory() -> int:
    """Peak bytes so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_trackers(
    accelerator: Any, names: Sequence[str], directory: Path, config: Mapping[str, Any]
) -> None:
    """Start or continue the run at Weights & Biases or trackio; ``accelerator.log`` then reaches them.

    A run keeps its identity there over restarts, since it is derived from the directory.
    """
    for name in names:
        if find_spec(name) is None:
            hint = f"Install it (pip install {name}), or remove it from trackers."
            raise UsageError(f"The tracker {name} is not installed.", hint, everywhere=True)
    title = f"{directory.parent.name}-{directory.name}"
    identity = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
    accelerator.log_with = list(names)
    accelerator.init_trackers(
        PROJECT,
        dict(config),
        init_kwargs={
            "wandb": {"name": title, "id": identity, "resume": "allow", "dir": str(directory)},
            "trackio": {"name": f"{title}-{identity}", "resume": "allow"},
        },
    )


def finish_trackers(accelerator: Any) -> None:
    """Send what is still to be sent."""
    for tracker in accelerator.trackers:
        tracker.finish()


class _Row(BaseModel):
    step: int


def _rows_until(path: Path, step: int) -> Iterator[bytes]:
    """The lines of the rows up to ``step``; the last line of a killed run may be torn, and is dropped."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            row = parse_record(line, _Row, f"{path}, line {number},", "Remove that line, or the file.")
            if row.step <= step:
                yield line
