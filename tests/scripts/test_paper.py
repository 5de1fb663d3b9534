"""``scripts/paper.py``: its table of cells is sound, packed scores survive, and a rehearsal makes records."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.run_lock import RunLock
from tests.flow.gaussian import Gaussian
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
        workshop.steps_of(cell) * workshop.step_flops(cell)
        for cell in (rows.Cell(name, "bidirectional", 1) for name in names)
    ]
    assert max(costs) < 1.01 * min(costs)
    cheap = rows.Cell("simulation-alone-0.6", "bidirectional", 0)
    assert workshop.steps_of(cheap) * workshop.step_flops(cheap) == pytest.approx(0.6 * costs[0], rel=0.01)


def test_packed_scores_keep_four_digits_and_unknown_ones() -> None:
    load("paper.py")
    from importlib import import_module

    measure = import_module("reproduction.measure")
    values = np.array([[0.12345, np.nan, 1.0], [0.0, 3.0, 0.99999]])
    found = measure.unpack(measure.pack(values.tolist()))
    np.testing.assert_allclose(found, values, atol=0.5 / measure.STEP + 1e-9)


def test_a_cell_waits_for_its_start_and_for_another_process(
    paper: ModuleType, rows: ModuleType, tmp_path: Path
) -> None:
    workshop = sys.modules["reproduction.cells"].Workshop(rows.QUICK, tmp_path / "runs", tmp_path / "records")
    first, second = (rows.Cell(name, "bidirectional", 0) for name in ("flow-map", "joint-alone"))
    assert workshop.make(second) == "waits"
    with RunLock(tmp_path / "runs" / first.name):
        assert workshop.make(first) == "busy"
    for cell in (first, second):
        leave_record(workshop, cell)
    paper.make_all(workshop, [first, second])  # all done


def test_a_start_whose_model_is_not_there_is_trained_and_not_measured(
    paper: ModuleType, rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records are committed and models are not, so what is left must not need the models of before."""
    cells = sys.modules["reproduction.cells"]
    workshop = cells.Workshop(rows.QUICK, tmp_path / "runs", tmp_path / "records")
    first, second, third = (
        rows.Cell(name, "bidirectional", 0)
        for name in ("flow-map", "flow-map-simulation", "finetune-flow-map")
    )
    trained, measured = [], []

    def run(words: list[str]) -> float:
        cell = next(one for one in (first, second, third) if str(workshop.runs / one.name) in words)
        trained.append(cell.row)
        workshop.model_of(cell).mkdir(parents=True)
        return 1.0

    def measure(workshop: Any, cell: Any, home: Path, trained: Any) -> None:
        measured.append(cell.row)
        leave_record(workshop, cell)

    monkeypatch.setattr(cells, "run", run)
    monkeypatch.setattr(cells.Workshop, "_measure", measure)
    monkeypatch.setattr(cells.Workshop, "_metrics", lambda workshop, cell: [])
    monkeypatch.setattr(cells.Workshop, "_make_data", lambda workshop, cell: None)
    leave_record(workshop, first)
    assert workshop.left([first, third]) == [first, second, third]
    paper.make_all(workshop, [first, third])
    assert trained == ["flow-map", "flow-map-simulation", "finetune-flow-map"]
    assert measured == ["finetune-flow-map"]
    assert workshop.left([first, third]) == []


def test_a_record_names_every_device_that_its_cell_was_made_on(
    paper: ModuleType, rows: ModuleType, tmp_path: Path
) -> None:
    workshop = sys.modules["reproduction.cells"].Workshop(rows.QUICK, tmp_path / "runs", tmp_path / "records")
    cell = rows.Cell("flow-map", "bidirectional", 0)
    workshop.model_of(cell).mkdir(parents=True)
    parts = {"training": "a GPU", "flow-map-4-shapes": "a GPU", "flow-map-32-shapes": "a CPU"}
    for name, device in parts.items():
        (tmp_path / "runs" / cell.name / f"{name}.json").write_text(json.dumps({"device": device}))
    assert workshop.make(cell) == "done"
    content = json.loads(workshop.record(cell).read_text())
    assert content["made"]["device"] == "a GPU; a CPU"
    assert content["points"] == [{}, {}]
    assert "device" not in content


