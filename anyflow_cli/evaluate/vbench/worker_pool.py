"""Jobs in VBench's environment: one process each, with a time limit, queued over the devices.

A process that dies or hangs is started once more; an error that it reports is not retried, because it would
recur. A failed job keeps its log and is reported, and the others continue.
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
from typing import Any, TypeVar

from pydantic_core import to_json

from anyflow_cli.errors import AnyflowError
from anyflow_cli.evaluate.suite import RawScore
from anyflow_cli.utils.records import parse_record, read_record

WORKER = Path(__file__).with_name("worker.py")
JOB_TRIES = 2
REASON_WIDTH = 160  # characters of a reason; the whole error is in a file
TAIL_LINES = 15  # of a log, repeated in an error

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class LostWorkerError(AnyflowError):
    """A process ended without an answer, or did not end in time."""


@dataclass(frozen=True)
class DimensionAnswer:
    """Answer of the worker to the job ``score``.

    Attributes:
        score: Raw score of the dimension; None for the static filter.
        videos: Score of each video, by path.
        versions: Versions of packages.
        weights: SHA-256 of each file of weights.
    """

    score: RawScore | None
    videos: dict[str, RawScore]
    versions: dict[str, str]
    weights: dict[str, str]


@dataclass(frozen=True)
class WorkerJob:
    """One dimension over its videos; ``seconds`` is its time limit."""

    name: str
    request: dict[str, Any]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)
    answer: type = DimensionAnswer


@dataclass(frozen=True)
class JobFailure:
    """Why a dimension has no score; ``detail`` is the worker's traceback, or the end of its log."""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class _Envelope:
    result: Any = None
    error: str | None = None
    traceback: str = ""


def run_jobs(
    python: Path,
    jobs: Sequence[WorkerJob],
    scratch: Path,
    devices: Sequence[str],
    done: Callable[[WorkerJob, Any], None],
) -> None:
    """Run jobs, one at a time per device.

    Args:
        python: Interpreter of VBench's environment.
        jobs: What to run.
        scratch: Directory for requests, logs and links.
        devices: ``cpu`` or ``cuda:N``.
        done: Called in this thread with each job and its answer or JobFailure.
    """
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)
    running = WorkerProcesses()

    def work(job: WorkerJob) -> Any:
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
        except BaseException:  # on an interruption too, no process may be left behind
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise


class WorkerProcesses:
    """The running workers; after ``stop`` none is left and none can start."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._stopped = False

    def start(self, command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that its children end with it."""
        with self._lock:
            if self._stopped:
                raise AnyflowError("The evaluation was stopped.")
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **settings)
            self._running.add(process)
            return process

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Kill a process and its children, unless it has ended."""
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        """Kill all processes."""
        with self._lock:
            self._stopped, left = True, list(self._running)
        for process in left:
            self.end(process)


def run_worker(
    python: Path,
    request: Mapping[str, Any],
    answer: type[Answer],
    scratch: Path,
    seconds: float,
    variables: Mapping[str, str] | None = None,
    running: WorkerProcesses | None = None,
) -> Answer:
    """Run one worker process and read its answer.

    Args:
        python: Interpreter to run it with.
        request: JSON request.
        answer: Type of the result.
        scratch: Directory for request, answer and log.
        seconds: Time limit.
        variables: Further environment variables.
        running: Register of processes to stop on an interruption.

    Raises:
        LostWorkerError: The process died or exceeded its time; the hint is the end of its log.
        AnyflowError: The worker reported an error; the hint is its traceback.
    """
    scratch = scratch.absolute()  # the worker changes its directory
    scratch.mkdir(parents=True, exist_ok=True)
    question, found = scratch / "request.json", scratch / "answer.json"
    question.write_text(json.dumps(request), encoding="utf-8")
    found.unlink(missing_ok=True)
    processes = running or WorkerProcesses()
    with (scratch / "log.txt").open("wb") as output:
        process = processes.start(
            [str(python), str(WORKER), str(question), str(found)],
            stdout=output,
            stderr=output,
            env=_environment_variables() | dict(variables or {}),
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise LostWorkerError(f"no answer in {seconds:.0f} s", _tail(scratch)) from None
        finally:
            processes.end(process)
    if not found.is_file():
        raise LostWorkerError(f"the process ended with code {code} and no answer", _tail(scratch))
    envelope = read_record(found, _Envelope, _tail(scratch))
    if envelope.error is not None:
        raise AnyflowError(envelope.error, envelope.traceback)
    return parse_record(to_json(envelope.result), answer, str(found), _tail(scratch))


def _outcome(python: Path, job: WorkerJob, scratch: Path, device: str, running: WorkerProcesses) -> Any:
    kind, _, number = device.partition(":")
    request = job.request | {"device": kind, "scratch": str((scratch / "work").absolute())}
    variables = {**job.variables, "CUDA_VISIBLE_DEVICES": number if kind == "cuda" else ""}
    for left in reversed(range(JOB_TRIES)):
        try:
            return run_worker(python, request, job.answer, scratch, job.seconds, variables, running)
        except LostWorkerError as error:
            log.warning("%s on %s: %s.%s", job.name, device, error.message, " Retrying." if left else "")
            failure = JobFailure(f"{error.message}, in {JOB_TRIES} tries", error.hint or "")
        except AnyflowError as error:
            reason = shorten(error.message.partition("\n")[0], REASON_WIDTH, placeholder=" ...")
            return JobFailure(reason, error.hint or "")
    return failure


def _environment_variables() -> dict[str, str]:
    """Variables of this process, except those that would lead another Python to our packages; Hub offline."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _tail(scratch: Path) -> str:
    lines = (scratch / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-TAIL_LINES:])
