"""The lock of a run: a second command is refused and learns who has it; a dead owner has no lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from anyflow_cli.utils.run_lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that has the lock of ``tmp_path / "run"``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run"), "--nfe", "4"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def end(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    process.send_signal(number)
    process.communicate()


def test_the_second_command_is_refused_at_once_and_told_who_has_it(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    began = time.monotonic()
    try:
        with pytest.raises(UsageError) as error, RunLock(tmp_path / "run"):
            pass
    finally:
        end(owner)
    assert time.monotonic() - began < 1
    assert error.value.exit_code == 2
    assert f"{tmp_path / 'run'} is in use by process {owner.pid} on {os.uname().nodename} since 20" in str(
        error.value
    )
    assert "--nfe 4" in str(error.value)


def test_a_killed_owner_has_no_lock(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    end(owner)
    with RunLock(tmp_path / "run"):
        pass


def test_a_lock_is_free_after_its_block_and_after_release(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        pass
    with RunLock(tmp_path) as lock:
        lock.release()
        with RunLock(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": 3}', "null", "\x00\x00"])
def test_an_unknown_owner_is_another_process(tmp_path: Path, content: str) -> None:
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(UsageError, match="is in use by another process"), RunLock(tmp_path):
            pass


def test_only_the_main_process_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with RunLock(tmp_path), RunLock(tmp_path):
        pass


def test_without_locks_in_the_file_system_a_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunLock(tmp_path):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text