def leave_record(workshop: Any, cell: Any) -> None:
    """Leave an empty record of a cell."""
    workshop.record(cell).parent.mkdir(parents=True, exist_ok=True)
    workshop.record(cell).write_text("{}")


@pytest.mark.parametrize("error", [UsageError("No."), subprocess.CalledProcessError(1, "anyflow")])
def test_a_cell_whose_data_cannot_be_made_has_failed(
    paper: ModuleType, rows: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is not retried, and the others go on."""

    def run(words: list[str]) -> float:
        raise error

    cells = sys.modules["reproduction.cells"]
    monkeypatch.setattr(cells, "run", run)
    workshop = cells.Workshop(rows.QUICK, tmp_path / "runs", tmp_path / "records")
    cell = rows.Cell("flow-map", "bidirectional", 0)
    assert [workshop.make(cell), workshop.make(cell)] == ["failed", "failed"]
    assert (tmp_path / "runs" / cell.name / cells.FAILED).is_file()
    with pytest.raises(SystemExit, match="Failed: bidirectional/flow-map-0"):
        paper.make_all(workshop, [cell])


def test_a_rehearsal_has_a_row_of_each_table_and_what_it_starts_from(
    paper: ModuleType, rows: ModuleType
) -> None:
    rehearsed = {name for names in rows.REHEARSED.values() for name in names}
    assert all(rehearsed & set(table) for table in rows.TABLES.values())
    for kind, names in rows.REHEARSED.items():
        assert {rows.ROWS[name].start for name in names} - {None} <= set(names)
        assert all(kind in rows.ROWS[name].kinds for name in names)


@pytest.mark.slow
def test_a_rehearsal_leaves_a_record_of_each_cell_and_then_does_nothing(
    paper: ModuleType, rows: ModuleType, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPTS / "paper.py"), "--quick", "--runs", str(tmp_path)]
    first = subprocess.run([*command, "--jobs", "2", "run"], capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    again = subprocess.run([*command, "run"], capture_output=True, text=True, check=True)
    assert "anyflow" in first.stderr
    assert "anyflow" not in again.stderr
    records = {}
    for path in tmp_path.glob("records/*/*.json"):
        content = json.loads(path.read_text())
        records[content["kind"], content["row"]] = content
    assert set(records) == {(kind, name) for kind, names in rows.REHEARSED.items() for name in names}
    for content in records.values():
        assert content["points"]
        assert all(0 <= point["total"] <= 100 for point in content["points"])
    long = records["causal", "long-rollouts"]["long"]
    assert [len(entry["windows"]) for entry in long] == [sampled.length for sampled in rows.LONG]
    subprocess.run([*command, "report"], check=True)
    page = (tmp_path / "records.md").read_text()
    assert all(f"## {title}" in page for title in rows.TABLES)


@pytest.mark.slow
def test_the_workers_end_with_the_process_that_started_them() -> None:
    lines = [
        f"import sys, time; sys.path[:0] = [{str(SCRIPTS)!r}]",
        "from reproduction.processes import share",
        "print('ready', flush=True)",
        "share(2, time.sleep, 600)",
    ]
    with subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while (
            len(workers := psutil.Process(parent.pid).children(recursive=True)) < 4
        ):  # and server and tracker
            assert time.monotonic() < deadline
            time.sleep(0.2)
        parent.terminate()
        assert parent.wait(20) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []


# The report


def record(rows: ModuleType, row: str, seed: int, level: float) -> dict[str, Any]:
    """A record whose videos score ``level`` in every dimension, with noise that all rows share."""
    from importlib import import_module

    measure = import_module("reproduction.measure")
    suite = measure.ShapesSuite()
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (24, len(suite.dimensions)))
    points = [
        {"method": sampled.method, "steps": steps, "total": 100 * level, "pieces": measure.pack([[0.5] * 9]),
         "scores": measure.pack((level + noise).tolist())}
        for sampled in rows.ROWS[row].sampled for steps in sampled.steps
    ]  # fmt: skip
    return {"row": row, "kind": "bidirectional", "seed": seed, "steps": 10, "processor_seconds": 20.0,
            "prompts": 24, "points": points, "made": {"device": "a CPU"},
            "metrics": [{"embedding_norm": 1.0}, {"embedding_norm": 1.5}]}  # fmt: skip


def test_the_report_compares_rows_seed_by_seed(paper: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    levels = {"flow-map-simulation": 0.8, "joint-alone": 0.805, "consistency-simulation": 0.7}
    for row, level in levels.items():
        for seed in (0, 1) if row == "joint-alone" else (0, 1, 2):
            path = tmp_path / "bidirectional" / f"{row}-{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(record(rows, row, seed, level + 0.001 * seed)))
    report = sys.modules["reproduction.report"]
    found = report.lines_of(report.read_records(tmp_path), rows.TABLES["Table 2"], "bidirectional")
    table = report.table_of(found, "bidirectional")
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert "82.96" in table  # the paper's consistency simulation at 4 steps
    assert "**-10.0 (-10.0 to -10.0)**" in lines[rows.ROWS["consistency-simulation"].title]
    assert "+0.5 (+0.5 to +0.5)" in lines[rows.ROWS["joint-alone"].title]
    assert lines[rows.ROWS["flow-map-simulation"].title].count("to") == 1  # not against itself
    drawn = report.differences_of(found)
    assert len(drawn) == 3  # two samplers of the consistency model, and the joint loss alone
    alone = drawn[f"{rows.ROWS['joint-alone'].title} (2)"]
    assert {step: round(one.value, 2) for step, one in alone.items()} == {4: 0.5, 32: 0.5}
    by_kind = {"bidirectional": found, "causal": []}
    shown = report.at_a_glance({"Table 2": by_kind}, tmp_path)
    assert re.findall(r"paper/(.+\.png)", shown) == ["differences-bidirectional.png"]
    assert (tmp_path / "differences-bidirectional.png").stat().st_size > 5_000


def test_each_figure_is_drawn_from_the_records_it_needs(
    paper: ModuleType, rows: ModuleType, tmp_path: Path
) -> None:
    figures = sys.modules["reproduction.paper_figures"]
    powers = [{"sample_power": 1.2, "data_power": 1.0}] * 3
    records: dict[tuple[str, str], list[dict[str, Any]]] = {}
    assert [draw(records, tmp_path) for title, draw in figures.FIGURES.items() if title != "Fig. 10"] == [
        ""
    ] * 3
    for name, row in rows.ROWS.items():
        if row.sampled:
            own = record(rows, name, 0, 0.7)
            own["metrics"] = own["metrics"] if row.command == "train-flowmap" else powers
            records[name, "bidirectional"] = records[name, "causal"] = [own]
    lines = [draw(records, tmp_path) for draw in figures.FIGURES.values()]
    lines.append(figures.exposure_bias(records, tmp_path))
    shown = [name for line in lines for name in re.findall(r"paper/([a-z0-9-]+\.png)", line)]
    assert shown == [
        "figure-1.png", "figures-7-8.png", "figure-10-weights.png", "figure-10.png", "figure-11.png",
        "along-the-video.png",
    ]  # fmt: skip
    assert all((tmp_path / name).stat().st_size > 5_000 for name in shown)
    one = figures.by_kind(records, {"flow map": ("flow-map", "flow-map-scaling")}, seed=0)
    assert list(one["causal"]["flow map"].x) == [1, 2, 4, 8, 16, 32, 50]


def test_seeds_widen_the_interval(paper: ModuleType, rows: ModuleType, tmp_path: Path) -> None:
    report = sys.modules["reproduction.report"]
    alike, apart = (
        report.scored([record(rows, "flow-map", s, 0.8 + gap * s) for s in (0, 1, 2)], "flow-map", 4)
        for gap in (0.0, 0.03)
    )
    assert apart.bounds.high - apart.bounds.low > 1.5 * (alike.bounds.high - alike.bounds.low)


# Long videos


def test_a_long_video_is_cut_into_windows_that_share_a_frame(paper: ModuleType) -> None:
    long_videos = sys.modules["reproduction.long_videos"]
    video = np.arange(13)[:, None, None, None]
    windows = [window[:, 0, 0, 0].tolist() for window in long_videos.windows_of(video, 5)]
    assert windows == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]


def long_record(rows: ModuleType, row: str, seed: int, drift: float) -> dict[str, Any]:
    """A record whose long videos lose ``drift`` of every score per window."""
    from importlib import import_module

    measure = import_module("reproduction.measure")
    suite, noise = measure.ShapesSuite(), np.random.default_rng(seed).uniform(-0.05, 0.05, (24, 1))
    entries = []
    for sampled in rows.LONG:
        levels = [0.8 - drift * window for window in range(sampled.length)]
        scores = [level + np.repeat(noise, len(suite.dimensions), axis=1) for level in levels]
        stills = np.repeat(levels, 8)[None] + noise
        stills = np.concatenate((stills[:, :1], stills), axis=1)
        entries.append({
            "length": sampled.length, "switches": sampled.switches, "steps": sampled.steps,
            "totals": [100 * level for level in levels],
            "windows": [measure.pack(each.tolist()) for each in scores],
            "pieces": measure.pack(stills.tolist()),
        })  # fmt: skip
    return {"row": row, "kind": "causal", "seed": seed, "points": [], "long": entries}


def test_drift_along_long_videos_is_reported_with_its_interval(
    paper: ModuleType, rows: ModuleType, tmp_path: Path
) -> None:
    long_videos = sys.modules["reproduction.long_videos"]
    drifts = {"long-as-trained": 0.03, "long-rollouts": 0.0}
    records = {
        (row, "causal"): [long_record(rows, row, seed, drift) for seed in (0, 1)]
        for row, drift in drifts.items()
    }
    section = long_videos.long_section(records, tmp_path)
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 6
    assert "-9.0 (-9.0 to -9.0)" in lines[0]
    assert "-45.0 (" in lines[1]
    assert "another prompt half way" in lines[2]
    assert "+0.0 (+0.0 to +0.0)" in lines[3]
    assert lines[0].count("-9.0 (-9.0 to -9.0)") == 2  # of Total and of how the shape looks
    for name in ("long-videos.png", "long-videos-stills.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    entries = [record["long"][0] for record in records["long-as-trained", "causal"]]
    curve = long_videos.along([long_videos.by_chunk(entry["pieces"]) for entry in entries])
    assert len(curve.x) == 17  # 33 latent frames: 1, then 2 per chunk
    assert curve.y[0] - curve.y[-1] == pytest.approx(9, abs=0.1)
    assert all(low < y < high for low, y, high in zip(curve.low, curve.y, curve.high, strict=True))


# The exactness


def test_the_mixture_of_one_mode_has_the_closed_form(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactness = sys.modules["reproduction.exactness"]
    center = torch.tensor([[0.7, -0.3]])
    monkeypatch.setattr(exactness, "modes", lambda: center)
    monkeypatch.setattr(exactness, "MODES", 1)
    data = Gaussian(center.reshape(1, 1, 2, 1, 1), exactness.STD)
    z = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    t, r = torch.full((16,), 0.9), torch.full((16,), 0.2)
    shaped = z.reshape(-1, *exactness.SHAPE)
    torch.testing.assert_close(exactness.velocity(z, t), data(shaped, t, t).flatten(1))
    exact = data.flow(shaped, t, r).flatten(1)
    torch.testing.assert_close(exactness.exact_flow(z, 0.9, 0.2), exact, atol=1e-4, rtol=1e-4)


def test_errors_of_an_exact_flow_are_zero_and_of_a_wrong_one_are_not(
    paper: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    exactness = sys.modules["reproduction.exactness"]
    center = torch.tensor([[0.7, -0.3]])
    monkeypatch.setattr(exactness, "modes", lambda: center)
    data = Gaussian(center.reshape(1, 1, 2, 1, 1), exactness.STD)
    found = [value for row in exactness.errors(data, 64) for value in row if value is not None]
    assert len(found) == 36
    assert max(found) < 2e-3
    assert exactness.errors(Gaussian(data.mean, 0.5), 64)[-1][0] > 0.1
