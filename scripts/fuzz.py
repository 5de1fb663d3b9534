#!/usr/bin/env python
"""Mutate everything that anyflow reads, read it, and print the counts by outcome.

    python scripts/fuzz.py [--cases 20000] [--seed 0] [--target NAME] [--first 0] [--resume FILE]

Cases are spread over the targets by their shares. With ``--target``, all are of targets whose name begins so;
``--first`` is the number of the first case, to play a failure again. With ``--resume``, counts are kept in a
file, from which the next call continues, and a target has its share of all cases, so that calls add up.
Milliseconds are of the processor. Ends with exit code 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz.harness import FAULTS, play
from tests.fuzz.targets import TARGETS, cases_of


def main() -> int:
    """Play, count, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--resume", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[str, dict[str, int]] = {}
    if given.resume is not None and given.resume.exists():
        done = json.loads(given.resume.read_text())
    faults = 0
    targets = [target for target in TARGETS if target.name.startswith(given.target)]
    counts = cases_of(TARGETS if given.resume else targets, given.cases)
    for target in (target for target in targets if counts[target.name] and target.name not in done):
        began, cases = sum(os.times()[:4]), range(given.first, given.first + counts[target.name])
        with tempfile.TemporaryDirectory() as root:
            tally = play(target, Path(root), cases, given.seed)
        milliseconds = 1000 * (sum(os.times()[:4]) - began) / len(cases)
        print(
            f"{target.name}: {dict(sorted(tally.counts.items()))}, {milliseconds:.0f} ms each",
            flush=True,
        )
        for fault in tally.faults:
            print(f"  {fault}", flush=True)
        faults += len(tally.faults)
        done[target.name] = dict(tally.counts)
        if given.resume is not None:
            passed = {name: found for name, found in done.items() if not found.keys() & set(FAULTS)}
            given.resume.write_text(json.dumps(passed, indent=1))
    columns = sorted({outcome for found in done.values() for outcome in found})
    print("\n| what is read | cases |", " | ".join(columns), "|")
    print("| --- |", " | ".join("---" for _ in ("cases", *columns)), "|")
    total = Counter[str]()
    for name, found in done.items():
        print(f"| {name} | {sum(found.values())} |", " | ".join(str(found.get(c, 0)) for c in columns), "|")
        total.update(found)
    print(f"| all | {sum(total.values())} |", " | ".join(str(total[column]) for column in columns), "|")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
