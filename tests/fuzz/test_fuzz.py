"""Mutants of everything that anyflow reads are used or refused in a sentence, in time, and nothing is lost.

The first cases of every target run here, the rest of ``CASES`` in the slow tier; ``scripts/fuzz.py`` plays
all and prints the counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.records import read_record
from tests.fuzz.harness import Target, play
from tests.fuzz.mutations import CANARY
from tests.fuzz.targets import TARGETS, cases_of

CASES, FAST = 20_000, 300
ALL, FIRST = cases_of(TARGETS, CASES), cases_of(TARGETS, FAST)


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fast", "slow"])
@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_mutants_are_used_or_refused(target: Target, slow: bool, tmp_path: Path) -> None:
    first = max(FIRST[target.name], 1)
    tally = play(target, tmp_path, range(first, ALL[target.name]) if slow else range(first))
    assert tally.faults == []
    if slow:
        assert sum(tally.counts.values()) == ALL[target.name] - first


# --- that it can fail


def make(thing: Path) -> None:
    (thing / "x.json").write_text(json.dumps({"count": 3, "names": ["a", "b"]}))
    (thing / "notes.txt").write_text("mine")


def read(thing: Path) -> dict[str, object]:
    found: dict[str, object] = read_record(thing / "x.json", dict[str, object])
    return found


def trusting(thing: Path) -> None:
    """Believe the type of a field."""
    found = read(thing)
    if "count" in found:
        found["count"] += 1  # type: ignore[operator]  # the planted fault


def patient(thing: Path) -> None:
    """Wait for a field."""
    if "count" not in read(thing):
        time.sleep(60)


def greedy(thing: Path) -> None:
    """Allocate far too much for some values."""
    if read(thing).get("count") != 3:
        bytearray(1 << 40)


def careless(thing: Path) -> None:
    """Remove another file than the one that is read."""
    try:
        read(thing)
    except UsageError:
        (thing / "notes.txt").unlink()


def escaping(thing: Path) -> None:
    """Write beside the directory."""
    if read(thing).get("names") != ["a", "b"]:
        (thing.parent / CANARY).write_text("overwritten")


def far(thing: Path) -> None:
    """Write outside of what is compared."""
    if read(thing).get("names") != ["a", "b"]:
        (thing.parents[3] / "far").touch()


@pytest.mark.parametrize(
    ("use", "fault"),
    [
        (trusting, "traceback"), (patient, "hang"), (greedy, "memory"), (careless, "lost"),
        (escaping, "lost"), (far, "touched"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(
    use: Callable[[Path], object], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "hang":
        monkeypatch.setattr("tests.fuzz.harness.SECONDS", 0.1)
    tally = play(Target("planted", make, use, "*.json"), tmp_path / "arena", range(150))
    assert tally.counts[fault] > 0
    assert tally.counts.keys() <= {"accepted", "refused 2", fault, "touched"}
    assert tally.faults[0].startswith(fault)


def test_equal_seeds_give_equal_mutants(tmp_path: Path) -> None:
    seen: list[bytes] = []

    def remember(thing: Path) -> None:
        file = thing / "x.json"
        seen.append(file.read_bytes() if file.is_file() and not file.is_symlink() else b"")

    for name in ("a", "b"):
        play(Target("seeds", make, remember, "*.json"), tmp_path / name, range(50))
    play(Target("seeds", make, remember, "*.json"), tmp_path / "c", range(50), seed=1)
    assert seen[:51] == seen[51:102]
    assert seen[:51] != seen[102:]
