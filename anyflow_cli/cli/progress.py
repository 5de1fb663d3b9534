"""How far a long job is: a bar on a terminal, a plain line now and then elsewhere. Always on stderr.

A job below knows nothing of this; it takes a callable ``(done, figures)``, which is ``Progress.update``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import psutil
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from anyflow_cli.cli.console import is_first_process, stderr

QUIET = 15.0  # seconds between plain lines
GIB = 2**30


class Progress:
    """Shows a job of ``total`` steps while its block runs."""

    def __init__(self, label: str, total: int, unit: str = "steps") -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._start: tuple[int, float] | None = None  # a resumed job's rate counts from where it resumed
        self._printed = time.monotonic()
        self._shown = is_first_process()
        self._bar = _bar() if self._shown and stderr.is_terminal else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, figures="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Say that ``done`` steps are finished, with figures of the last one."""
        now = time.monotonic()
        self._start = self._start or (self.done if done <= self.done + 1 else done, now)
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done, figures=self._figures(now, figures or {}))
        elif self._shown and (now - self._printed >= QUIET or done >= self.total):
            self._printed = now
            left = self._seconds_left(now)
            line = f"{self.label}: {done}/{self.total} {self.unit}, {self._figures(now, figures or {})}"
            stderr.print(line + (f", {_duration(left)} left" if left else ""), soft_wrap=True)

    def _rate(self, now: float) -> float:
        """Steps a second since the first one seen; 0 until there are two."""
        first, since = self._start or (0, now)
        return (self.done - first) / (now - since) if now > since else 0.0

    def _seconds_left(self, now: float) -> float:
        rate = self._rate(now)
        return (self.total - self.done) / rate if rate else 0.0

    def _figures(self, now: float, figures: Mapping[str, float]) -> str:
        """Rate, figures and memory in one line."""
        rate = self._rate(now)
        speed = f"{rate:.2f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"
        values = [f"{name} {value:.4g}" for name, value in figures.items()]
        return ", ".join([*([speed] if rate else []), *values, _memory()])


def _bar() -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", style="dim"),
        TimeRemainingColumn(),
        console=stderr,
    )


def _memory() -> str:
    """The accelerator's memory at its peak if one is in use, else this process's resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB on the GPU"
    return f"{psutil.Process().memory_info().rss / GIB:.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    )
