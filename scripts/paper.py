"""The paper in miniature: train and measure its claims, each cell leaving a small record.

    python scripts/paper.py run                    everything that has no record yet; resumable
    python scripts/paper.py run --only 'causal/*'  some of it
    python scripts/paper.py list                   what there is, and what is still to do
    python scripts/paper.py exactness              flow maps of a Gaussian mixture, learned and exact
    python scripts/paper.py report                 docs/paper.md from the records
    python scripts/paper.py run --quick            one row of each table at a few steps, to test the code
    python scripts/paper.py run --jobs 16          by so many processes, which may share a GPU: start NVIDIA's
                                                   MPS first (nvidia-cuda-mps-control -d), or they take turns

Records go to docs/paper, data sets and models to runs/paper. A model that a cell starts from is trained
where it is not there, though its own record may be. Commands that are started side by side share the
work, too. ``scripts/reproduction/rows.py`` has all cells as one table.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for a caller that imports this file

from reproduction.cells import ROOT, Workshop
from reproduction.exactness import measure_exactness
from reproduction.processes import share
from reproduction.report import write_report
from reproduction.rows import PAPER, QUICK, REHEARSED, Cell, cells

EXACT_STEPS = 3000
POLL_SECONDS = 3  # while all that is left waits for what other processes make


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("command", choices=("run", "list", "exactness", "report"))
    made.add_argument(
        "--quick", action="store_true", help="a rehearsal in minutes: one row of each table, seed 0"
    )
    made.add_argument("--only", nargs="+", help="patterns of cells, KIND/ROW-SEED, the first wanted first")
    made.add_argument("--jobs", type=int, default=1, help="processes, as many as cores on a GPU")
    made.add_argument("--records", type=Path, help="directory of the records")
    made.add_argument("--runs", type=Path, help="directory of data sets and models")
    given = made.parse_args(arguments)
    name = "paper-quick" if given.quick else "paper"
    runs = given.runs or Path("runs") / name
    records = given.records or (runs / "records" if given.quick else ROOT / "docs" / "paper")
    workshop = Workshop(QUICK if given.quick else PAPER, runs, records)
    rehearsed = [f"{kind}/{row}-0" for kind, names in REHEARSED.items() for row in names]
    patterns = given.only or (rehearsed if given.quick else ["*"])
    matching = ([cell for cell in cells() if fnmatch(cell.name, pattern)] for pattern in patterns)
    wanted = list(dict.fromkeys(chain.from_iterable(matching)))
    if given.command == "run":
        workshop.prepare(wanted)
        share(given.jobs, make_all, workshop, wanted)
    elif given.command == "exactness":
        measure_exactness(records, EXACT_STEPS // (100 if given.quick else 1))
    elif given.command == "report":
        write_report(records, records.with_suffix(".md"))
    else:
        for cell in wanted:
            state = "done" if workshop.is_done(cell) else "to do"
            print(f"{cell.name:60}{workshop.steps_of(cell):>6} steps   {state}")


def make_all(workshop: Workshop, wanted: Sequence[Cell]) -> None:
    """Make the cells in order; those that other processes are making are waited for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    asked = set(wanted)
    while left := workshop.left(wanted):
        outcomes = {cell.name: workshop.make(cell, measured=cell in asked) for cell in left}
        found = set(outcomes.values())
        if found <= {"waits", "failed"}:
            failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
            raise SystemExit(f"Failed: {', '.join(failed)}")
        if "done" not in found:
            time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
