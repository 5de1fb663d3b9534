"""metrics.jsonl: means between rows, and the same file after an interruption."""

from __future__ import annotations

import io
import json
import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.train.metrics import Metrics


@pytest.fixture(autouse=True)
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard orders its files by the second of their start; here each file has one of its own."""
    clock = SimpleNamespace(time=map(float, count(1)).__next__)
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.time", clock)


def metrics(directory: Path, every: int = 2) -> Metrics:
    return Metrics(directory, every, writes=True, tensorboard=False)


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory")} for line in lines]


def test_a_row_has_the_means_since_the_previous_row(tmp_path: Path) -> None:
    run = metrics(tmp_path)
    for step, loss in enumerate([1.0, 3.0, 10.0, 20.0, 7.0], start=1):
        run.add(step, {"loss": loss})
    assert rows(tmp_path) == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 15.0}]


def test_a_value_missing_in_some_steps_is_averaged_over_the_others(tmp_path: Path) -> None:
    run = metrics(tmp_path)
    run.add(1, {"loss": 1.0, "boundary": 4.0})
    run.add(2, {"loss": 1.0})
    assert rows(tmp_path) == [{"step": 2, "loss": 1.0, "boundary": 4.0}]


def test_resumed_rows_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    first = metrics(tmp_path)
    for step in (1, 2, 3):
        first.add(step, {"loss": 0.1 * step})
    sums, steps = dict(first.sums), first.steps  # as the checkpoint of step 3 keeps them
    for step in (4, 5, 6):
        first.add(step, {"loss": -1.0})  # lost with the kill
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    second = metrics(tmp_path)
    second.resume(3, sums, steps)
    for step in (4, 5, 6):
        second.add(step, {"loss": 0.1 * step})
    undisturbed = metrics(tmp_path / "other")
    (tmp_path / "other").mkdir()
    for step in range(1, 7):
        undisturbed.add(step, {"loss": 0.1 * step})
    assert rows(tmp_path) == rows(tmp_path / "other")


@pytest.mark.parametrize("line", ["{}", '{"step": "2"}', '{"step": null}', "[]", "3", "loss 3", '{"step": 2'])
def test_a_damaged_row_names_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": NaN}}\n{line}\n{{"step": 3}}\n')
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2, is "):
        metrics(tmp_path).resume(3, {}, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_fresh_start_drops_rows_of_a_start_without_checkpoint(tmp_path: Path) -> None:
    first = metrics(tmp_path)
    first.add(1, {"loss": 1.0})
    first.add(2, {"loss": 1.0})
    metrics(tmp_path).restart()
    assert rows(tmp_path) == []


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    quiet = Metrics(tmp_path, 1, writes=False, tensorboard=True)
    quiet.restart()
    quiet.add(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_rows(tmp_path: Path) -> None:
    begin(Metrics(tmp_path, 1, writes=True, tensorboard=True))
    assert shown(tmp_path) == [(1, 1.0)]  # already, with nothing closed


def test_tensorboard_hides_the_rows_that_a_resumed_run_writes_again(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 1, writes=True, tensorboard=True)
    first.restart()
    for step in (1, 2):
        first.add(step, {"loss": 1.0})
    sums, steps = dict(first.sums), first.steps
    first.add(3, {"loss": 1.0})
    again = Metrics(tmp_path, 1, writes=True, tensorboard=True)
    again.resume(2, sums, steps)
    again.add(3, {"loss": 7.0})
    assert shown(tmp_path) == [(1, 1.0), (2, 1.0), (3, 7.0)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard"])
def test_a_full_disk_names_the_file_without_a_traceback_of_tensorboards_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = Metrics(tmp_path, 1, writes=True, tensorboard=True)
    begin(run)
    fill_disk(monkeypatch, tmp_path / name)
    with pytest.raises(AnyflowError, match=rf"Cannot write .*{name}: No space left on device\.") as error:
        run.add(2, {"loss": 1.0})
    assert "finished files are intact" in (error.value.hint or "")
    run.close()
    assert "Traceback" not in capsys.readouterr().err
    again = Metrics(tmp_path, 1, writes=True, tensorboard=True)
    with pytest.raises(AnyflowError, match=r"Cannot write .*: No space left on device\."):
        begin(again)
    again.close()


def begin(run: Metrics) -> None:
    run.restart()
    run.add(1, {"loss": 1.0})


def fill_disk(patch: pytest.MonkeyPatch, start: Path) -> None:
    """Make appending to files with this path prefix fail as on a full disk."""
    opened = io.open

    def full(path: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        name = os.fsdecode(path) if isinstance(path, (str, bytes, Path)) else ""
        is_full = set(mode) & set("aw") and name.startswith(str(start))
        return opened("/dev/full" if is_full else path, mode, *rest, **options)

    patch.setattr("io.open", full)


def shown(directory: Path) -> list[tuple[int, float]]:
    """Step and loss as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in board.Scalars("loss")]
