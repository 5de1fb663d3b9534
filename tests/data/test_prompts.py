from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest

from anyflow_cli.data.prompts import MAX_LENGTH, WorldCaptions, check_text, read_prompts
from anyflow_cli.data.shapes_world import WORLDS
from anyflow_cli.errors import UsageError

PROMPTS = ["a red circle", 'a "large" square, moving', "ein Dreieck bewegt sich über Grün"]
FILES = {
    "plain.txt": "\n".join(PROMPTS),
    "blank lines and windows.TXT": "\ufeff\r\n" + "\r\n  \r\n".join(PROMPTS) + "\r\n\r\n",
    "table.csv": f'id,caption\n1,{PROMPTS[0]}\n2,"a ""large"" square, moving"\n3,{PROMPTS[2]}\n',
    "lines.jsonl": "\n".join(json.dumps({"text": p, "id": 0}) for p in PROMPTS) + "\n",
}
BAD = {
    "empty.txt": (b"", "contains no prompts"),
    "blank.txt": (b"\n  \n", "contains no prompts"),
    "picture.txt": (b"\x89PNG\r\n\0\0\0", "is binary"),
    "latin.txt": ("a\nb\nein Dreieck über".encode("latin-1"), "Line 3 of"),
    "long.txt": (b"short\n\n" + b"x" * 5000, "Line 3 of"),
    "bell.txt": (b"ring\x07", "control characters"),
    "words.doc": (b"a red circle", "unknown suffix '.doc'"),
    "columns.csv": (b"a,b\n1,2\n", "found: 'a', 'b'"),
    "hole.csv": (b'prompt\na\n""\n', "Line 3 of"),
    "short.csv": (b"id,prompt\n1,a\n2\n", "Line 3 of"),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt": \n', "Line 2 of"),
    "list.jsonl": (b"[1, 2]\n", "Line 1 of"),
    "number.jsonl": (b'{"prompt": 5}\n', "Line 1 of"),
    "utf-16.txt": ("a circle".encode("utf-16"), "is UTF-16, not UTF-8"),
    "unmarked.csv": ("prompt\na circle\n".encode("utf-16-le"), "is UTF-16, not UTF-8"),
    "cp1252.csv": ("prompt\na\nüber\n".encode("cp1252"), "is probably cp1252, not UTF-8"),
    "two.jsonl": (b'{"prompt": 5}\n{"prompt": "a"}\n{"prompt": ""}\n', "1 more lines of it are unusable too"),
    "surrogate.jsonl": (b'{"prompt": "\\ud800"}\n', "Line 1 of"),
    "deep.jsonl": (b"[" * 100_000, "Line 1 of"),
    "digits.jsonl": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "Line 1 of"),
    "columns.parquet": (b"PAR1" + bytes(64) + b"PAR1", "cannot be read as parquet"),
    "line break.csv": (b'"a\nb",c\n1,2\n', r"found: 'a\nb', 'c'"),
    "column.jsonl": (b'{"prompt": "a"}\n{"title": "a"}\n', "Line 2 of"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert read_prompts(tmp_path / name) == PROMPTS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": PROMPTS, "id": [1, 2, 3]}), tmp_path / "t.parquet")
    assert read_prompts(tmp_path / "t.parquet") == PROMPTS


def test_a_parquet_column_of_another_type_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    years = pyarrow.array([10**15], pyarrow.timestamp("ms"))  # beyond what Python's datetime holds
    parquet.write_table(pyarrow.table({"prompt": years}), tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"t\.parquet has no text in its column 'prompt'"):
        read_prompts(tmp_path / "t.parquet")


def test_too_many_lines_and_too_many_bytes_are_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "lines.txt").write_bytes(b"\n" * 100)
    monkeypatch.setattr("anyflow_cli.data.prompts.MAX_ROWS", 99)
    for name in ("sparse.txt", "lines.txt"):
        with pytest.raises(UsageError, match=r"is larger than 256 MiB|more than 99 lines"):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize("text", ["a\0b", "a\x1b[31mb", "a\ud800b"])
def test_text_that_is_not_printable_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--prompt contains control characters or lone surrogates"):
        check_text(text, "--prompt")


def test_parquet_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="needs pyarrow") as error:
        read_prompts(tmp_path / "t.parquet")
    assert error.value.hint is not None
    assert "pip install pyarrow" in error.value.hint


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_in_one_sentence_with_a_hint(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_prompts(tmp_path / name)
    assert said in error.value.message
    assert name in error.value.message
    assert error.value.message.endswith(".")
    assert "\n" not in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_what_is_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not exist|is not a regular file"):
        read_prompts(tmp_path / name)


def test_the_longest_prompt_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("x" * MAX_LENGTH)
    assert read_prompts(tmp_path / "p.txt") == ["x" * MAX_LENGTH]


def test_repeats_are_kept_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("a\nb\na\na\n")
    with caplog.at_level(logging.WARNING):
        assert read_prompts(tmp_path / "p.txt") == ["a", "b", "a", "a"]
    assert "repeats 2 of its 4 prompts" in caplog.text


def test_captions_of_a_world_follow_its_seeds() -> None:
    captions = WorldCaptions("shapes", 5, seed=3)
    assert list(captions) == [WORLDS["shapes"].scene(seed).caption for seed in range(3, 8)]
    assert captions[2:] == list(WorldCaptions("shapes", 3, seed=5))
    assert captions[-1] == captions[4]
    assert len(WorldCaptions("shapes", 10**9)) == 10**9  # none of which is drawn
