#!/usr/bin/env python
"""End every long command at random moments, start it again, and compare its end with an undisturbed run.

    python scripts/kills.py [--rounds 60] [--seed 0] [--lora] [--directory DIR]

The commands are synthesize, train-flowmap, distill, finetune (from videos, which it encodes first) and
evaluate, with one process and, where they take --nproc, with two. They are ended by SIGTERM, SIGINT, SIGHUP,
SIGUSR1 or SIGKILL; with two processes, SIGKILL ends one of them or all. The network has two layers, so that a
step takes milliseconds and a checkpoint is written after each.

With ``--directory``, a later call with more rounds continues there.

Ends with exit code 1 unless every signal but SIGKILL ends with exit code 130, no output has a traceback, and
all data sets, checkpoints, metrics and scores equal those of undisturbed runs to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from anyflow_cli.cli.app import main as anyflow
from anyflow_cli.data.video import write_mp4
from anyflow_cli.recipe.compare import dump
from tests.tiny_pipeline import make_wan_folder
from tests.train.small import same_run
from tests.train.stage import LORA, make_recipe

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
PROCESSES = (1, 2)
RIGHT = "-right"  # suffix of an undisturbed case
STATE = "state.json"  # what a directory has seen
PATIENCE = 300  # seconds within which a command has to end after a signal
STEPS = {"train_flowmap": 40, "distill": 20, "finetune": 40}


class Command(NamedTuple):
    """A long command: its arguments, what it starts from, and the comparison of two results."""

    arguments: tuple[str, ...]
    needs: tuple[str, ...]  # directories of the recipe's runs
    compare: Callable[[Path, Path], None]


def same_data(a: Path, b: Path) -> None:
    """Fail unless two data sets have the same files; hidden ones only save time."""
    files = [
        {path.name: path.read_bytes() for path in home.glob("data/*") if not path.name.startswith(".")}
        for home in (a, b)
    ]
    assert files[0] == files[1], "the data sets differ"


def same_training(stage: str) -> Callable[[Path, Path], None]:
    """Fail unless the newest checkpoints and the metrics of two runs are equal."""
    return lambda a, b: same_run(a / stage, b / stage)


def same_scores(a: Path, b: Path) -> None:
    """Fail unless digests and scores of all videos are equal."""
    found = [
        {
            (file.parent.name, row["prompt"], row["seed"]): (row["digest"], row["score"])
            for file in home.glob("evaluate/*/scores.jsonl")
            for row in map(json.loads, file.read_text().splitlines())
        }
        for home in (a, b)
    ]
    assert found[0] == found[1], "the scores differ"


COMMANDS = {
    "synthesize": Command(("synthesize",), (), same_data),
    "train-flowmap": Command(("train-flowmap",), ("data",), same_training("train-flowmap")),
    "distill": Command(("distill",), ("data", "train-flowmap"), same_training("distill")),
    "finetune": Command(("finetune", "--data", "clips"), ("train-flowmap",), same_training("finetune")),
    "evaluate": Command(("evaluate",), ("train-flowmap",), same_scores),
}


@dataclass
class Case:
    """A command with a number of processes, in a directory of runs of its own."""

    name: str
    processes: int
    place: Path
    kind: str = ""
    seconds: float = 0.0  # of an undisturbed run

    @property
    def runs(self) -> Path:
        """The directory of runs."""
        return self.place / f"{self.name}-{self.processes}{self.kind}"

    @property
    def home(self) -> Path:
        """Results of the recipe."""
        return self.runs / "test"

    def prepare(self) -> None:
        """Start over with what the command needs, as the undisturbed commands left it."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.home.mkdir(parents=True)
        for need in COMMANDS[self.name].needs:
            source = Case("synthesize" if need == "data" else need, 1, self.place, RIGHT)
            shutil.copytree(source.home / need, self.home / need)

    def start(self) -> int:
        """Start the command as a process group of its own; gives its number."""
        arguments = [*COMMANDS[self.name].arguments, "-r", "test.yaml", "--runs", str(self.runs)]
        log = (self.runs / "log.txt").open("wb")
        if self.processes > 1:
            arguments += ["--nproc", str(self.processes)]
            started = [sys.executable, "-m", "anyflow_cli", *arguments]
            return subprocess.Popen(started, stdout=log, stderr=log, preexec_fn=reset_signals).pid
        process = os.fork()  # which has all modules loaded
        if process == 0:
            reset_signals()
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = anyflow(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return process

    def finish(self) -> None:
        """Run the command to its end."""
        began = time.monotonic()
        code = wait_for(self.start())
        assert code == 0, f"{self.name} ended with {code}: {self.log()}"
        self.seconds = time.monotonic() - began

    def check(self) -> None:
        """Compare the result with that of the undisturbed run."""
        COMMANDS[self.name].compare(Case(self.name, self.processes, self.place, RIGHT).home, self.home)

    def log(self) -> str:
        """What the command has printed."""
        return (self.runs / "log.txt").read_text(errors="replace")


def reset_signals() -> None:
    """Be a process group of its own that handles signals as a program in the foreground does."""
    os.setpgid(0, 0)
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_for(process: int) -> int:
    """The exit code of a process; minus the signal if one ended it."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    raise AssertionError(f"process {process} did not end within {PATIENCE} seconds")


def end_group(process: int) -> None:
    """End what is left of a process group, as a machine that fails would."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        return
    for one in psutil.process_iter():
        try:
            if os.getpgid(one.pid) == process:
                one.wait(PATIENCE)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass


def disturb(case: Case, sent: signal.Signals, draw: random.Random) -> str:
    """Start the command, end it at a random moment; how it ended, in words."""
    process = case.start()
    time.sleep(draw.uniform(0, case.seconds))
    workers = psutil.Process(process).children(recursive=True) if case.processes > 1 else []
    single = sent == signal.SIGKILL and workers and draw.random() < 0.5
    try:
        if sent != signal.SIGKILL:
            os.kill(process, sent)
        elif single:
            os.kill(draw.choice(workers).pid, sent)
        else:
            os.killpg(process, sent)
    except ProcessLookupError:
        pass
    code = wait_for(process)
    if sent == signal.SIGKILL:
        end_group(process)
    words = case.log()
    told = f"{case.name}, {case.processes} processes, ended with {code} on {sent.name}: {words}"
    assert "Traceback" not in words, told
    if code == 0:
        return "finished"
    if sent == signal.SIGKILL:
        assert code == (1 if single else -sent), told
        return "one killed" if single else "killed"
    if code == -sent and not words:  # Python had not come as far as the command
        return "before its start"
    assert code == 130, told
    return "saved" if "the state is saved" in words else "interrupted"


def prepare(place: Path, lora: bool) -> None:
    """Write the recipe, a teacher, and six clips."""
    recipe = make_recipe(
        make_wan_folder(place / "wan"),
        "",
        model={"height": 64, "width": 64, "frames": 33, "lora": LORA if lora else None},
        data={"path": None},
        synthesize={"count": 12, "batch_size": 1, "shard_size": 2, "steps": 3},
        evaluate={"prompts": 2, "nfe": (1, 2), "teacher": False, "batch_size": 1},
        **{stage: {"steps": steps} for stage, steps in STEPS.items()},
    )
    (place / "test.yaml").write_text(dump(recipe))
    (place / "clips").mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 255, (33, 64, 64, 3), dtype=np.uint8)
        write_mp4(place / "clips" / f"{index}.mp4", noise, 16)
        (place / "clips" / f"{index}.txt").write_text(f"noise {index}")


