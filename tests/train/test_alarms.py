"""Alarms: each value, how long it must be bad, and what then happens to the run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import complete
from anyflow_cli.train.alarms import AlarmError, Alarms
from tests.train.small import RandomData, backbone, same_run, trainer

GOOD = {"embedding_norm": 5.0, "fake": 1.0, "sample_power": 1.0, "data_power": 1.0, "sample_motion": 0.5,
        "data_motion": 0.5}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("embedding_norm", "embedding_norm", 11.0),
        ("saturation", "sample_power", 2.5),
        ("static", "sample_motion", 0.1),
        ("fake_divergence", "fake", 50.0),
    ],
)
def test_each_alarm_needs_several_bad_rows_in_a_row(name: str, key: str, value: float) -> None:
    alarms = Alarms(schema.AlarmsSection(action="stop", patience=2))
    for step, row in enumerate((GOOD, GOOD | {key: value}, GOOD, GOOD | {key: value}), start=1):
        alarms.look(step, row)
    with pytest.raises(AlarmError, match=f"Since step 4.*alarms.{name}") as error:
        alarms.look(5, GOOD | {key: value * (20 if name == "fake_divergence" else 1)})
    assert error.value.step == 4


def test_a_warning_is_logged_once_and_survives_a_restart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        alarms = Alarms(schema.AlarmsSection(patience=2))
        alarms.look(1, GOOD)
        alarms.look(2, GOOD | {"sample_power": 3.0})
        again = Alarms(schema.AlarmsSection(patience=2))
        again.resume(alarms.state())
        for step in (3, 4, 5):
            again.look(step, GOOD | {"sample_power": 3.0})
    assert [record.message for record in caplog.records] == [
        "Since step 2: the power of the student's samples is 3 times that of the data "
        "(alarms.saturation is 2)."
    ]


def test_the_embedding_norm_is_that_of_both_times() -> None:
    roles = backbone("flow-map")
    before = float(roles.student.embedding_norm())
    with torch.no_grad():
        for part in ("time", "delta"):
            embedder: Any = getattr(roles.student.condition_embedder, f"{part}_embedder")
            for parameter in embedder.linear_2.parameters():
                parameter.mul_(3)
    assert float(roles.student.embedding_norm()) == pytest.approx(3 * before, rel=1e-5)


class PoisonedOnce(RandomData):
    """Not a number in the fifth batch that is given, whatever its step."""

    given = 0

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Any:
        for batch in super().stream(start, part, workers):
            self.given += 1
            if self.given == 5:
                batch.latents[0, 0, 0, 0, 0] = float("nan")
            yield batch


def test_a_run_rolls_back_to_the_last_good_checkpoint_with_new_random_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alarms = schema.AlarmsSection(action="roll-back")
    run = trainer(tmp_path / "a", source=PoisonedOnce(4), alarms=alarms)
    run.run()
    assert (run.step, run.rollbacks) == (6, 1)
    assert "Rolled back to" in caplog.text
    assert [path.name for path in complete(tmp_path / "a/checkpoints")] == ["step-000004", "step-000006"]
    trainer(tmp_path / "plain").run()
    with pytest.raises(AssertionError):
        same_run(tmp_path / "a", tmp_path / "plain")


def test_the_number_of_roll_backs_is_limited(tmp_path: Path) -> None:
    class Poisoned(RandomData):
        def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Any:
            for step, batch in enumerate(super().stream(start, part, workers), start=start + 1):
                yield batch if step < 4 else replace(batch, latents=batch.latents * float("nan"))

    alarms = schema.AlarmsSection(action="roll-back", rollbacks=2)
    run = trainer(tmp_path, source=Poisoned(4), alarms=alarms)
    with pytest.raises(AlarmError, match="not finite at step 4"):
        run.run()
    assert run.rollbacks == 2
    assert all(parameter.isfinite().all() for parameter in run.backbone.parameters())


def test_stage_two_reports_what_the_alarms_compare(tmp_path: Path) -> None:
    with pytest.raises(AlarmError, match=r"alarms\.saturation"):
        trainer(
            tmp_path, "on-policy", alarms=schema.AlarmsSection(action="stop", saturation=1e-3, patience=1)
        ).run()
