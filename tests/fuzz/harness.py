"""Cases of the fuzzer: a file of a sound thing is mutated, the thing is read, and everything else must stay.

A case passes if the reader accepts the mutant, or refuses it in a sentence with a hint, within ``SECONDS``
and ``MEMORY``, and if no other file has changed: neither beside it, nor canaries in the directories around
it, nor anything elsewhere that Python opens for writing, renames or removes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.cli.errors import failure_of
from tests.fuzz.mutations import CANARY, mutate

SECONDS = 5.0  # of one case; a slower one is repeated twice, since the machine may have been busy
MEMORY = 4 << 30  # bytes of address space that a case may add
RESIDENT = 1 << 30  # bytes by which the peak of the resident memory may grow
PROCESS_EVERY = 50  # cases; of so many, the commands of one are run as processes
FAULTS = ("traceback", "hang", "memory", "touched", "lost")


@dataclass(frozen=True)
class Target:
    """A kind of thing that anyflow reads.

    Attributes:
        name: For people.
        make: Writes a sound one into an empty directory.
        use: Reads it as the commands do; gives an exit code, or raises what they would.
        files: Glob of the files to mutate.
        share: Cases, relative to the other targets.
        writes: Patterns of what ``use`` may change; a star stands for slashes, too.
    """

    name: str
    make: Callable[[Path], object]
    use: Callable[[Path], object]
    files: str = "**/*"
    share: int = 4
    writes: tuple[str, ...] = ()


@dataclass
class Outcome:
    """How a case ended: ``accepted``, ``refused N`` with the exit code, or a fault and what was seen."""

    name: str
    told: str = ""


@dataclass
class Tally:
    """Counts by outcome, and the cases that failed."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class HangError(BaseException):
    """A case took too long; not an Exception, so that a reader does not take it for a damaged file."""


class WrongMessageError(Exception):
    """A command ended with a code, but not with a sentence and a hint."""


def run(*arguments: str) -> int:
    """Run a command line and check what it prints; gives its exit code."""
    code, out, err = _in_a_process(arguments) if watch.uses_processes else _in_this_process(arguments)
    if "HangError" in out + err:  # raised in a callback, where Python only prints it
        raise HangError(err)
    if "ran out of memory" in err:
        raise MemoryError(err)
    is_told = "error: " in err and "hint: " in err
    is_clean = not any(part in out + err for part in ("Traceback (most recent", "\x1b[31mred"))
    if code not in (0, 1, 2) or (code and not is_told) or not is_clean or "Unexpected " in err:
        raise WrongMessageError(f"exit code {code}: {out}{err}")
    return code


