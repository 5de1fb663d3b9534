#!/usr/bin/env python
"""End every long command at random moments, start it again, and compare its end with an undisturbed run.

    python scripts/kills.py [--rounds 60] [--seed 0] [--lora]

The commands are synthesize, train-flowmap, distill, finetune (from videos, which it encodes first) and
evaluate, with one process and, where they take --nproc, with two. They are ended by SIGTERM, SIGINT, SIGHUP,
SIGUSR1 or SIGKILL; with two processes, SIGKILL ends one of them or all. The network has two layers, so that a
step takes milliseconds and a checkpoint is written after each.

Ends with exit code 1 unless every signal but SIGKILL ends with exit code 130, no output has a traceback, and
all data sets, checkpoints, metrics and scores equal those of undisturbed runs to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
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
from anyflow_cli.runs.checkpoint import load, newest
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, make_recipe

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGKILL)
PATIENCE = 300  # seconds within which a command has to end after a signal
STEPS = {"train_flowmap": 60, "distill": 30, "finetune": 60}


class Command(NamedTuple):
    """A long command: its arguments, what it starts from, and what is compared at its end."""

    arguments: tuple[str, ...]
    needs: tuple[str, ...]  # directories of the recipe's runs
    result: Callable[[Path], Any]
    processes: tuple[int, ...]


def data_of(home: Path) -> dict[str, str]:
    """Hashes of a data set's files."""
    files = [*home.glob("data/*.tar"), *home.glob("data/*.json"), *home.glob("data/*.npy")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def training_of(stage: str) -> Callable[[Path], Any]:
    """Tensors of the newest checkpoint, and the metrics without what the clock decides."""

    def result(home: Path) -> Any:
        path = newest(home / stage / "checkpoints")
        assert path is not None
        state = load(path)
        moments = {
            f"{role} {number} {name}": value
            for role, optimizer in state.optimizers.items()
            for number, one in optimizer["state"].items()
            for name, value in one.items()
        }
        weights = {f"{part} {name}": v for part, named in state.tensors.items() for name, v in named.items()}
        rows = map(json.loads, (home / stage / "metrics.jsonl").read_text().splitlines())
        kept = [{k: v for k, v in row.items() if k not in ("seconds", "memory")} for row in rows]
        return state.step, {name: value.tolist() for name, value in (weights | moments).items()}, kept

    return result


def scores_of(home: Path) -> Any:
    """Digest and scores of every video."""
    found = {}
    for file in home.glob("evaluate/*/scores.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            found[file.parent.name, row["prompt"], row["seed"]] = row["digest"], row["score"]
    return found


COMMANDS = {
    "synthesize": Command(("synthesize",), (), data_of, (1, 2)),
    "train-flowmap": Command(("train-flowmap",), ("data",), training_of("train-flowmap"), (1, 2)),
    "distill": Command(("distill",), ("data", "train-flowmap"), training_of("distill"), (1, 2)),
    "finetune": Command(("finetune", "--data", "clips"), ("train-flowmap",), training_of("finetune"), (1, 2)),
    "evaluate": Command(("evaluate",), ("train-flowmap",), scores_of, (1, 2)),
}


@dataclass
class Case:
    """A command with a number of processes, in a directory of runs of its own."""

    name: str
    processes: int
    runs: Path
    seconds: float = 0.0  # of an undisturbed run

    @property
    def home(self) -> Path:
        """Results of the recipe."""
        return self.runs / "test"

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

    def finish(self) -> float:
        """Run the command to its end; gives its seconds."""
        began = time.monotonic()
        code = wait_for(self.start())
        assert code == 0, f"{self.name} ended with {code}: {self.log()}"
        return time.monotonic() - began

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


def disturb(case: Case, number: signal.Signals, draw: random.Random) -> str:
    """Start the command, end it at a random moment; how it ended, in words."""
    process = case.start()
    time.sleep(draw.uniform(0, case.seconds))
    workers = psutil.Process(process).children(recursive=True) if case.processes > 1 else []
    one = number == signal.SIGKILL and workers and draw.random() < 0.5
    try:
        if number != signal.SIGKILL:
            os.kill(process, number)
        elif one:
            os.kill(draw.choice(workers).pid, number)
        else:
            os.killpg(process, number)
    except ProcessLookupError:
        pass
    code = wait_for(process)
    if number == signal.SIGKILL:
        end_group(process)
    words = case.log()
    assert "Traceback" not in words, f"{case.name}, {number.name}: {words}"
    if code == 0:
        return "finished"
    if number == signal.SIGKILL:
        assert code == (1 if one else -number), f"{case.name} ended with {code}: {words}"
        return "one killed" if one else "killed"
    if code == -number:  # Python had not come as far as the command
        assert case.processes > 1, f"{case.name} was ended by {number.name}: {words}"
        return "before its start"
    assert code == 130, f"{case.name} ended with {code} on {number.name}: {words}"
    return "saved" if "the state is saved" in words else "interrupted"


def prepare(place: Path, lora: bool) -> None:
    """Write the recipe, a teacher, and six clips."""
    recipe = make_recipe(
        make_wan_folder(place / "wan"),
        "",
        model={"height": 64, "width": 64, "frames": 33, "lora": LORA if lora else None},
        data={"path": None},
        synthesize={"count": 24, "batch_size": 2, "shard_size": 4, "steps": 4},
        evaluate={"prompts": 4, "nfe": (1, 2), "teacher": False, "batch_size": 1},
        **{stage: {"steps": steps} for stage, steps in STEPS.items()},
    )
    (place / "test.yaml").write_text(dump(recipe))
    (place / "clips").mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 255, (33, 64, 64, 3), dtype=np.uint8)
        write_mp4(place / "clips" / f"{index}.mp4", noise, 16)
        (place / "clips" / f"{index}.txt").write_text(f"noise {index}")


def undisturbed(place: Path) -> dict[tuple[str, int], tuple[Case, Any]]:
    """Run every command once, with each number of processes; its case to disturb, and the right result."""
    found = {}
    for name, command in COMMANDS.items():
        for processes in command.processes:
            case = Case(name, processes, place / f"{name}-{processes}-right")
            copy_needs(place, case)
            seconds = case.finish()
            again = Case(name, processes, place / f"{name}-{processes}", seconds)
            copy_needs(place, again)
            found[name, processes] = again, command.result(case.home)
            print(f"{name}, {processes} processes: {seconds:.1f} s undisturbed", flush=True)
    return found


def copy_needs(place: Path, case: Case) -> None:
    """Give a case what its command starts from, as the undisturbed commands left it."""
    shutil.rmtree(case.runs, ignore_errors=True)
    case.home.mkdir(parents=True)
    for need in COMMANDS[case.name].needs:
        source = "synthesize" if need == "data" else need
        shutil.copytree(place / f"{source}-1-right" / "test" / need, case.home / need)


def main() -> None:
    """Run, end, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    torch.set_num_threads(1)
    draw, counts = random.Random(given.seed), Counter[tuple[str, int, str, str]]()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.chdir(place)
        prepare(place, given.lora)
        cases = undisturbed(place)
        order = [key for key in cases for _ in range(3 if key[1] == 1 else 1)]
        for number in range(given.rounds):
            case, right = cases[order[number % len(order)]]
            sent = SIGNALS[number % len(SIGNALS)]
            how = disturb(case, sent, draw)
            counts[case.name, case.processes, sent.name, how] += 1
            print(f"{number + 1}: {case.name}, {case.processes} processes, {sent.name}: {how}", flush=True)
            if how == "finished":
                assert COMMANDS[case.name].result(case.home) == right, f"{case.name} differs"
                copy_needs(place, case)
        for case, right in cases.values():
            case.finish()
            assert COMMANDS[case.name].result(case.home) == right, f"{case.name} differs"
    table: Counter[tuple[str, str]] = Counter()
    for (name, processes, sent_name, how), count in sorted(counts.items()):
        print(f"{name}, {processes} processes, {sent_name}: {how} {count}")
        table[sent_name, how] += count
    print(f"{given.rounds} rounds, all equal to the bit: {dict(table)}")


if __name__ == "__main__":
    main()
