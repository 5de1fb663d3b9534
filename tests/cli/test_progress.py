"""Progress off a terminal: few plain lines, true numbers; and the bar on one."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from anyflow_cli.cli import progress
from anyflow_cli.cli.progress import QUIET, Progress

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """A clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return iter([now])


def lines_of(now: list[float], steps: range, seconds: float, capture: Capture) -> list[str]:
    with Progress("distill", steps.stop - 1) as shown:
        for step in steps:
            now[0] += seconds
            shown.update(step, {"loss": 0.25})
    return capture.readouterr().err.splitlines()


def test_plain_lines_are_few_and_the_last_is_there(clock: Iterator[list[float]], capsys: Capture) -> None:
    lines = lines_of(next(clock), range(1, 101), QUIET / 10, capsys)
    assert len(lines) == 10
    assert lines[-1].startswith("distill: 100/100 steps, loss 0.25, ")


def test_rate_and_time_left_are_those_of_the_clock(clock: Iterator[list[float]], capsys: Capture) -> None:
    lines = lines_of(next(clock), range(1, 101), QUIET, capsys)
    assert lines[9].endswith("15.0 s per step, 22 min 30 s left")  # 90 steps of 15 s after the tenth
    assert "10/100" in lines[9]


def test_a_resumed_job_counts_its_rate_from_where_it_resumed(
    clock: Iterator[list[float]], capsys: Capture
) -> None:
    lines = lines_of(next(clock), range(91, 101), QUIET, capsys)
    assert lines[1].endswith("15.0 s per step, 2 min 00 s left")


def test_other_processes_show_nothing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with Progress("distill", 1) as shown:
        shown.update(1)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "stderr", console)
    with Progress("distill", 4) as shown:
        shown.update(3, {"loss": 0.5})
        console.print("a line above")
    text = terminal.getvalue()
    assert "3/4" in text
    assert "loss 0.5" in text
    assert "a line above" in text