def _in_this_process(arguments: Sequence[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()


def _in_a_process(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run a command line as users do, unless no shell could pass its arguments on."""
    try:
        [os.fsencode(argument) for argument in arguments]
    except UnicodeEncodeError:
        return _in_this_process(arguments)
    if "\0" in "".join(arguments):
        return _in_this_process(arguments)
    done = subprocess.run(
        [sys.executable, "-m", "anyflow_cli", *arguments], capture_output=True, text=True, check=False,
        errors="replace", env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


class Arena:
    """A target in a directory of its own with canaries around it, and the cases that are played there."""

    def __init__(self, target: Target, root: Path) -> None:
        self.target, self.root = target, root
        self.sound, self.place, self.thing = root / "sound", root / "a" / "b", root / "a" / "b" / "thing"
        self.sound.mkdir(parents=True)
        target.make(self.sound)
        for directory in (root, root / "a", self.place):
            (directory / CANARY).write_text(f"untouched {directory.name}")
        self.files = sorted(
            path.relative_to(self.sound) for path in self.sound.glob(target.files) if path.is_file()
        )
        assert self.files, f"{target.name} has no file {target.files}"
        self._restore()
        self.canaries = self._hashes()
        self._warm_up()

    def _warm_up(self) -> None:
        """Read the sound thing once: it must be accepted, and libraries write their caches now."""
        code = self.target.use(self.thing)
        assert not isinstance(code, int) or code == 0, f"{self.target.name}: the sound one is refused"
        self._clean(self.files[0])

    def _restore(self) -> None:
        """Put a sound thing in place, and forget what was seen of it."""
        if self.thing.is_dir() and not self.thing.is_symlink():
            shutil.rmtree(self.thing)
        shutil.copytree(self.sound, self.thing)
        self.before = self._seen()

    def _hashes(self) -> dict[str, str]:
        """Hashes of all files around the thing."""
        files = [path for path in self.root.rglob("*") if path.is_file() and self.thing not in path.parents]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def _seen(self) -> dict[str, tuple[int, ...]]:
        """What the file system knows of every file and directory below the root."""
        found, open_directories = {}, [str(self.root)]
        while open_directories:
            with os.scandir(open_directories.pop()) as entries:
                for entry in entries:
                    about = entry.stat(follow_symlinks=False)
                    is_directory = entry.is_dir(follow_symlinks=False)
                    if is_directory:
                        open_directories.append(entry.path)
                    times = () if is_directory else (about.st_size, about.st_mtime_ns, about.st_ino)
                    found[entry.path] = (about.st_mode, *times)
        return found

    def play(self, number: int, seed: int) -> Outcome:
        """Play one case; equal numbers and seeds give equal cases."""
        draw = random.Random(f"{seed} {self.target.name} {number}")
        file = draw.choice(self.files)
        watch.uses_processes = number % PROCESS_EVERY == PROCESS_EVERY - 1
        done = mutate(self.thing / file, draw)
        outcome = self._use()
        for _ in range(2):
            if outcome.name == "hang":
                outcome = self._use()
        if outcome.name in FAULTS:
            outcome.told = f"{self.target.name}, case {number}, {file} {done}: {outcome.told}"
        self._clean(file)
        return outcome

    def _use(self) -> Outcome:
        mutant, began = self._seen(), _elapsed()
        outcome = self._read()
        seconds = _elapsed() - began
        if seconds > _allowed() and outcome.name not in FAULTS:
            outcome = Outcome("hang", f"{seconds:.1f} s")
        if outside := watch.changed:
            watch.changed = []
            outcome = Outcome("touched", f"outside of the directory: {sorted(set(outside))}")
        after = self._seen()
        changed = {path for path in mutant.keys() | after.keys() if mutant.get(path) != after.get(path)}
        allowed = [f"{self.place}/{pattern}" for pattern in self.target.writes]
        allowed.append(f"{self.root}/scratch/torchinductor*")  # as torch is imported
        if wrong := {path for path in changed if not any(fnmatch(path, pattern) for pattern in allowed)}:
            is_lost = any(path in mutant for path in wrong)
            outcome = Outcome("lost" if is_lost else "touched", f"changed: {sorted(wrong)}")
        return outcome

    def _read(self) -> Outcome:
        peak = _peak()
        watch.changed = []
        watch.root = str(self.root)
        try:
            with _limits(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = self.target.use(self.thing)
            code = code if isinstance(code, int) else 0
            outcome = Outcome(f"refused {code}" if code else "accepted")
        except HangError as error:
            outcome = Outcome("hang", str(error))
        except MemoryError as error:
            outcome = Outcome("memory", str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = failure_of(error)
            if failure is None or re.search(r"\n(?! )", failure.message) or not failure.hint:
                outcome = Outcome("traceback", f"{type(error).__name__}: {str(error)[-1500:]}")
            elif "ran out of memory" in failure.message:
                outcome = Outcome("memory", repr(error))
            else:
                outcome = Outcome(f"refused {failure.code}")
        finally:
            watch.root = None
        grown = _peak() - peak
        if grown > RESIDENT:
            outcome = Outcome("memory", f"{grown >> 20} MiB")
        return outcome

    def _clean(self, file: Path) -> None:
        """Undo the mutation of a file, or everything if more has changed."""
        path = self.thing / file
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        now = self._seen()
        expected = {name for name in self.before if name != str(path)}
        if now.keys() != expected or any(now[name] != self.before[name] for name in expected):
            for name in sorted(now.keys() - self.before.keys(), reverse=True):
                if Path(name).is_dir() and not Path(name).is_symlink():
                    shutil.rmtree(name, ignore_errors=True)
                else:
                    Path(name).unlink(missing_ok=True)
            self._restore()
        else:
            shutil.copy2(self.sound / file, path)
            self.before = self._seen()


class Watch:
    """Notes the files outside of a root that Python opens for writing, renames or removes."""

    EVENTS = frozenset((
        "open", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.mkdir", "os.link", "os.symlink",
        "os.chmod", "shutil.rmtree", "shutil.move",
    ))  # fmt: skip
    WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    ALLOWED = ("/dev", "/proc/")

    def __init__(self) -> None:
        self.root: str | None = None
        self.uses_processes = False
        self.changed: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root is None or event not in self.EVENTS:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & self.WRITING):
            return
        for path in arguments[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1]:
            if not isinstance(path, str | bytes | os.PathLike):
                continue
            absolute = os.path.abspath(os.fsdecode(path))
            full = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
            if not (
                full.startswith((self.root, *self.ALLOWED))
                or "__pycache__" in full
                or "torchinductor" in full
            ):
                self.changed.append(f"{event} {os.fsdecode(path)}")


watch = Watch()
sys.addaudithook(watch)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit the time and the address space of a block."""

    def end(number: int, frame: FrameType | None) -> None:
        raise HangError(f"not done after {limit} s")

    limit = _allowed() * (20 if watch.uses_processes else 4)
    before = signal.signal(signal.SIGALRM, end)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    faulthandler.dump_traceback_later(3 * limit, exit=True, file=2)  # loops in C
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _allowed() -> float:
    """Seconds for one case; processes first import their libraries."""
    return SECONDS * (6 if watch.uses_processes else 1)


def _elapsed() -> float:
    """Seconds on the clock, without those in which other programs had the processors.

    How long processes have waited for them is not known; theirs are seconds of the processor.
    """
    if watch.uses_processes:
        return sum(os.times()[:4])
    waited = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.monotonic() - waited / 1e9


def _peak() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def play(target: Target, root: Path, cases: range, seed: int = 0) -> Tally:
    """Play cases of a target below an empty directory."""
    tally, scratch, place = Tally(), root / "scratch", root / "a" / "b"
    for directory in (scratch, place):
        directory.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(tempfile, "tempdir", str(scratch))
        arena = Arena(target, root)
        for number in cases:
            outcome = arena.play(number, seed)
            tally.counts[outcome.name] += 1
            if outcome.name in FAULTS:
                tally.faults.append(f"{outcome.name}: {outcome.told}")
    if arena._hashes() != arena.canaries:
        tally.counts["touched"] += 1
        tally.faults.append(f"touched: {target.name}: a canary or the sound thing has changed")
    return tally
