"""Several processes: --nproc, torchrun and accelerate launch are three ways to the same run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from tests.train.small import rows


def command(recipe: Path, runs: Path, *more: str) -> list[str]:
    return ["train-flowmap", "-r", str(recipe), "--runs", str(runs), *more]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torchrun would be asked to start."""
    seen: list[Any] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.distributed.run.run", seen.append)
    return seen


def test_nproc_starts_the_same_command_in_so_many_processes(
    recipe: Path, tmp_path: Path, started: list[Any]
) -> None:
    given = command(recipe, tmp_path, "--nproc", "2")
    assert main(given) == 0
    assert (started[0].nproc_per_node, started[0].training_script) == ("2", "anyflow_cli")
    assert started[0].training_script_args == given
    assert started[0].signals_to_handle == "SIGINT,SIGTERM,SIGHUP,SIGUSR1,SIGQUIT"
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


def test_the_recipe_may_say_how_many_and_a_mistake_is_found_before(
    recipe: Path, tmp_path: Path, started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(recipe, tmp_path, "--set", "launch.processes=3")) == 0
    assert started[0].nproc_per_node == "3"
    assert main(command(recipe, tmp_path, "--nproc", "0")) == 2
    assert "--nproc: launch.processes must be" in capsys.readouterr().err
    assert len(started) == 1


def test_one_of_several_processes_starts_no_more(
    recipe: Path, tmp_path: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(command(recipe, tmp_path, "--nproc", "2")) == 0
    assert not started
    assert len(rows(tmp_path / "test" / "train-flowmap")) == 2


LAUNCHERS = {
    "nproc": [sys.executable, "-m", "anyflow_cli"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "anyflow_cli"],
    "accelerate": ["accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "anyflow_cli"],
}  # fmt: skip


@pytest.mark.slow
def test_all_ways_give_the_same_run(recipe: Path, tmp_path: Path) -> None:
    for name, launcher in LAUNCHERS.items():
        nproc = ["--nproc", "2"] if name == "nproc" else []
        done = subprocess.run(
            [*launcher, *command(recipe, tmp_path / name, *nproc)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "arning" not in done.stderr, done.stderr
    found = [rows(tmp_path / name / "test" / "train-flowmap") for name in LAUNCHERS]
    for row in zip(*found, strict=True):
        assert all(other == pytest.approx(row[0], rel=1e-5) for other in row[1:])


def processes_of(parent: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(parent).children(recursive=True)]


def start_long_run(recipe: Path, runs: Path, *, hang_up: Any = signal.SIG_DFL) -> subprocess.Popen[str]:
    """A run of two processes that has taken some steps; SIGHUP is handled as its parent says."""
    long = command(recipe, runs, "--nproc", "2", "--steps", "100000")
    run = subprocess.Popen(
        [*LAUNCHERS["nproc"], *long], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
    )  # fmt: skip
    wait_for_steps(run, runs, 3)
    return run


def wait_for_steps(run: subprocess.Popen[str], runs: Path, more: int) -> None:
    """Wait until a run has taken so many more steps."""
    metrics = runs / "test" / "train-flowmap" / "metrics.jsonl"
    before = metrics.read_text().count("\n") if metrics.exists() else 0
    while not (metrics.exists() and metrics.read_text().count("\n") > before + more):
        assert run.poll() is None
        time.sleep(0.1)


def reached(runs: Path) -> int:
    return max(int(path.name[5:]) for path in runs.glob("test/train-flowmap/checkpoints/step-*"))


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_the_launcher_saves_in_all_processes(
    recipe: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = start_long_run(recipe, tmp_path)
    os.kill(run.pid, number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "Traceback" not in errors, errors
    assert errors.count("the state is saved") == 1
    steps = len(rows(tmp_path / "test" / "train-flowmap"))
    assert reached(tmp_path) == steps


@pytest.mark.slow
def test_an_ignored_hang_up_stays_ignored_in_every_process(recipe: Path, tmp_path: Path) -> None:
    """As nohup asks for, and the terminal sends it to all processes of a session."""
    run = start_long_run(recipe, tmp_path, hang_up=signal.SIG_IGN)
    for process in (run.pid, *processes_of(run.pid)):
        os.kill(process, signal.SIGHUP)
    wait_for_steps(run, tmp_path, 3)
    os.kill(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors


@pytest.mark.slow
def test_a_second_start_is_refused_while_several_processes_run(recipe: Path, tmp_path: Path) -> None:
    run = start_long_run(recipe, tmp_path)
    try:
        for more in ([], ["--nproc", "2"]):
            again = subprocess.run(
                [*LAUNCHERS["nproc"], *command(recipe, tmp_path, *more)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert again.returncode == 2, again.stderr
            assert "is in use by process" in again.stderr
    finally:
        os.kill(run.pid, signal.SIGTERM)
        run.communicate(timeout=60)
    assert run.returncode == 130


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_next_start_continues(recipe: Path, tmp_path: Path) -> None:
    run = start_long_run(recipe, tmp_path)
    os.kill(processes_of(run.pid)[-1], signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1, errors
    assert "Traceback" not in errors, errors
    last = reached(tmp_path)
    go_on = command(recipe, tmp_path, "--nproc", "2", "--steps", str(last + 2))
    subprocess.run([*LAUNCHERS["nproc"], *go_on], check=True)
    assert [row["step"] for row in rows(tmp_path / "test" / "train-flowmap")] == list(range(1, last + 3))
