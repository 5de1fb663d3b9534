"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs import dcp
from anyflow_cli.runs.checkpoint import (
    CHECKPOINT_FORMAT,
    AlarmState,
    CheckpointState,
    LoopState,
    begin,
    complete,
    discard_after,
    load,
    newest,
    save,
    trained_names,
    trained_weights,
)
from tests.fuzz.mutations import Payload
from tests.train.small import sharded_checkpoint

LOOP = LoopState({"loss": (1.5, 2)}, 2, AlarmState(0.5, None, {"static": 3}, {"static": 1}), 1)


def state(step: int) -> CheckpointState:
    weight = torch.full((2, 3), float(step))
    optimizer = {"state": {0: {"step": torch.tensor(1.0), "exp_avg": weight}}, "param_groups": [{"lr": 0.1}]}
    return CheckpointState(
        step, {"student": {"a.b": weight}, "ema": {"a.b": 2 * weight}}, {"student": optimizer}, LOOP
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    back = load(save(tmp_path, state(7), keep=2))
    assert back.step == 7
    assert back.loop == LOOP
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


FOREIGN = (
    "step-000030-backup",
    "step-best",
    "step-0000030",
    "step-30",
    "step-000030.old",
    ".step-best.partial",
)


def test_folders_of_other_names_are_neither_read_nor_removed(tmp_path: Path) -> None:
    whole = save(tmp_path, state(1), keep=9)
    for name in FOREIGN:
        shutil.copytree(whole, tmp_path / name)
    assert complete(tmp_path) == [whole]
    for step in (2, 3, 4):
        save(tmp_path, state(step), keep=1)
    discard_after(tmp_path / "step-000003")
    assert names(tmp_path) == sorted(FOREIGN)
    assert all(names(tmp_path / name) == names(tmp_path / "step-best") for name in FOREIGN)
    assert (tmp_path / "step-best" / "COMPLETE").exists()


def test_files_of_the_user_outlive_the_checkpoint_they_are_in(tmp_path: Path) -> None:
    first = save(tmp_path, state(1), keep=1)
    (first / "notes.txt").write_text("best so far")
    (first / "samples").mkdir()
    save(tmp_path, state(2), keep=1)
    save(tmp_path, state(3), keep=1)
    assert names(first) == ["notes.txt", "samples"]
    assert complete(tmp_path) == [tmp_path / "step-000003"]


def test_a_link_to_a_checkpoint_elsewhere_is_read_and_its_files_are_kept(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "elsewhere", state(1), keep=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step-000001").symlink_to(elsewhere)
    assert newest(tmp_path / "run") == tmp_path / "run" / "step-000001"
    for step in (2, 3):
        save(tmp_path / "run", state(step), keep=1)
    assert load(elsewhere).step == 1


def test_what_version_0_1_half_removed_is_cleared(tmp_path: Path) -> None:
    left = save(tmp_path, state(2), keep=9)
    (left / "COMPLETE").unlink()
    (left / "ema.safetensors").unlink()
    save(tmp_path, state(2), keep=9)
    assert load(left).step == 2


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "first byte": lambda content: bytes([content[0] ^ 0x5A]) + content[1:],
    "text": lambda content: b"not what it was",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["student.safetensors", "optimiser-student.pt", "state.json"])
def test_damage_is_named_with_one_code(tmp_path: Path, file: str, damage: str) -> None:
    path = save(tmp_path, state(1), keep=1)
    (path / file).write_bytes(DAMAGE[damage]((path / file).read_bytes()))
    with pytest.raises(UsageError, match=rf"{path}.* is (damaged|not valid JSON)") as error:
        load(path)
    assert "continues from the previous one" in (error.value.hint or "")


@pytest.mark.parametrize("read", [trained_weights, trained_names])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_average_is_named_with_the_same_code(
    tmp_path: Path, read: Callable[[Path], object], damage: str
) -> None:
    path = save(tmp_path, state(1), keep=1)
    average = path / "ema.safetensors"
    average.write_bytes(DAMAGE[damage](average.read_bytes()))
    with pytest.raises(UsageError, match="is damaged"):
        read(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, state(1), keep=1)
    (path / "optimiser-student.pt").unlink()
    with pytest.raises(UsageError, match=r"optimiser-student\.pt"):
        load(path)


def test_a_file_without_permission_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, state(1), keep=1)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path / "ema.safetensors"))

    monkeypatch.setattr("anyflow_cli.runs.checkpoint.load_file", refuse)
    for read in (load, trained_weights):
        with pytest.raises(PermissionError, match=r"ema\.safetensors"):
            read(path)


