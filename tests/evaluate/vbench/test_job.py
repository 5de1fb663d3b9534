"""Worker processes that answer, fail, crash or hang: each is reported, and the others continue."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.evaluate.vbench import worker_pool
from anyflow_cli.evaluate.vbench.worker_pool import JobFailure, WorkerJob, run_jobs

WORKER = """
import json, os, signal, sys, time
request, answer = json.load(open(sys.argv[1])), sys.argv[2]
print("scoring", request["dimension"])
with open(os.path.join(os.path.dirname(answer), "starts"), "a") as starts:
    starts.write(os.environ["CUDA_VISIBLE_DEVICES"] + " ")
if request["act"] == "crash" or request["act"] == "crash once" and not os.path.exists(answer + ".crashed"):
    open(answer + ".crashed", "w").close()
    os.kill(os.getpid(), signal.SIGSEGV)
if request["act"] == "hang":
    child = os.fork()
    if child:
        open(answer + ".child", "w").write(str(child))
    time.sleep(60)
if request["act"] == "raise":
    found = {"error": "ValueError: first line\\nsecond", "traceback": "Traceback: deep inside"}
else:
    found = {"result": {"score": 0.5, "device": request["device"], "no": os.environ.get("PYTHONPATH")}}
json.dump(found, open(answer, "w"))
"""


@pytest.fixture
def outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run acts through stand-in workers and return their outcomes."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(worker_pool, "WORKER", tmp_path / "worker.py")

    def run(acts: dict[str, str], devices: tuple[str, ...] = ("cpu",), seconds: float = 30) -> dict[str, Any]:
        jobs = [
            WorkerJob(name, {"dimension": name, "act": act}, seconds, answer=dict)
            for name, act in acts.items()
        ]
        found: dict[str, Any] = {}
        run_jobs(Path(sys.executable), jobs, tmp_path / "work", devices,
                 lambda one, outcome: found.__setitem__(one.name, outcome))  # fmt: skip
        return found

    return run


def test_a_reported_error_is_complete_and_not_retried(outcomes: Any, tmp_path: Path) -> None:
    found = outcomes({"scene": "raise", "color": "answer"})
    assert found["scene"] == JobFailure("ValueError: first line", "Traceback: deep inside")
    assert found["color"]["score"] == 0.5
    assert (tmp_path / "work" / "scene" / "starts").read_text().split() == []  # one start, no GPU visible
    assert (tmp_path / "work" / "scene" / "starts").read_text() == " "


def test_a_crash_is_retried_once(outcomes: Any, tmp_path: Path) -> None:
    found = outcomes({"scene": "crash", "color": "crash once"})
    assert "ended with code -11 and no answer, in 2 tries" in found["scene"].reason
    assert "scoring scene" in found["scene"].detail
    assert found["color"]["score"] == 0.5
    assert (tmp_path / "work" / "scene" / "starts").read_text() == "  "


def test_a_hanging_worker_and_its_children_are_killed(outcomes: Any, tmp_path: Path) -> None:
    found = outcomes({"scene": "hang"}, seconds=1.5)
    assert found["scene"].reason == "no answer in 2 s, in 2 tries"
    assert _ends(int((tmp_path / "work" / "scene" / "answer.json.child").read_text()))


def test_each_job_sees_one_device(outcomes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/our/packages")
    found = outcomes(dict.fromkeys("abcd", "answer"), devices=("cuda:0", "cuda:1"))
    assert {one["device"] for one in found.values()} == {"cuda"}
    assert {one["no"] for one in found.values()} == {None}
    shown = {(tmp_path / "work" / name / "starts").read_text().strip() for name in "abcd"}
    assert shown <= {"0", "1"}


def test_an_interruption_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(worker_pool, "WORKER", tmp_path / "worker.py")

    def interrupt(one: WorkerJob, outcome: Any) -> None:
        while not (tmp_path / "work" / "b" / "answer.json.child").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    jobs = [
        WorkerJob("a", {"dimension": "a", "act": "answer"}, 30, answer=dict),
        WorkerJob("b", {"dimension": "b", "act": "hang"}, 30),
    ]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_jobs(Path(sys.executable), jobs, tmp_path / "work", ("cpu", "cpu"), interrupt)
    assert time.monotonic() - start < 20
    assert _ends(int((tmp_path / "work" / "b" / "answer.json.child").read_text()))


def _ends(process: int) -> bool:
    """Whether a killed process is gone within seconds, which takes a while on a busy machine."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().split()[2]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
