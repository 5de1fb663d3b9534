"""Making a cell: train it by one command of anyflow, measure it, and leave a small record of both.

Everything of a cell is in a directory of its own; training continues where it stopped, and a measured point
is not measured again. The record is written last, and a cell with a record is done.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from reproduction.processes import run
from reproduction.rows import DATA, REFERENCE, Cell, Kind, Overrides, Row, Scale

import anyflow_cli
from anyflow_cli.data.shards import MANIFEST
from anyflow_cli.errors import UsageError
from anyflow_cli.plan.estimate import target_of, training_setup
from anyflow_cli.plan.hardware import this_machine
from anyflow_cli.plan.networks import Setup
from anyflow_cli.plan.steps import step_cost
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.paths import MODEL, RunPaths
from anyflow_cli.utils.files import write_json
from anyflow_cli.utils.run_lock import RunLock

ROOT = Path(__file__).parents[2]
RECIPES: dict[Kind, str] = {
    "bidirectional": "scripts/reproduction/paper.yaml",
    "causal": "scripts/reproduction/paper-causal.yaml",
}
LONG_SHARE = 8  # long videos have one in so many prompts
TRAINING = "training.json"  # what it took
FAILED = "failed.txt"  # the traceback, beside what a cell has so far
PLANNED = "planned.json"
Outcome = Literal["done", "busy", "waits", "failed"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Workshop:
    """Where cells are made, and at what scale.

    Attributes:
        scale: Prompts, steps and data.
        runs: Directory of data sets and training runs.
        records: Directory of the records.
        planned: FLOPs of a training step by what is planned, as far as they are known.
    """

    scale: Scale
    runs: Path
    records: Path
    planned: dict[str, float] = field(default_factory=dict)

    def record(self, cell: Cell) -> Path:
        """The record of a cell."""
        return self.records / f"{cell.name}.json"

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell has its record."""
        return self.record(cell).is_file()

    def left(self, wanted: Sequence[Cell]) -> list[Cell]:
        """What is still to be made: cells without a record, behind the starts whose model they lack."""
        undone = [cell for cell in wanted if not self.is_done(cell)]
        return list(dict.fromkeys(one for cell in undone for one in [*self._missing_starts(cell), cell]))

    def make(self, cell: Cell, *, measured: bool = True) -> Outcome:
        """Make a cell, unless its start is not trained, another process is making it, or it failed.

        A cell that has its record, and one that is not to be ``measured``, is only trained.
        """
        home = self.runs / cell.name
        if (home / FAILED).exists():
            return "failed"
        if self._missing_starts(cell):
            return "waits"
        with ExitStack() as stack:
            try:
                stack.enter_context(RunLock(home))
                if needs_data := self._needs_data(cell):
                    stack.enter_context(RunLock(self._data_home(cell)))
            except UsageError:
                return "busy"
            if self._is_made(cell, measured):
                return "done"
            try:
                if needs_data:
                    self._make_data(cell)
                log.info("== %s", cell.name)
                trained = self._train(cell, home)
                if measured and not self.is_done(cell):
                    self._measure(cell, home, trained)
            except Exception:
                log.exception("%s failed", cell.name)
                (home / FAILED).write_text(traceback.format_exc())
                return "failed"
        return "done"

    def prepare(self, cells: Sequence[Cell]) -> None:
        """Forget earlier failures, and plan what training costs, once for all processes."""
        known = self.runs / PLANNED
        if known.is_file():
            self.planned.update(json.loads(known.read_text()))
        for cell in self.left(cells):
            (self.runs / cell.name / FAILED).unlink(missing_ok=True)
            self.steps_of(cell)
        write_json(known, self.planned)

    def _measure(self, cell: Cell, home: Path, trained: dict[str, Any]) -> None:
        """Measure a trained cell, and leave its record."""
        from reproduction.long_videos import measure_long
        from reproduction.measure import measure

        recipe, row, points, videos = self.recipe_of(cell), cell.of, [], []
        for sampled in row.sampled:
            for steps in sampled.steps:
                part = home / f"{sampled.method}-{steps}-{row.world}.json"
                if not part.is_file():
                    point = measure(
                        self.address_of(cell), recipe, sampled.method, steps, self.scale.prompts, row.world
                    )
                    write_json(part, point.as_json() | {"device": device()})
                points.append(json.loads(part.read_text()))
        for long in row.long:
            part = home / f"long-{long.length}-{long.steps}{'-switched' * long.switches}.json"
            if not part.is_file():
                prompts = max(1, self.scale.prompts // LONG_SHARE)
                long_videos = measure_long(self.address_of(cell), recipe, long, prompts)
                write_json(part, long_videos | {"device": device()})
            videos.append(json.loads(part.read_text()))
        devices = [part.pop("device") for part in (trained, *points, *videos) if "device" in part]
        content = {
            "row": cell.row, "kind": cell.kind, "seed": cell.seed, "start": row.start,
            "changes": dict(row.changes), **trained, "prompts": self.scale.prompts, "points": points,
            **({"long": videos} if videos else {}), "made": provenance(devices),
        }  # fmt: skip
        write_json(self.record(cell), content)
        shutil.rmtree(self.directory_of(cell) / "checkpoints", ignore_errors=True)

    def _train(self, cell: Cell, home: Path) -> dict[str, Any]:
        """Train a cell; return the command, the steps and what they cost."""
        row, part = cell.of, home / TRAINING
        if row.command is None:
            return {"command": None, "steps": 0, "step_tflop": 0.0, "processor_seconds": 0.0}
        if not self._is_trained(cell):
            words = ["anyflow", row.command, "--recipe", RECIPES[cell.kind], "--runs", str(home)]
            if row.start is not None and cell.start is not None:
                words += ["--model", str(self.model_of(cell.start))]
            words += [f"--set={key}={json.dumps(value)}" for key, value in self.overrides(cell).items()]
            seconds = run(words)
            values = {
                "command": " ".join(words), "steps": self.steps_of(cell),
                "step_tflop": round(self.step_flops(cell) / 1e12, 6),
                "processor_seconds": round(seconds, 1),
            }  # fmt: skip
            write_json(part, values | {"metrics": self._metrics(cell), "device": device()})
        found: dict[str, Any] = json.loads(part.read_text())
        return found

    def _metrics(self, cell: Cell) -> list[dict[str, float]]:
        """Every tenth part of a run's metrics, without times and memory."""
        rows = [json.loads(line) for line in (self.directory_of(cell) / "metrics.jsonl").open()]
        kept = rows[:: max(len(rows) // 10, 1)]
        left_out = ("seconds", "memory")
        return [{k: round(float(v), 5) for k, v in row.items() if k not in left_out} for row in kept]

    def _is_made(self, cell: Cell, measured: bool) -> bool:
        trained = cell.of.command is None or self._is_trained(cell)
        return trained and (self.is_done(cell) or not measured)

    def _is_trained(self, cell: Cell) -> bool:
        return (self.runs / cell.name / TRAINING).is_file() and self.model_of(cell).is_dir()

    def _missing_starts(self, cell: Cell) -> list[Cell]:
        """The starts, the first one first, that have to be trained before the cell can be made."""
        start = cell.start
        if start is None or self._is_trained(start) or (cell.of.command and self._is_trained(cell)):
            return []
        return [*self._missing_starts(start), start]

    def _needs_data(self, cell: Cell) -> bool:
        """Whether the cell trains on a data set that is not there yet."""
        trains = cell.of.command not in (None, "finetune") and not self._is_trained(cell)
        return trains and not (self.data_of(cell) / MANIFEST).is_file()

    def _make_data(self, cell: Cell) -> None:
        """Make the data set of a cell, which another process may have done before this one had its lock."""
        if self._needs_data(cell):
            home, keys = self._data_home(cell), {**DATA[cell.of.data], **self.scale.data}
            words = ["anyflow", "synthesize", "--recipe", RECIPES["bidirectional"], "--runs", str(home)]
            run([*words, *(f"--set={key}={json.dumps(value)}" for key, value in keys.items())])

    # --- places

    def paths_of(self, cell: Cell) -> RunPaths:
        """Directories of a cell's runs."""
        return RunPaths(self.runs / cell.name, Path(RECIPES[cell.kind]).stem)

    def data_of(self, cell: Cell) -> Path:
        """The data set that a cell trains on."""
        return RunPaths(self._data_home(cell), Path(RECIPES["bidirectional"]).stem).data

    def _data_home(self, cell: Cell) -> Path:
        return self.runs / "data" / cell.of.data

    def directory_of(self, cell: Cell) -> Path:
        """Directory of a cell's training run."""
        paths, recipe = self.paths_of(cell), self.recipe_of(cell)
        return {
            "train-flowmap": paths.stage_1(recipe.train_flowmap.objective),
            "distill": paths.stage_2(recipe.distill.simulation),
            "finetune": paths.finetune,
        }[cell.of.command or "train-flowmap"]

    def model_of(self, cell: Cell) -> Path:
        """The model that a cell trains."""
        return self.directory_of(cell) / MODEL

    def address_of(self, cell: Cell) -> str:
        """The model that is measured."""
        trained = cell if cell.of.command is not None or cell.start is None else cell.start
        return cell.of.model or str(self.model_of(trained))

    # --- recipes

    def overrides(self, cell: Cell) -> Overrides:
        """Recipe keys of a cell, its number of steps included."""
        keys = overrides_of(cell, self.scale)
        data = self.data_of(cell)
        steps = {f"{section_of(cell)}.steps": self.steps_of(cell)} if cell.of.command else {}
        return {**keys, **({} if cell.of.command == "finetune" else {"data.path": str(data)}), **steps}

    def recipe_of(self, cell: Cell) -> Recipe:
        """The recipe of a cell."""
        return recipe_with(cell.kind, overrides_of(cell, self.scale))

    def steps_of(self, cell: Cell) -> int:
        """As many steps as cost what the reference row of the command costs, or the row's share of it."""
        command = cell.of.command
        if command is None:
            return 0
        ratio = self.step_flops(replace(cell, row=REFERENCE[command])) / self.step_flops(cell)
        return max(1, int(self.scale.steps[command][cell.kind] * ratio * cell.of.share + 0.5))

    def step_flops(self, cell: Cell) -> float:
        """FLOPs of an average training step of a cell's row, as planned; the same for all seeds."""
        cell = replace(cell, seed=0)
        recipe = self.recipe_of(cell).model_dump_json()
        key = sha256(f"{cell.kind} {cell.of.command} {recipe}".encode()).hexdigest()[:16]
        if key not in self.planned:
            self.planned[key] = step_cost(setup_of(cell, self.scale, cell.of)).flops
        return self.planned[key]


def section_of(cell: Cell) -> str:
    """Section of the recipe of a cell's command."""
    return (cell.of.command or "train-flowmap").replace("-", "_")


def overrides_of(cell: Cell, scale: Scale, row: Row | None = None) -> Overrides:
    """Recipe keys of a cell, or of another row in its place, without steps and data."""
    of = row or cell.of
    section = (of.command or "train-flowmap").replace("-", "_")
    return {**scale.common, **of.changes, f"{section}.seed": cell.seed}


def recipe_with(kind: Kind, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of a kind with these keys."""
    texts = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return load_recipe(str(ROOT / RECIPES[kind]), texts)


def setup_of(cell: Cell, scale: Scale, row: Row) -> Setup:
    """What one process of a row's command runs, of the kind and seed of a cell."""
    return _setup_of(cell.kind, row.command or "train-flowmap", json.dumps(overrides_of(cell, scale, row)))


@lru_cache(maxsize=256)
def _setup_of(kind: Kind, command: str, overrides: str) -> Setup:
    recipe = recipe_with(kind, json.loads(overrides))
    if command == "finetune":  # a step of stage 1
        fields = {name: getattr(recipe.finetune, name) for name in ("global_batch", "flow_map", "seed")}
        recipe = recipe.model_copy(update={"train_flowmap": recipe.train_flowmap.model_copy(update=fields)})
        command = "train-flowmap"
    tunes = command == "train-flowmap" and recipe.train_flowmap.objective == "flow-matching"
    return training_setup(target_of(recipe, this_machine()), "tune" if tunes else command)


def provenance(devices: Sequence[str]) -> dict[str, Any]:
    """By what a record was made, and on which devices, one after the other."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": date.today().isoformat(), "commit": git.stdout.strip(), "anyflow": anyflow_cli.__version__,
        "torch": torch.__version__, "device": "; ".join(dict.fromkeys(devices)),
    }  # fmt: skip


def device() -> str:
    """The device of this process, and its threads."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{name}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads"
