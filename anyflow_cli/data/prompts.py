"""Prompts and captions from files: tables (csv, jsonl, parquet) and text, or the captions of a shapes world.

Files are read row by row, and a row that cannot be used raises an error that names file and line; callers
decide whether to refuse the file or to leave the row out. Text is UTF-8; another encoding is named, never
guessed. Prompts are data: nothing turns one into a path.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from anyflow_cli.data.shapes_world import WORLDS
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.records import parse_record
from anyflow_cli.utils.user_text import shortened

MAX_LENGTH = 2000  # characters
MAX_ROWS = 10_000_000
MAX_TEXT_BYTES = 1 << 28
TEXT_COLUMNS = ("prompt", "caption", "text")
FILE_COLUMNS = ("file", "file_name", "video")  # ours, Hugging Face's, and that of other trainers
PICTURE_COLUMNS = ("image", "last_image")
PicturePaths = tuple[Path, Path | None]  # of the first frame, and of the last one
FORMATS = "one prompt per line (.txt), or a column 'prompt', 'caption' or 'text' (.csv, .jsonl, .parquet)"
ESCAPED_BYTES = ("\udc80", "\udcff")  # how bytes that are not UTF-8 are decoded
ENCODING_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip

log = logging.getLogger(__name__)

TableRow = Mapping[Any, Any]
TableRows = Iterator[tuple[int, TableRow]]  # line (parquet: row) number from 1, and its columns


def read_prompts(path: str | Path) -> list[str]:
    """Read all prompts of a file in order; blank lines of a txt file are skipped, repeats kept and counted.

    Raises:
        UsageError: The file is unreadable, or rows are unusable; names the first and counts the others.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise UsageError(f"The prompt file {path} {what}.", f"Give a file with {FORMATS}.")
    prompts: list[str] = []
    problems: list[UsageError] = []
    for line, row in read_rows(path):
        try:
            prompts.append(text_field(path, line, row, TEXT_COLUMNS))
        except UsageError as error:
            problems.append(error)
    if problems:
        more = f" {len(problems) - 1} more lines of it are unusable too." if len(problems) > 1 else ""
        raise UsageError(problems[0].message + more, problems[0].hint)
    if not prompts:
        raise UsageError(f"The prompt file {path} contains no prompts.", f"Write {FORMATS}.")
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        log.warning(
            "%s repeats %d of its %d prompts; each is used, with its own seed.", path, repeated, len(prompts)
        )
    return prompts


def read_pictures(path: Path) -> list[PicturePaths] | None:
    """Read the pictures beside the prompts of a table, in order; None if it has no column 'image'.

    Paths are relative to the table.

    Raises:
        UsageError: A row names no picture, or one that is not there.
    """
    pictures: list[PicturePaths] = []
    for line, row in read_rows(path):
        if PICTURE_COLUMNS[0] not in row:
            return None
        named = [row.get(column) for column in PICTURE_COLUMNS]
        found = [path.parent / text if isinstance(text, str) and text else None for text in named]
        lost = next((file for file in found if file is not None and not file.is_file()), None)
        if found[0] is None or lost is not None:
            what = f"names {lost}, which is missing" if lost else "names no picture in its column 'image'"
            raise UsageError(f"Line {line} of {path} {what}.", "Fill it in, relative to the table.")
        pictures.append((found[0], found[1]))
    return pictures


class WorldCaptions(Sequence[str]):
    """Captions of the scenes seed, seed + 1, ... of a world, drawn where they are read."""

    def __init__(self, world: str, count: int, seed: int = 0) -> None:
        self._world, self._seeds = WORLDS[world], range(seed, seed + count)

    def __len__(self) -> int:
        return len(self._seeds)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        seeds = self._seeds[index]
        if isinstance(seeds, int):
            return self._world.scene(seeds).caption
        return [self._world.scene(seed).caption for seed in seeds]


