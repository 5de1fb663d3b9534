"""Atomic files and directories: complete or absent, and nothing of anyone else's is deleted."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import AnyflowError
from anyflow_cli.utils.files import atomic_directory, atomic_write, clear_leftovers

NOBODY = 2**22 + 1  # above the largest process number


def write(target: Path, files: Mapping[str, str]) -> None:
    with atomic_directory(target) as folder:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)


class FullDisk(dict[str, str]):
    """Files of which the last one finds no room."""

    def items(self) -> Any:
        yield from super().items()
        raise OSError(errno.ENOSPC, "No space left on device")


def tree(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()
    }


def test_a_directory_is_replaced_by_its_successor(tmp_path: Path) -> None:
    write(
        tmp_path / "model", {"config.json": "1", "vae/a-00001-of-00002.safetensors": "x", "lineage.json": ""}
    )
    write(tmp_path / "model", {"config.json": "2", "vae/a.safetensors": "y", "lineage.json": ""})
    assert tree(tmp_path) == {
        "model/config.json": "2", "model/vae/a.safetensors": "y", "model/lineage.json": ""
    }  # fmt: skip


@pytest.mark.parametrize("name", ["notes.txt", "vae/notes.txt", "samples/clip.mp4"])
def test_a_directory_with_files_of_the_user_is_kept_beside_its_successor(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for number in ("1", "2"):
        write(tmp_path / "model", {"config.json": number, "vae/a.safetensors": "x"})
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text(f"mine {number}")
    write(tmp_path / "model", {"config.json": "3", "vae/a.safetensors": "x"})
    assert tree(tmp_path / "model") == {"config.json": "3", "vae/a.safetensors": "x"}
    for number in ("1", "2"):
        assert (tmp_path / f"model.before-{number}" / name).read_text() == f"mine {number}"
        assert (tmp_path / f"model.before-{number}" / "config.json").read_text() == number
    assert f"is now {tmp_path}/model.before-2" in caplog.text


def test_a_file_in_the_place_of_a_directory_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    write(tmp_path / "model", {"config.json": "1"})
    assert (tmp_path / "model.before-1").read_text() == "mine"


def test_of_a_link_only_the_link_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {"config.json": "1"})
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "model", {"config.json": "2"})
    assert tree(tmp_path / "elsewhere") == {"config.json": "1"}
    assert tree(tmp_path / "model") == {"config.json": "2"}


def test_a_failure_leaves_the_older_directory_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "model", {"config.json": "1"})
    with pytest.raises(AnyflowError, match="No space left"):
        write(tmp_path / "model", FullDisk({"config.json": "2"}))
    assert tree(tmp_path) == {"model/config.json": "1"}


def test_what_killed_processes_left_is_cleared_and_a_living_one_keeps_its_own(tmp_path: Path) -> None:
    names = (
        f".model.{NOBODY}.partial",
        f".model.{os.getppid()}.partial",
        ".model.backup.partial",
        ".other.1.partial",
    )
    for name in names:
        (tmp_path / name).mkdir()
    write(tmp_path / "model", {"config.json": "1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "model"])


def test_a_kill_while_a_directory_is_replaced_loses_nothing(tmp_path: Path) -> None:
    write(tmp_path / f".model.{NOBODY}.replaced", {"config.json": "1"})
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "model"):
        raise RuntimeError
    assert tree(tmp_path) == {"model/config.json": "1"}


def test_leftovers_are_told_apart_from_files_of_the_user(tmp_path: Path) -> None:
    ours = (".00001.0.tmp.tar", ".00001.12.tmp.json", ".manifest.0.tmp.json", ".noending.3.tmp")
    theirs = (".00001.old.tmp.tar", ".notes.tmp.txt", ".00001.0.tmp.tar.bak", "00001.0.tmp.tar")
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path, "00001")
    assert {path.name for path in tmp_path.iterdir()} == {*theirs, *ours[2:]}
    clear_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)


def test_a_file_is_complete_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    with atomic_write(path) as temporary:
        temporary.write_text("1")
    with pytest.raises(FileNotFoundError), atomic_write(path) as temporary:
        (temporary / "below a file that is not there").write_text("2")
    assert tree(tmp_path) == {"new/file.json": "1"}