def undisturbed(place: Path, state: dict[str, Any]) -> list[Case]:
    """Run every command once with each number of processes, unless it has been; the cases to disturb."""
    found = []
    for name in COMMANDS:
        for processes in PROCESSES:
            right, case = Case(name, processes, place, RIGHT), Case(name, processes, place)
            if (key := f"{name}, {processes} processes") not in state["seconds"]:
                right.prepare()
                right.finish()
                case.prepare()
                state["seconds"][key] = right.seconds
                keep(place, state)
                print(f"{key}: {right.seconds:.1f} s undisturbed", flush=True)
            case.seconds = state["seconds"][key]
            found.append(case)
    return found


def keep(place: Path, state: dict[str, Any]) -> None:
    """Remember what has been done, for a later call."""
    (place / STATE).write_text(json.dumps(state, indent=1))


def main() -> None:
    """Run, end, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--directory", type=Path)
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) if given.directory is None else given.directory.resolve()
        place.mkdir(parents=True, exist_ok=True)
        os.chdir(place)
        state: dict[str, Any] = {"seconds": {}, "rounds": []}
        if (place / STATE).exists():
            state = json.loads((place / STATE).read_text())
        else:
            prepare(place, given.lora)
        cases = undisturbed(place, state)
        order = [case for case in cases for _ in range(3 if case.processes == 1 else 1)]
        for number in range(len(state["rounds"]), given.rounds):
            turn, at = divmod(number, len(order))  # each turn shifts the signals by one
            case, sent = order[at], SIGNALS[(turn + at) % len(SIGNALS)]
            how = disturb(case, sent, random.Random(f"{given.seed} {number}"))
            if how == "finished":
                case.check()
                case.prepare()
            print(f"{number + 1}: {case.name}, {case.processes} processes, {sent.name}: {how}", flush=True)
            state["rounds"].append((case.name, case.processes, sent.name, how))
            keep(place, state)
        for case in cases:
            case.finish()
            case.check()
            case.prepare()
    counts = Counter(tuple(found) for found in state["rounds"])
    for (name, processes, sent_name, how), count in sorted(counts.items()):
        print(f"{name}, {processes} processes, {sent_name}: {how} {count}")
    table = Counter((sent_name, how) for _, _, sent_name, how in state["rounds"])
    print(f"{len(state['rounds'])} rounds, all equal to the bit: {dict(sorted(table.items()))}")


if __name__ == "__main__":
    main()
