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
    assert not (tmp_path / "test").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, 1)])
def test_a_signal_ends_all_and_the_next_start_goes_on(
    recipe: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """SIGTERM to the launcher is passed on, and saves; a process killed takes the others with it."""
    long = command(recipe, tmp_path, "--nproc", "2", "--steps", "100000")
    run = subprocess.Popen([*LAUNCHERS["nproc"], *long], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "test" / "train-flowmap" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(run.pid if number == signal.SIGTERM else processes_of(run.pid)[-1], number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == code, errors
    assert "Traceback" not in errors, errors
    assert errors.count("the state is saved") == (number == signal.SIGTERM)
    reached = max(int(path.name[5:]) for path in metrics.parent.glob("checkpoints/step-*"))
    go_on = command(recipe, tmp_path, "--nproc", "2", "--steps", str(reached + 2))
    subprocess.run([*LAUNCHERS["nproc"], *go_on], check=True)
    assert [row["step"] for row in rows(metrics.parent)] == list(range(1, reached + 3))
