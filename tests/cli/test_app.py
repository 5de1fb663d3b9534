"""``main``: help, exit codes, and what an error looks like from outside."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from anyflow_cli import __version__
from anyflow_cli.cli import app as application
from anyflow_cli.cli.app import VERBS, main
from anyflow_cli.errors import AnyflowError, UsageError

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in color unless ``environment`` has NO_COLOR."""
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return subprocess.run(
        [sys.executable, "-m", "anyflow_cli", *arguments],
        env={**inherited, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], int]:
    """Return a function that runs a command line whose one verb raises an error."""

    def run_failing(error: BaseException, *arguments: str) -> int:
        app = typer.Typer()

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(application, "app", app)
        return main([*arguments] or ["--"])

    return run_failing


def test_help_needs_no_torch_and_answers_at_once() -> None:
    code = (
        "import sys; from anyflow_cli.cli.app import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'matplotlib'};"
        "assert not heavy & {*sys.modules}"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
        after = os.times()  # of the processor, not the clock: the machine may be busy
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(used)
    assert min(seconds) < 1.0


def test_nothing_given_is_help(capsys: Capture) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ["recipes", *(verb.name for verb in VERBS)])


@pytest.mark.parametrize("command", [["recipes", "show"], *([verb.name] for verb in VERBS)])
def test_every_command_has_help_with_an_example(command: list[str], capsys: Capture) -> None:
    assert main([*command, "-h"]) == 0
    assert f"$ anyflow {' '.join(command)}" in capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"anyflow {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["recpes"], "Did you mean 'recipes'?"),
        (["recipes", "shw"], "Did you mean 'show'?"),
        (["recipes", "show", "--sett", "a=b"], "did you mean --set?"),
        (["recipes", "copy"], "Missing argument"),
        (["recipes", "show", "--set"], "requires an argument"),
        (["recipes", "show", "--set", "a"], "must be written as --set KEY=VALUE"),
    ],
)
def test_wrong_use_is_two_with_a_hint_and_nothing_on_stdout(
    arguments: list[str], words: str, capsys: Capture
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    error, hint = shown.err.splitlines()
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (AnyflowError("It broke.", "Mend it."), 1, ["error: It broke.", "hint: Mend it."]),
        (UsageError("Not so."), 2, ["error: Not so."]),
        (UsageError("Not [bold]so[/bold] :smile:."), 2, ["error: Not [bold]so[/bold] :smile:."]),
        (KeyboardInterrupt(), 130, ["error: Interrupted."]),
    ],
)
def test_expected_errors_are_a_sentence_without_traceback(
    failing: Callable[[BaseException], int],
    error: BaseException,
    code: int,
    lines: list[str],
    capsys: Capture,
) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_bug_keeps_its_traceback(failing: Callable[[BaseException], int], capsys: Capture) -> None:
    assert failing(KeyError("gone")) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "error: Unexpected KeyError: 'gone'\nhint: This is a bug" in shown


def test_a_failing_disk_is_a_sentence(failing: Callable[[BaseException], int], capsys: Capture) -> None:
    assert failing(OSError(errno.ENOSPC, "No space left on device", "runs/a.tar")) == 1
    assert capsys.readouterr().err.startswith(
        "error: No space is left on the disk of runs/a.tar.\nhint: Free"
    )


def test_a_file_that_ends_early_is_not_an_interruption(
    failing: Callable[[BaseException], int], capsys: Capture
) -> None:
    assert failing(EOFError("Ran out of input")) == 1
    assert "Interrupted" not in capsys.readouterr().err


def test_debug_shows_the_traceback_of_a_known_error(capsys: Capture) -> None:
    assert main(["recipes", "show", "none", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["recipes", "show", "none"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_process_ends_with_the_code_and_no_colour() -> None:
    done = run("recipes", "show", "none", NO_COLOR="1")
    assert done.returncode == 2
    assert "31m" not in done.stderr  # bold may stay, red may not
    assert "31m" in run("recipes", "show", "none").stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's always full device")
def test_a_full_disk_under_stdout_is_a_sentence(unbuffered: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "anyflow_cli", "recipes", "list"], cwd=ROOT, stdout=full,
            stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered}, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: No space is left on the disk.\n")
    assert len(done.stderr.splitlines()) == 2


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "anyflow_cli", "recipes", "list"], cwd=ROOT, stdout=writer,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": ""}, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


INTERRUPTED_IMPORT = """
import sys
import typer
from anyflow_cli.cli import app

app.app = typer.Typer()

@app.app.command()
def fail() -> None:
    exec("raise KeyboardInterrupt")  # as dataclasses executes the methods it writes

sys.exit(app.main(["--"]))
"""


def test_an_interrupted_import_ends_with_the_code_of_interruptions(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_IMPORT)
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "error: Interrupted.\n")


def test_only_the_first_of_several_processes_prints() -> None:
    processes = [
        run("recipes", "list", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", NO_COLOR="1") for rank in "01"
    ]
    assert [(done.returncode, done.stderr) for done in processes] == [(0, "")] * 2
    assert "tiny" in processes[0].stdout
    assert processes[1].stdout == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_work_changes_nothing(number: signal.Signals) -> None:
    ends = """
import atexit, sys, time
from anyflow_cli.cli.app import run_command_line
atexit.register(lambda: (print("ends", flush=True), time.sleep(1)))
sys.argv = ["anyflow", "--version"]
run_command_line()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", ends], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        assert output.readline().startswith(b"anyflow")
        assert output.readline() == b"ends\n"
        process.send_signal(number)
        assert process.wait(30) == 0
