"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed.

The temporary name carries the rank alone, so what a killed process left behind is overwritten by its restart,
or cleared by whoever makes the file instead.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
)  # fmt: skip


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes ``path`` when the block ends well.

    An ending (.mp4, .tar) is kept, since some writers choose the format by it. A full or read-only disk ends
    as an AnyflowError that names the file, with nothing half-written left.
    """
    temporary = path.with_name(f".{path.stem}.{os.environ.get('RANK', '0')}.tmp{path.suffix}")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)  # the rename itself must survive a power cut
    finally:
        with suppress(OSError):
            temporary.unlink()


def clear_leftovers(directory: Path, stem: str = "*") -> None:
    """Remove what killed processes left of files with this stem; nobody may be writing one."""
    for left in directory.glob(f".{stem}.*.tmp.*"):
        left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Let a full or read-only disk end as an AnyflowError that names what was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise AnyflowError(
            f"Cannot write {path}: {error.strerror}.",
            "Free space or rights there, or choose another place; what was complete before still is.",
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Commit a JSON file, indented for people to read."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
