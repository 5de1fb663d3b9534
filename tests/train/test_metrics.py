"""metrics.jsonl: means between rows, and the same file after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import AnyflowError
from anyflow_cli.train.metrics import Metrics


def metrics(directory: Path, every: int = 2) -> Metrics:
    return Metrics(directory, every, writes=True, tensorboard=False)


def rows(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory")} for line in lines]


def test_a_row_holds_the_means_since_the_row_before(tmp_path: Path) -> None:
    run = metrics(tmp_path)
    for step, loss in enumerate([1.0, 3.0, 10.0, 20.0, 7.0], start=1):
        run.add(step, {"loss": loss})
    assert rows(tmp_path) == [{"step": 2, "loss": 2.0}, {"step": 4, "loss": 15.0}]


def test_a_value_that_some_steps_lack_is_the_mean_of_the_others(tmp_path: Path) -> None:
    run = metrics(tmp_path)
    run.add(1, {"loss": 1.0, "boundary": 4.0})
    run.add(2, {"loss": 1.0})
    assert rows(tmp_path) == [{"step": 2, "loss": 1.0, "boundary": 4.0}]


def test_resumed_rows_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    first = metrics(tmp_path)
    for step in (1, 2, 3):
        first.add(step, {"loss": 0.1 * step})
    saved = json.loads(json.dumps(first.state()))  # as the checkpoint of step 3 keeps it
    for step in (4, 5, 6):
        first.add(step, {"loss": -1.0})  # lost with the kill
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    second = metrics(tmp_path)
    second.resume(3, saved)
    for step in (4, 5, 6):
        second.add(step, {"loss": 0.1 * step})
    undisturbed = metrics(tmp_path / "other")
    (tmp_path / "other").mkdir()
    for step in range(1, 7):
        undisturbed.add(step, {"loss": 0.1 * step})
    assert rows(tmp_path) == rows(tmp_path / "other")


def test_a_start_from_nothing_drops_rows_of_a_start_that_saved_nothing(tmp_path: Path) -> None:
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
    run = Metrics(tmp_path, 1, writes=True, tensorboard=True)
    run.restart()
    run.add(1, {"loss": 1.0})
    run.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = metrics(tmp_path / "absent", every=1)
    with pytest.raises(AnyflowError, match=r"metrics\.jsonl could not be written"):
        run.add(1, {"loss": 1.0})
