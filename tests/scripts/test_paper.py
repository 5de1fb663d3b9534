"""``scripts/paper.py``: its table of cells is sound, packed scores survive, and a rehearsal makes records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.scripts.script import SCRIPTS, load


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    """``scripts/paper.py`` as a module; what it imports is in ``sys.modules`` as ``reproduction``."""
    return load("paper.py")


@pytest.fixture(scope="module")
def rows(paper: ModuleType) -> ModuleType:
    return sys.modules["reproduction.rows"]


def test_every_cell_has_a_valid_recipe_and_starts_from_a_cell_before_it(
    paper: ModuleType, rows: ModuleType
) -> None:
    recipes = sys.modules["reproduction.cells"]
    before: set[Any] = set()
    for cell in rows.cells():
        assert cell.start is None or cell.start in before
        if cell.seed == 0:
            recipes.recipe_with(cell.kind, recipes.overrides_of(cell, rows.PAPER))
        before.add(cell)
    assert len(before) == len(rows.cells())


def test_rows_of_a_command_cost_the_same(paper: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    cells = sys.modules["reproduction.cells"]
    workshop = cells.Workshop(rows.PAPER, tmp_path / "runs", tmp_path / "records")
    names = ("flow-map-simulation", "joint-alone", "flow-map-consistency-simulation")
    costs = [
        workshop.steps_of(cell) * cells.step_flops(cell, rows.PAPER)
        for cell in (rows.Cell(name, "bidirectional", 1) for name in names)
    ]
    assert max(costs) < 1.01 * min(costs)


def test_packed_scores_keep_four_digits_and_unknown_ones() -> None:
    load("paper.py")
    from importlib import import_module

    measure = import_module("reproduction.measure")
    values = np.array([[0.12345, np.nan, 1.0], [0.0, 3.0, 0.99999]])
    found = measure.unpack(measure.pack(values.tolist()))
    np.testing.assert_allclose(found, values, atol=0.5 / measure.STEP + 1e-9)


@pytest.mark.slow
def test_a_rehearsal_leaves_a_record_of_each_cell_and_then_does_nothing(tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPTS / "paper.py"), "run", "--quick", "--runs", str(tmp_path),
        "--only", "bidirectional/*-0", "causal/flow-map-0", "causal/flow-map-simulation-0",
    ]  # fmt: skip
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "anyflow" in first.stderr
    assert "anyflow" not in again.stderr
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("records/*/*.json"))]
    assert {record["row"] for record in records} >= {"flow-map-simulation", "joint-alone", "teacher"}
    for record in records:
        assert record["points"]
        assert all(0 < point["total"] < 100 for point in record["points"])
