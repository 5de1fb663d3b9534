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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from anyflow_cli.data.world import WORLDS
from anyflow_cli.errors import UsageError

MAX_LENGTH = 2000
COLUMNS = ("prompt", "caption", "text")
FORMATS = "one prompt a line (.txt), or a column 'prompt', 'caption' or 'text' (.csv, .jsonl, .parquet)"

log = logging.getLogger(__name__)

Numbered = tuple[int, Any]  # line (of a table: row) number from 1, and what stands there


def read_prompts(path: str | Path) -> list[str]:
    """All prompts of a file in order. Blank lines of a txt file are skipped; repeats are kept and counted."""
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise UsageError(f"The prompt file {path} {what}.", f"Give a file with {FORMATS}.")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"The prompt file {path} has the unknown ending '{path.suffix}'.", f"Rename it: {FORMATS}."
        )
    prompts = [_checked(path, line, value) for line, value in reader(path)]
    if not prompts:
        raise UsageError(f"The prompt file {path} holds no prompt.", f"Write {FORMATS}.")
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        log.warning(
            "%s repeats %d of its %d prompts; each is used, with a seed of its own.",
            path,
            repeated,
            len(prompts),
        )
    return prompts


def world_captions(world: str, count: int, seed: int = 0) -> list[str]:
    """Captions of the scenes seed, seed + 1, ... of a world."""
    return [WORLDS[world].scene(seed + index).caption for index in range(count)]


def _checked(path: Path, line: int, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"Line {line} of {path} has no text for its prompt.",
            "Fill it in or remove the line; nothing was written.",
        )
    prompt = value.strip()
    if len(prompt) > MAX_LENGTH:
        raise UsageError(
            f"The prompt in line {line} of {path} has {len(prompt):,} characters, more than {MAX_LENGTH:,}.",
            "Shorten it; text encoders read about 500 tokens, the rest would be ignored unsaid.",
        )
    if any(ord(c) < 32 and c not in "\n\r\t" for c in prompt):
        raise UsageError(f"The prompt in line {line} of {path} contains control characters.", "Remove them.")
    return prompt


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if b"\0" in raw:
        raise UsageError(f"The prompt file {path} is binary, not text.", f"Give a file with {FORMATS}.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"Line {line} of {path} is not UTF-8.", "Save the file as UTF-8 and run again."
        ) from error


def _txt(path: Path) -> Iterator[Numbered]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield number, line


def _csv(path: Path) -> Iterator[Numbered]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    column = _column(path, reader.fieldnames or ())
    try:
        for row in reader:
            yield reader.line_num, row[column]
    except csv.Error as error:
        raise UsageError(
            f"Line {reader.line_num} of {path} is not CSV: {error}.", "Quote its text."
        ) from error


def _jsonl(path: Path) -> Iterator[Numbered]:
    for number, line in _txt(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"Line {number} of {path} is not JSON: {error.msg}.", "Write one object a line."
            ) from error
        if not isinstance(row, dict):
            raise UsageError(
                f"Line {number} of {path} is not a JSON object.", 'Write {"prompt": "..."} a line.'
            )
        yield number, row[_column(path, row, f"line {number} of ")]


def _parquet(path: Path) -> Iterator[Numbered]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"Reading {path} needs pyarrow.", "pip install pyarrow, or export it as csv or jsonl."
        ) from error
    try:
        column = _column(path, parquet.read_schema(path).names)
        values = parquet.read_table(path, columns=[column]).column(column).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UsageError(f"The prompt file {path} cannot be read as parquet.", "Export it again.") from error
    yield from enumerate(values, 1)


def _column(path: Path, names: Iterable[str], where: str = "") -> str:
    names = list(names)
    for column in COLUMNS:
        if column in names:
            return column
    found = ", ".join(f"'{name}'" for name in names) or "none"
    raise UsageError(
        f"No column 'prompt', 'caption' or 'text' in {where}{path} (found: {found}).",
        "Name the column one of these.",
    )


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
