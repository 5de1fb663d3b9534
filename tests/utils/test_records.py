"""JSON files with the wrong content: each error names the file, the field and what was expected."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.utils import records
from anyflow_cli.utils.records import read_record


@dataclass(frozen=True)
class Point:
    name: str
    at: tuple[float, float]


def test_a_record_is_read_with_its_types(tmp_path: Path) -> None:
    path = tmp_path / "point.json"
    path.write_text('{"name": "a", "at": [1, 2.5]}')
    assert read_record(path, Point) == Point("a", (1.0, 2.5))


def test_keys_of_earlier_versions_are_translated_at_every_level(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text('[{"name": "a", "placed at": [1, 2]}]')
    assert read_record(path, list[Point], renamed={"placed at": "at"}) == [Point("a", (1.0, 2.0))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "point.json is damaged: Invalid JSON"),
        (b"[]", "is damaged: Input should be an object"),
        (b"\xff\xfe", "is damaged: Invalid JSON"),
        (b'{"name": 3, "at": [1, 2]}', "is damaged: name: Input should be a valid string"),
        (b'{"name": "a", "at": [1, "2"]}', "is damaged: at.1: Input should be a valid number"),
        (b'{"name": "a"}', "is damaged: at: Field required"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"name": "a", "at": [1, ' + b"9" * 5000 + b"]}", "is damaged"),
    ],
)
@pytest.mark.parametrize("renamed", [None, {"old": "new"}])
def test_a_wrong_file_is_one_error(
    tmp_path: Path, content: bytes, message: str, renamed: dict[str, str] | None
) -> None:
    path = tmp_path / "point.json"
    path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_record(path, Point, "Fetch it again.", renamed)
    assert str(path) in str(raised.value)
    assert raised.value.hint == "Fetch it again."
    if renamed is None:
        assert message in str(raised.value)


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UsageError, match="not a regular file"):
        read_record(tmp_path / "pipe.json", Point)
    with pytest.raises(UsageError, match="is missing"):
        read_record(tmp_path / "none.json", Point)
    (tmp_path / "large.json").write_text("{}    ")
    monkeypatch.setattr(records, "MAX_BYTES", 3)
    with pytest.raises(UsageError, match="is larger than"):
        read_record(tmp_path / "large.json", Point)
