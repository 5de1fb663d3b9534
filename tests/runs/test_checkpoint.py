"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from anyflow_cli.errors import AnyflowError
from anyflow_cli.runs.checkpoint import CheckpointState, begin, load, newest, save
from anyflow_cli.runs.open import CHECKPOINT_FORMAT


def state(step: int) -> CheckpointState:
    weight = torch.full((2, 3), float(step))
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": weight}}, "param_groups": [{"lr": 0.1}]}
    return CheckpointState(
        step, {"student": {"a.b": weight}, "ema": {"a.b": 2 * weight}}, {"student": optimizer}, {"n": 1}
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    back = load(save(tmp_path, state(7), keep=2))
    assert back.step == 7
    assert back.extra == {"n": 1}
    assert torch.equal(back.tensors["student"]["a.b"], torch.full((2, 3), 7.0))
    assert torch.equal(back.tensors["ema"]["a.b"], torch.full((2, 3), 14.0))
    assert torch.equal(back.optimizers["student"]["state"][0]["exp_avg"], torch.full((2, 3), 7.0))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100):
        save(tmp_path, state(step), keep=2)
    assert names(tmp_path) == ["step-000010", "step-000100"]
    assert newest(tmp_path) == tmp_path / "step-000100"


def test_nothing_to_continue_from(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent") is None


def test_what_a_kill_left_is_passed_over_and_then_cleared(tmp_path: Path) -> None:
    save(tmp_path, state(1), keep=2)
    (tmp_path / ".step-000002.partial").mkdir()
    (tmp_path / "step-000003").mkdir()  # its marker gone: being removed when the kill came
    assert newest(tmp_path) == tmp_path / "step-000001"
    save(tmp_path, state(2), keep=2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_for(name: str) -> Callable[[Path], None]:
    """A folder in which there is no room for the file of this name."""

    def begin_full(partial: Path) -> None:
        begin(partial)
        (partial / name).symlink_to("/dev/full")

    return begin_full


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's always full device")
@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("save_file", full_for_safetensors),
        ("begin", full_for("optimiser-student.pt")),
        ("begin", full_for("state.json")),
        ("flush", full_disk),
    ],
)
def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: Callable[..., None]
) -> None:
    save(tmp_path, state(1), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(f"anyflow_cli.runs.checkpoint.{where}", what)
        with pytest.raises(AnyflowError, match="step 2 could not be written") as error:
            save(tmp_path, state(2), keep=1)
    assert error.value.message.endswith(f"{tmp_path}: No space left on device.")
    assert "start the same command again" in (error.value.hint or "")
    assert error.value.exit_code == 1
    assert names(tmp_path) == ["step-000001"]
    assert load(tmp_path / "step-000001").step == 1
    save(tmp_path, state(2), keep=1)
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize("file", ["student.safetensors", "optimiser-student.pt", "state.json"])
def test_damage_is_named(tmp_path: Path, file: str) -> None:
    path = save(tmp_path, state(1), keep=1)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AnyflowError, match="is damaged"):
        load(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, state(1), keep=1)
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(record | {"format": CHECKPOINT_FORMAT + 1}))
    with pytest.raises(AnyflowError, match="newer anyflow"):
        load(path)
