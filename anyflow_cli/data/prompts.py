"""Prompts from a file (txt, csv, jsonl, parquet) or from the captions of a world.

Everything a prompt file can get wrong is refused here in one sentence that names the file and, where there is
one, the line. Prompts stay data: nothing downstream may turn one into a path. Repeated prompts are kept,
since each row has a seed of its own, but their number is said.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anyflow_cli.data.shapes_world import WORLDS
from anyflow_cli.errors import UsageError

MAX_LENGTH = 2000
COLUMNS = ("prompt", "caption", "text")
FORMATS = "one prompt a line (.txt), or a column 'prompt', 'caption' or 'text' (.csv, .jsonl, .parquet)"

log = logging.getLogger(__name__)

PromptRow = Mapping[Any, Any]
PromptRows = Iterator[tuple[int, PromptRow]]  # line (in a parquet table: row) number from 1, and its columns


def read_prompts(path: str | Path) -> list[str]:
    """All prompts of a file in order. Blank lines of a txt file are skipped; repeats are kept and counted."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"The prompt file {path} {what}.", f"Give a file with {FORMATS}.")
    prompts = [text_field(path, line, row, COLUMNS) for line, row in read_rows(path)]
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt.", f"Write {FORMATS}.")
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        log.warning(
            "%s repeats %d of its %d prompts; each is used, with a seed of its own.",
            path, repeated, len(prompts),
        )  # fmt: skip
    return prompts


def world_captions(world: str, count: int, seed: int = 0) -> list[str]:
    """Captions of the scenes seed, seed + 1, ... of a world."""
    return [WORLDS[world].scene(seed + index).caption for index in range(count)]


def read_rows(path: Path) -> PromptRows:
    """The rows of a table by its ending; a line of a txt file is a row with the column 'prompt'."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"The file {path} has the unknown ending '{path.suffix}'.", f"Rename it: {FORMATS}.")
    return reader(path)


def text_field(path: Path, line: int, row: PromptRow, columns: Sequence[str]) -> str:
    """The text in the first of ``columns`` that the row has, refused when it is no usable text."""
    column = next((name for name in columns if name in row), None)
    if column is None:
        found = ", ".join(f"'{name}'" for name in row if name is not None) or "none"
        wanted = " or ".join(f"'{name}'" for name in columns)
        raise UsageError(
            f"Line {line} of {path} has no column {wanted} (found: {found}).", "Name the column so."
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"Line {line} of {path} has no text for its {column}.", "Fill it in or remove the line."
        )
    return checked_text(f"line {line} of {path}", value.strip())


def checked_text(where: str, text: str) -> str:
    """The text itself, unless it is too long or holds control characters."""
    if len(text) > MAX_LENGTH:
        raise UsageError(
            f"The text in {where} has {len(text):,} characters, more than {MAX_LENGTH:,}.",
            "Shorten it: text encoders read about 500 tokens and would ignore the rest unsaid.",
        )
    if any(ord(c) < 32 and c not in "\n\r\t" for c in text):
        raise UsageError(f"The text in {where} contains control characters.", "Remove them.")
    return text


def read_text(path: Path) -> str:
    """A text file as UTF-8, or a message that says what it is instead."""
    raw = path.read_bytes()
    if b"\0" in raw:
        raise UsageError(f"The file {path} is binary, not text.", f"Give a file with {FORMATS}.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"Line {line} of {path} is not UTF-8.", "Save the file as UTF-8 and run again."
        ) from error


def _txt(path: Path) -> PromptRows:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line}


def _csv(path: Path) -> PromptRows:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(
            f"Line {reader.line_num} of {path} is not CSV: {error}.", "Quote its text."
        ) from error


def _jsonl(path: Path) -> PromptRows:
    for number, line in _txt(path):
        try:
            row = json.loads(line["prompt"])
        except json.JSONDecodeError as error:
            raise UsageError(
                f"Line {number} of {path} is not JSON: {error.msg}.", "Write one object a line."
            ) from error
        if not isinstance(row, dict):
            raise UsageError(
                f"Line {number} of {path} is not a JSON object.", 'Write {"prompt": "..."} a line.'
            )
        yield number, row


def _parquet(path: Path) -> PromptRows:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"Reading {path} needs pyarrow.", "pip install pyarrow, or export a csv or jsonl."
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UsageError(f"The file {path} cannot be read as parquet.", "Export it again.") from error
    yield from enumerate(rows, 1)


READERS: dict[str, Callable[[Path], PromptRows]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
