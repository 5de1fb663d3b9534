"""Trackers get every row, under the same name after a restart; one that is absent is named at once."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anyflow_cli.errors import UsageError
from tests.train.small import trainer


class Board(ModuleType):
    """trackio, as far as accelerate uses it."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.started: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    def init(self, **given: Any) -> Board:
        self.started.append(given)
        return self

    def log(self, values: dict[str, Any], **_: Any) -> None:
        self.rows.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_gets_every_row_and_recognizes_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board()
    monkeypatch.setitem(sys.modules, "trackio", board)
    for steps in (2, 4):
        trainer(tmp_path, steps=steps, log_every=1, trackers=("trackio",)).run()
    assert [row["step"] for row in board.rows] == [1, 2, 3, 4]
    assert board.started[0] == board.started[1]
    assert (board.started[0]["project"], board.finished) == ("anyflow", 2)


def test_a_missing_tracker_is_named_before_the_first_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, trackers=("wandb",))
    with pytest.raises(UsageError, match="wandb is not installed"):
        run.run()
    assert run.step == 0
