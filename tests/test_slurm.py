"""``scripts/slurm.sh`` with stand-ins for the Slurm commands: what it starts, and when it requeues."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm.sh"
# The real srun turns SIGTERM into SIGKILL for its tasks.
SRUN = """#!/bin/sh
echo "$@" > "$OUT/run with"
sh "$OUT/task" &
echo $! > "$OUT/pid"
trap 'kill -KILL "$(cat "$OUT/pid")"; exit 143' TERM
wait $!
"""
TASK = """#!/bin/sh
trap 'sleep 0.3; echo saved > "$OUT/saved"; exit $STOPPED' TERM
while [ ! -s "$OUT/pid" ]; do sleep 0.02; done
touch "$OUT/started"
[ -z "$LONG" ] || while :; do sleep 0.05; done
exit "$CODE"
"""
SCANCEL = """#!/bin/sh
[ "$*" = "--signal=TERM 42" ] && kill -TERM "$(cat "$OUT/pid")"
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && printf 'node7\\nnode8\\n' && exit
[ -f "$OUT/saved" ] && echo "$@" > "$OUT/queued"
"""


def start(tmp_path: Path, **environment: str) -> subprocess.Popen[bytes]:
    for name, text in (("srun", SRUN), ("task", TASK), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    own = {
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "42", "OUT": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }  # fmt: skip
    return subprocess.Popen(["bash", SCRIPT, "distill", "-r", "my recipe.yaml"], env=own | environment)


@pytest.mark.parametrize("code", [0, 3])
def test_torchrun_starts_on_all_machines_and_its_exit_code_is_returned(tmp_path: Path, code: int) -> None:
    assert start(tmp_path, CODE=str(code)).wait(timeout=20) == code
    started = (tmp_path / "run with").read_text()
    assert "torchrun --nnodes 2 --nproc-per-node 8" in started
    assert "--rdzv-endpoint node7:29500" in started
    assert started.rstrip().endswith("-m anyflow_cli distill -r my recipe.yaml")
    assert not (tmp_path / "queued").exists()


def exit_code_after_sigterm(tmp_path: Path, stopped: int) -> int:
    """Exit code of a job that gets SIGTERM and whose tasks save, then exit with ``stopped``."""
    job = start(tmp_path, LONG="yes", STOPPED=str(stopped))
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    return job.wait(timeout=20)


def test_after_sigterm_the_job_waits_for_the_checkpoint_and_is_requeued(tmp_path: Path) -> None:
    assert exit_code_after_sigterm(tmp_path, stopped=1) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "queued").read_text().split() == ["requeue", "42"]


def test_a_training_that_had_just_finished_is_not_requeued(tmp_path: Path) -> None:
    assert exit_code_after_sigterm(tmp_path, stopped=0) == 0
    assert not (tmp_path / "queued").exists()
