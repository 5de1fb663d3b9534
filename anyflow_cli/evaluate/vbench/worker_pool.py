"""Jobs for VBench's environment: one process each, a time limit, errors whole, a queue over the devices.

A process that dies or hangs is started once more; an error that it reports is not, since it would come back.
A failed job keeps its log and is named; the others go on.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from textwrap import shorten
from threading import Lock
from typing import Any

from anyflow_cli.errors import AnyflowError

WORKER = Path(__file__).with_name("worker.py")
JOB_TRIES = 2
WIDEST = 160  # letters of a reason; the whole error stands beside it
TAIL = 15  # lines of a log that an error repeats

log = logging.getLogger(__name__)


class LostWorkerError(AnyflowError):
    """A process ended without an answer, or did not end in time."""


@dataclass(frozen=True)
class WorkerJob:
    """One dimension over its videos; ``seconds`` is what it may take."""

    name: str
    request: dict[str, Any]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobFailure:
    """A dimension that has no score, and why."""

    reason: str
    detail: str = ""  # the worker's traceback, or the end of its log


Outcome = dict[str, Any] | JobFailure


def run_jobs(
    python: Path,
    jobs: Sequence[WorkerJob],
    scratch: Path,
    devices: Sequence[str],
    done: Callable[[WorkerJob, Outcome], None],
) -> None:
    """Run all jobs, one at a time on each device; ``done`` hears of each as it ends, from this thread."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)
    running = Processes()

    def work(job: WorkerJob) -> Outcome:
        device = free.get()
        try:
            return _outcome(python, job, scratch / job.name, device, running)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                done(futures[future], future.result())
        except BaseException:  # an interruption too must leave no process behind
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise


class Processes:
    """Those that run now; after ``stop`` none is left and none starts any more."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._stopped = False

    def start(self, command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        """Start one in a session of its own, so that what it starts ends with it."""
        with self._lock:
            if self._stopped:
                raise AnyflowError("The evaluation was stopped.")
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **settings)
            self._running.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """End it and all that it started, if it has not ended by itself."""
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """End all."""
        with self._lock:
            self._stopped, left = True, list(self._running)
        for process in left:
            self.end(process)


def ask(
    python: Path,
    request: Mapping[str, Any],
    scratch: Path,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    running: Processes | None = None,
) -> dict[str, Any]:
    """One process: the result, or an AnyflowError with the worker's traceback as its hint."""
    scratch = scratch.absolute()  # the worker works elsewhere
    scratch.mkdir(parents=True, exist_ok=True)
    question, answer = scratch / "request.json", scratch / "answer.json"
    question.write_text(json.dumps(request), encoding="utf-8")
    answer.unlink(missing_ok=True)
    command = [str(python), str(WORKER), str(question), str(answer)]
    processes = running or Processes()
    surroundings = _surroundings() | dict(variables or {})
    with (scratch / "log.txt").open("wb") as output:
        process = processes.start(command, stdout=output, stderr=output, env=surroundings)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LostWorkerError(f"no answer in {seconds:.0f} s", _tail(scratch)) from None
        finally:
            processes.end(process)
    if not answer.is_file():
        raise LostWorkerError(f"the process ended with code {code} and no answer", _tail(scratch))
    found = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in found:
        raise AnyflowError(found["error"], found["traceback"])
    result: dict[str, Any] = found["result"]
    return result


def _outcome(python: Path, job: WorkerJob, scratch: Path, device: str, running: Processes) -> Outcome:
    request = job.request | {
        "device": device.partition(":")[0],
        "scratch": str((scratch / "work").absolute()),
    }
    variables = {**job.variables, **_choose(device)}
    for left in reversed(range(JOB_TRIES)):
        try:
            return ask(python, request, scratch, job.seconds, variables, running)
        except LostWorkerError as error:
            log.warning("%s on %s: %s.%s", job.name, device, error.message, " Once more." if left else "")
            failure = JobFailure(f"{error.message}, in {JOB_TRIES} tries", error.hint or "")
        except AnyflowError as error:
            reason = shorten(error.message.partition("\n")[0], WIDEST, placeholder=" ...")
            return JobFailure(reason, error.hint or "")
    return failure


def _choose(device: str) -> dict[str, str]:
    """Show a process its own GPU alone."""
    kind, _, number = device.partition(":")
    return {"CUDA_VISIBLE_DEVICES": number if kind == "cuda" else ""}


def _surroundings() -> dict[str, str]:
    """Our variables, without those that would lead another Python into our packages; nothing is fetched."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _tail(scratch: Path) -> str:
    lines = (scratch / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL:])
