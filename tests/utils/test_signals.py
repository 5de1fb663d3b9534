"""The signals that end a command: at once, or where it says so; a hang-up that is ignored stays ignored."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from anyflow_cli.utils.signals import interruptible, stop_requests, stop_signals

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_ends_a_block_as_ctrl_c_does(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", STOPS)
def test_inside_a_block_that_ends_by_itself_a_signal_only_asks(number: signal.Signals) -> None:
    with interruptible(), stop_requests() as requested:
        assert not requested.is_set()
        os.kill(os.getpid(), number)
        assert requested.wait(1)


def test_an_ignored_hang_up_is_no_signal_to_end() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stop_signals()
        with interruptible(), stop_requests() as requested:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requested.wait(0.05)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_is_handled() -> None:
    seen: list[object] = []

    def run() -> None:
        with interruptible(), stop_requests():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]
