"""Progress of a long job on stderr: a bar on a terminal, a plain line every few seconds elsewhere.

The job itself only calls back with ``(done, values)``, which is ``Progress.update``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from anyflow_cli.cli.console import stderr
from anyflow_cli.utils.distributed import is_main_process
from anyflow_cli.utils.units import GIB

QUIET = 15.0  # seconds between plain lines


class Progress:
    """Context manager that shows the progress of a job of ``total`` steps."""

    def __init__(self, label: str, total: int, unit: str = "steps") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._first: tuple[int, float] | None = None  # step and time; a resumed job does not start at 0
        self._printed = time.monotonic()
        self._shown = is_main_process()
        self._bar = _bar() if self._shown and stderr.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, values: Mapping[str, float] | None = None) -> None:
        """Show that ``done`` steps are finished, with values of the last one."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, text=self._text(now, values or {}))
        elif self._shown and (now - self._printed >= QUIET or done >= self.total):
            self._printed = now
            text = self._text(now, values or {})
            stderr.print(f"{self.label}: {done}/{self.total} {self.unit}, {text}", soft_wrap=True)

    def _text(self, now: float, values: Mapping[str, float]) -> str:
        """Values, memory and, from the second step on, rate and remaining time."""
        parts = [*(f"{name} {value:.4g}" for name, value in values.items()), _memory()]
        first, since = self._first or (self.done, now)
        if self.done > first and now > since:
            each = (now - since) / (self.done - first)
            parts.append(
                f"{1 / each:.1f}/s" if each < 1 else f"{each:.1f} s per {self.unit.removesuffix('s')}"
            )
            parts.append(f"{in_words(each * (self.total - self.done))} left")
        return ", ".join(parts)


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", style="dim", markup=False),
        console=stderr,
    )


def _memory() -> str:
    """Peak memory of the GPU if one is in use, else the resident memory of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB on the GPU"
    return f"{psutil.Process().memory_info().rss / GIB:.1f} GiB"


def in_words(seconds: float) -> str:
    """Write a duration for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
