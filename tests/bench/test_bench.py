"""``anyflow bench`` on a small model: what it measures, what it counts, and what a plan makes of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from anyflow_cli.bench import machine
from anyflow_cli.bench.machine import MachineSpeed, interleaved
from anyflow_cli.bench.record import ITERATIONS, SAMPLING_STEP, Bench, Row, load_bench, save_bench
from anyflow_cli.bench.report import bench_table
from anyflow_cli.bench.run import BENCH_PARTS, run_bench
from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.plan.estimate import plan_stage, target_of
from anyflow_cli.plan.hardware import Hardware, this_machine
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.paths import RunPaths
from tests.tiny_pipeline import make_wan_folder

SPEED = MachineSpeed("a test", 1, flops=1e9, bandwidth=1e6)
BENCH = Bench("small", SPEED, "fp32", {"torch": "2"}, dict.fromkeys(ITERATIONS, 2), 9, {
    SAMPLING_STEP: Row(2.0, 1.0, 6e9, 3.0), "stage 1 iteration": Row(4.0, 1.0, 4e9), "load": Row(0.5),
})  # fmt: skip
CAPTURE = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("bench") / "wan")


def small(folder: Path, *assignments: str) -> Recipe:
    sizes = ("height=32", "width=32", "frames=9", "max_text_tokens=8", "lora={rank: 2, alpha: 2}")
    return load_recipe("tiny", [f"model.{size}" for size in (f"teacher={folder}", *sizes)] + [*assignments])


@pytest.fixture(scope="module", params=["bidirectional", "causal"])
def measured(request: pytest.FixtureRequest, folder: Path) -> tuple[Recipe, Bench]:
    causal = "model.causal={partition: [1, 1, 1], full_chunks: 2, compressed_patch: [4, 4]}"
    recipe = small(folder, *[causal] * (request.param == "causal"))
    found = replace(SPEED, flops=1e12, bandwidth=1e12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anyflow_cli.bench.run.machine_speed", lambda device, precision: found)
        return recipe, run_bench(recipe, batch=2, repeats=1)


def test_everything_is_measured(measured: tuple[Recipe, Bench]) -> None:
    recipe, bench = measured
    streamed = ["first frame"] if recipe.model.causal else []
    assert list(bench.rows) == [
        "load", SAMPLING_STEP, "latents in 4 steps", "decoding", "whole video", *streamed, *ITERATIONS
    ]  # fmt: skip
    steps = bench.rows[SAMPLING_STEP], bench.rows["latents in 4 steps"]
    assert all(row.diffusers is not None for row in steps)
    assert steps[1].seconds > 0
    assert all(row.floor for name, row in bench.rows.items() if name not in ("whole video", "first frame"))


def test_work_is_counted_as_a_plan_counts_it(measured: tuple[Recipe, Bench]) -> None:
    recipe, bench = measured
    alone = {"global_batch": 2, "micro_batch": None, "preview_every": 0}
    stages = {name: getattr(recipe, name).model_copy(update=alone) for name in ("train_flowmap", "distill")}
    target = target_of(recipe.model_copy(update=stages), replace(this_machine(), count=1))
    video = plan_stage(target, "sample")
    steps, four = bench.rows[SAMPLING_STEP].flops, bench.rows["latents in 4 steps"].flops
    assert steps
    assert four
    cached = four - 4 * steps  # of finished chunks
    assert steps * max(recipe.sample.nfe) + cached == pytest.approx(video.flops)
    for name, stage in ITERATIONS.items():
        flops, planned = bench.rows[name].flops, plan_stage(target, stage)
        assert flops == pytest.approx(planned.flops, rel=0.7)  # of one random step
        assert bench.rows[name].planned == planned.peak.total


def test_the_floor_is_the_longer_of_arithmetic_and_memory() -> None:
    assert SPEED.floor(2e9) == 2.0
    assert SPEED.floor(2e9, 3e6) == 3.0


def test_calls_are_timed_in_turn_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    lengths = {"a": iter([100.0, 1.0, 5.0, 2.0]), "b": iter([100.0, 3.0, 3.0, 3.0])}

    def call(name: str) -> None:
        order.append(name)
        clock[0] += next(lengths[name])

    calls = {name: lambda name=name: call(name) for name in lengths}
    assert interleaved(calls, 3, torch.device("cpu")) == {"a": 2.0, "b": 3.0}
    assert order == ["a", "b"] * 4


def test_the_machine_has_speeds() -> None:
    found = machine.machine_speed(torch.device("cpu"), "fp32")
    assert found.threads == torch.get_num_threads()
    assert min(found.flops, found.bandwidth) > 1e6


def test_rates_are_of_the_stages_whose_work_was_measured() -> None:
    assert BENCH.rates == {
        **dict.fromkeys(("synthesize", "sample", "stream"), 3e9),
        **dict.fromkeys(("tune", "train-flowmap"), 1e9),
    }


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_bench(tmp_path / "new" / "bench.json", BENCH)
    assert load_bench(tmp_path / "new" / "bench.json") == BENCH


@pytest.mark.parametrize("content", ["", "{}", "[]", json.dumps({**asdict(BENCH), "rows": {}})])
def test_other_files_are_neither_read_nor_replaced(content: str, tmp_path: Path, capsys: CAPTURE) -> None:
    file = tmp_path / "bench.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"bench\.json"):
        save_bench(file, BENCH)
    assert main(["bench", "--out", str(file)]) == 2
    assert "Choose another file with --out." in capsys.readouterr().err
    assert main(["plan", "--calibrate", str(file)]) == 2
    assert file.read_text() == content


@pytest.fixture
def recipe_file(folder: Path, tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(
        f"name: mine\nmodel: {{teacher: {folder}, height: 32, width: 32, frames: 9, max_text_tokens: 8}}\n"
    )
    return file


def test_a_plan_takes_measured_speeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPTURE
) -> None:
    save_bench(tmp_path / "bench.json", BENCH)
    planned: list[Hardware] = []

    def make_plan(recipe: Recipe, hardware: Hardware, paths: RunPaths) -> None:
        planned.append(hardware)
        raise UsageError("enough", "for a test")

    monkeypatch.setattr("anyflow_cli.plan.estimate.make_plan", make_plan)
    assert main(["plan", "--peak", "1", "--calibrate", str(tmp_path / "bench.json")]) == 2
    assert planned[0].seconds(6e9, "sample") == 2.0
    assert planned[0].seconds(4e11, "distill") == 1.0  # which was not measured: --peak and --mfu


def test_the_command_shows_a_table_and_writes_the_file(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CAPTURE
) -> None:
    monkeypatch.setattr("anyflow_cli.bench.run.machine_speed", lambda device, precision: SPEED)
    options = ["--only", "load", "--repeats", "1", "--runs", str(tmp_path / "runs")]
    assert main(["bench", "-r", str(recipe_file), *options]) == 0
    shown = capsys.readouterr()
    assert "mine on a test, 1 threads" in shown.out
    assert "Measuring: load." in shown.err
    assert list(load_bench(tmp_path / "runs" / "mine" / "bench.json").rows) == ["load"]


def test_the_table_states_speeds_and_ratios() -> None:
    console = Console(width=110, file=StringIO(), record=True)
    console.print(bench_table(BENCH))
    line = next(line for line in console.export_text().splitlines() if line.startswith(SAMPLING_STEP))
    assert line.split()[2:] == ["2", "50%", "0.003", "3", "1.50x"]


def test_all_parts_have_a_choice_of_the_option(capsys: CAPTURE) -> None:
    assert main(["bench", "--only", "nothing"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in BENCH_PARTS)
