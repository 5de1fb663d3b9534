"""Typed reading of JSON files: an error names the file, the field and what was expected there.

A schema is any type that pydantic validates: a model, a dataclass, a list of them. Types are strict, so that
"4" does not pass for 4. Deep nesting, huge integers, wrong encodings and special files end as errors too.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json, to_json

from anyflow_cli.errors import UsageError

BOM = b"\xef\xbb\xbf"  # which some editors put before UTF-8
MAX_BYTES = 1 << 29  # of a JSON file; larger ones are not written by anyflow
RESTORE = "Restore the file, or remove it if it is not needed."
Record = TypeVar("Record")


def read_record(
    path: Path, schema: type[Record], hint: str = RESTORE, renamed: Mapping[str, str] | None = None
) -> Record:
    """Read a JSON file as ``schema``.

    Args:
        path: The file.
        schema: What it must hold.
        hint: Next step for a user whose file is damaged.
        renamed: Old key -> new key, for files of earlier versions, at every level.

    Raises:
        UsageError: The file is missing, too large, not a regular file, not JSON, or does not match.
    """
    return parse_record(read_bytes(path, hint), schema, str(path), hint, renamed)


def read_bytes(path: Path, hint: str = RESTORE) -> bytes:
    """Read a regular file of at most MAX_BYTES; a UsageError for anything else."""
    if not path.exists():
        raise UsageError(f"{path} is missing.", hint)
    if not path.is_file():
        raise UsageError(f"{path} is not a regular file.", hint)
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB.", hint)
    return path.read_bytes()


def parse_record(
    content: bytes, schema: type[Record], source: str, hint: str, renamed: Mapping[str, str] | None = None
) -> Record:
    """Parse JSON as ``schema``; ``source`` names the file, or the line of a file, in an error."""
    try:
        if renamed:
            content = to_json(_with_new_keys(from_json(content.removeprefix(BOM)), renamed))
        record: Record = _adapter(cast("Hashable", schema)).validate_json(
            content.removeprefix(BOM), strict=True
        )
        return record
    except ValidationError as error:
        raise UsageError(f"{source} is damaged: {_first(error.errors(include_url=False))}.", hint) from error
    except ValueError as error:
        raise UsageError(f"{source} is not valid JSON: {error}.", hint) from error


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _first(errors: list[ErrorDetails]) -> str:
    field = ".".join(str(part) for part in errors[0]["loc"])
    return f"{field}: {errors[0]['msg']}" if field else errors[0]["msg"]


def _with_new_keys(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {renamed.get(key, key): _with_new_keys(inner, renamed) for key, inner in value.items()}
    return [_with_new_keys(inner, renamed) for inner in value] if isinstance(value, list) else value