def read_rows(path: Path) -> TableRows:
    """Yield the rows of a table by its suffix; a line of a txt file is a row with the column 'prompt'."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"The file {path} has the unknown suffix '{path.suffix}'.", f"Rename it: {FORMATS}.")
    return reader(path)


def text_field(
    path: Path, line: int, row: TableRow, columns: Sequence[str], max_length: int | None = MAX_LENGTH
) -> str:
    """Return the text in the first of ``columns`` that the row has; refuse a row without usable text."""
    column = next((name for name in columns if name in row), None)
    if column is None:
        found = shortened(", ".join(repr(name) for name in row if name is not None), 200) or "none"
        wanted = " or ".join(f"'{name}'" for name in columns)
        raise UsageError(
            f"Line {line} of {path} has no column {wanted} (found: {found}).", "Rename the column."
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise UsageError(
            f"Line {line} of {path} has no text in its column '{column}'.", "Fill it in or remove the line."
        )
    return check_text(value.strip(), f"Line {line} of {path}", max_length)


def check_text(text: str, source: str, max_length: int | None = MAX_LENGTH) -> str:
    """Return a text that can be a prompt; refuse one that is too long, not Unicode, or not printable.

    Args:
        text: The text.
        source: Where it is from, at the start of the message.
        max_length: Most characters; None for any number.
    """
    if max_length is not None and len(text) > max_length:
        raise UsageError(
            f"{source} has {len(text):,} characters, more than {max_length:,}.",
            "Shorten it: text encoders read about 500 tokens and ignore the rest.",
        )
    if any(ESCAPED_BYTES[0] <= c <= ESCAPED_BYTES[1] for c in text):
        raise UsageError(f"{source} is {_encoding(text)}, not UTF-8.", "Save the file as UTF-8.")
    if any((ord(c) < 32 and c not in "\n\r\t") or "\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{source} contains control characters or lone surrogates.", "Remove them.")
    return text


def _encoding(text: str) -> str:
    """Name the likely encoding of text with escaped bytes."""
    try:
        text.encode("utf-8", "surrogateescape").decode("cp1252")
    except UnicodeDecodeError:
        return "in an unknown encoding"
    return "probably cp1252"


def read_text(path: Path) -> str:
    """Read a text file; bytes that are not UTF-8 become surrogates, which ``check_text`` refuses.

    Raises:
        UsageError: The file is too large, binary, or UTF-16 or UTF-32.
    """
    if path.stat().st_size > MAX_TEXT_BYTES:
        raise UsageError(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB.", "Split it.")
    raw = path.read_bytes()
    encoding = next((name for mark, name in ENCODING_MARKS.items() if raw.startswith(mark)), None)
    if encoding is None and b"\0" in raw:
        even, odd = raw[:4096:2], raw[1:4096:2]
        if not (even.isascii() and odd.isascii() and max(even.count(0), odd.count(0)) == len(odd)):
            raise UsageError(f"{path} is binary, not text.", f"Give a file with {FORMATS}.")
        encoding = "UTF-16"
    if encoding is not None:
        raise UsageError(f"{path} is {encoding}, not UTF-8.", "Save the file as UTF-8.")
    if raw.count(b"\n") > MAX_ROWS:
        raise UsageError(f"{path} has more than {MAX_ROWS:,} lines.", "Split it.")
    return raw.decode("utf-8-sig", "surrogateescape")


def _txt(path: Path) -> TableRows:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line}


def _csv(path: Path) -> TableRows:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise UsageError(
            f"Line {reader.line_num} of {path} is not CSV: {error}.", "Quote its text."
        ) from error


def _jsonl(path: Path) -> TableRows:
    for number, row in _txt(path):
        source = f"Line {number} of {path}"
        line = check_text(row["prompt"].strip(), source, None).encode()
        yield (
            number,
            parse_record(line, dict[str, Any], source, 'Write one object per line, {"prompt": "..."}.'),
        )


def _parquet(path: Path) -> TableRows:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(
            f"Reading {path} needs pyarrow.", "pip install pyarrow, or export a csv or jsonl."
        ) from error
    try:
        table = parquet.ParquetFile(path)
        if table.metadata.num_rows > MAX_ROWS:
            raise UsageError(f"{path} has more than {MAX_ROWS:,} rows.", "Split it.")
        columns = [
            field.name for field in table.schema_arrow if str(field.type) in ("string", "large_string")
        ]
        columns = [name for name in columns if name in (*FILE_COLUMNS, *TEXT_COLUMNS, *PICTURE_COLUMNS)]
        rows = [row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist()]
    except UsageError:
        raise
    except Exception as error:  # a decoder of foreign bytes can raise anything
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UsageError(f"{path} cannot be read as parquet: {reason}.", "Export it again.") from error
    others = dict.fromkeys(table.schema_arrow.names)  # without text
    yield from ((number, others | row) for number, row in enumerate(rows, 1))


READERS: dict[str, Callable[[Path], TableRows]] = {
    ".txt": _txt,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