WRONG: list[tuple[tuple[str, ...], Any]] = [
    (("format",), "1"), (("format",), None), (("step",), -0.5), (("step",), "7"), (("tensors",), "student"),
    (("tensors",), [3]), (("tensors",), ["../../other"]), (("tensors",), ["absent"]), (("optimisers",), {}),
    (("optimisers",), ["/etc/passwd"]), (("optimiser_settings",), []), (("extra",), None),
    (("extra", "sums"), [1]), (("extra", "sums"), {"loss": 3}), (("extra", "sums"), {"loss": [1, 2, 3]}),
    (("extra", "steps"), "many"), (("extra", "alarms"), {"norm": "high"}), (("extra", "rollbacks"), [1]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "value"), WRONG)
def test_a_state_with_a_wrong_field_is_refused(tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    path = save(tmp_path, state(1), keep=1)
    content = json.loads((path / "state.json").read_text())
    parent = content
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        load(path)
    assert str(path) in error.value.message


@pytest.mark.parametrize("key", ["format", "step", "tensors", "optimisers", "extra"])
def test_a_state_without_a_field_names_it(tmp_path: Path, key: str) -> None:
    path = save(tmp_path, state(1), keep=1)
    content = json.loads((path / "state.json").read_text())
    del content[key]
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=rf"state\.json is damaged: {key}: Field required"):
        load(path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    """Whatever else its state holds."""
    path = save(tmp_path, state(1), keep=1)
    (path / "state.json").write_text(json.dumps({"format": CHECKPOINT_FORMAT + 1, "tensors": {"all": 1}}))
    with pytest.raises(UsageError, match="newer anyflow"):
        load(path)


def test_metadata_of_shards_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = sharded_checkpoint(tmp_path)
    assert load(path).tensors["ema"].keys() == set(trained_names(path))
    (path / "shards" / ".metadata").write_bytes(pickle.dumps(Payload()))
    for read in (load, trained_names, trained_weights):
        with pytest.raises(UsageError, match=r"names builtins\.exec, which is not executed"):
            read(path)
    assert not (tmp_path / "pickle-was-executed").exists()


class Attribute:
    """Pickled as an attribute of something, as Python 3.11.0 to 3.11.3 pickle members of enums."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_metadata_may_name_members_of_enums_and_no_other_attribute() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    def read(owner: Any, name: str) -> Any:
        return dcp._MetadataUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()

    member = next(iter(_MEM_FORMAT_ENCODING))
    assert read(_MEM_FORMAT_ENCODING, member.name) is member
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr, which is not executed"):
        read(Metadata, "__init__")
    with pytest.raises(KeyError):
        read(_MEM_FORMAT_ENCODING, "__class__")


@pytest.mark.parametrize("name", ["student.safetensors", "ema.safetensors", "optimiser-student.pt"])
def test_a_pipe_in_place_of_a_file_is_not_read(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, state(1), keep=1)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UsageError, match=f"{name} is not a regular file"):
        load(path)
    if name.startswith("ema"):
        for read in (trained_names, trained_weights):
            with pytest.raises(UsageError, match="is not a regular file"):
                read(path)


@pytest.mark.parametrize(
    ("damage", "words"), [("absent", "missing"), ("cut", "damaged"), ("pipe", "regular")]
)
def test_damaged_shards_are_named(tmp_path: Path, damage: str, words: str) -> None:
    path = sharded_checkpoint(tmp_path)
    shard = path / "shards" / "__0_0.distcp"
    content = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(content[:1000])
    elif damage == "pipe":
        os.mkfifo(shard)
    with pytest.raises(UsageError, match=words) as error:
        load(path)
    assert "\n" not in error.value.message


def test_shards_outside_of_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    path = sharded_checkpoint(tmp_path)
    shutil.move(path / "shards" / "__0_0.distcp", tmp_path / "x.distcp")
    file = path / "shards" / ".metadata"
    stated = pickle.loads(file.read_bytes())
    for info in stated.storage_data.values():
        info.relative_path = "../../../x.distcp"
    file.write_bytes(pickle.dumps(stated))
    with pytest.raises(UsageError, match="not a file inside that directory"):
        load(path)
