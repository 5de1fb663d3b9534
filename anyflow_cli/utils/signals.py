"""Signals that ask a command to end: SIGINT, SIGTERM, SIGHUP and SIGUSR1.

Ctrl-C, a cluster's scheduler and a lost connection send them. A command that is not training ends at once, as
on Ctrl-C; training finishes its step and saves. A hang-up that is ignored, as under ``nohup``, stays ignored.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def stop_signals() -> list[signal.Signals]:
    """The signals that end a command of this process."""
    found = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGUSR1"):  # absent on Windows
        if hasattr(signal, name):
            found.append(signal.Signals[name])
    return [one for one in found if one.name != "SIGHUP" or signal.getsignal(one) is not signal.SIG_IGN]


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on any of the signals."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled_by(interrupt):
        yield


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Give an event that any of the signals sets, for a block that ends by itself soon after."""
    requested = threading.Event()
    with _handled_by(lambda number, frame: requested.set()):
        yield requested


def ignore_signals() -> None:
    """Ignore the signals from now on, as a process does that has done its work and is about to end."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def fatal_signals() -> Iterator[None]:
    """Let the signals end the process at once in the block, which waits where no Python handler runs."""
    with _handled_by(signal.SIG_DFL):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
