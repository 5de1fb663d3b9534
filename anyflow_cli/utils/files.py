"""Files and directories that are complete or absent: written under a temporary name, flushed, then renamed.

The temporary name of a file has the rank alone, so what a killed process left is overwritten by its restart,
or cleared by whoever writes the file instead. Nothing that was not written here is deleted: a directory that
holds other files is kept beside its replacement.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import psutil

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.distributed import rank

DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
)  # fmt: skip
SHARD_FILE = re.compile(r".+-\d{5}-of-\d{5}\.safetensors|.+\.safetensors(\.index\.json)?")  # by size
BLOCK = 1 << 20  # bytes hashed at a time

log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there becomes ``path`` when the block ends without an error.

    The suffix (.mp4, .tar) is kept, since some writers choose the format by it.

    Raises:
        AnyflowError: The disk is full or read-only; names the file, and nothing half-written is left.
    """
    temporary = path.with_name(f".{path.stem}.{rank()}.tmp{path.suffix}")
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)  # the rename itself must survive a power cut
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a new directory beside ``target`` that takes its name when the block ends without an error.

    An older directory is replaced. One that holds files of other names, which someone else put there, is kept
    as ``NAME.before-1``.

    Raises:
        AnyflowError: The disk is full or read-only; nothing half-written is left.
    """
    folder = _temporary(target, "partial")
    try:
        with disk_errors(target):
            _clear_dead(target)
            folder.mkdir(parents=True)
            yield folder
            for file in folder.rglob("*"):
                if file.is_file():
                    flush(file)
            old = _set_aside(target, folder)
            folder.rename(target)
            flush(target.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{kind}")


def _clear_dead(target: Path) -> None:
    """Remove the temporary directories that killed processes left; one killed while it replaced is undone."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.(partial|replaced)")
    for path in target.parent.glob(".*") if target.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if not match or (int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1]))):
            continue
        if match[2] == "replaced" and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _set_aside(target: Path, new: Path) -> Path | None:
    """Rename what is at ``target``; return the name if it may be deleted once ``new`` has taken its place."""
    if target.is_symlink():
        target.unlink()  # of a link, only the link
        return None
    if not target.exists():
        return None
    ours = {file.relative_to(new) for file in new.rglob("*")}
    others = [
        file for file in target.rglob("*")
        if file.relative_to(target) not in ours and not SHARD_FILE.fullmatch(file.name)
    ]  # fmt: skip
    if not others and target.is_dir():
        return target.rename(_temporary(target, "replaced"))
    names = (target.with_name(f"{target.name}.before-{number}") for number in itertools.count(1))
    kept = target.rename(next(name for name in names if not name.exists()))
    log.warning(
        "%s holds other files than it was written with, e.g. %s; it is now %s.",
        target,
        others[0].name if others else target.name,
        kept,
    )
    return None


def clear_leftovers(directory: Path, stem: str = "*") -> None:
    """Remove what killed processes left of files with this stem; no process may be writing one."""
    name = ".+" if stem == "*" else re.escape(stem)
    for left in directory.glob(".*.tmp*"):
        if re.fullmatch(rf"\.{name}\.\d+\.tmp(\.\w+)?", left.name):
            left.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a full or read-only disk as an AnyflowError that names what was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise AnyflowError(
            f"Cannot write {path}: {error.strerror}.",
            "Free space or fix the permissions there, or choose another place; finished files are intact.",
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically, indented for people to read."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: The file is missing, or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is missing.", "Restore the file, or name another directory.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON.", "Restore the file from where it came from.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} does not hold a JSON object.", "Restore the file from where it came from.")
    return content


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(content: Any) -> str:
    """SHA-256 of plain values, written as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def flush(path: Path) -> None:
    """Force a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def safe_child(folder: Path, name: str, *, follow_links: bool = True) -> Path:
    """Path inside ``folder`` of a name that was read from a file: the border for every such name.

    Args:
        folder: Directory that the name must stay in.
        name: Relative name, possibly with sub-directories.
        follow_links: Accept symbolic links that lead out of the folder, as the Hub's cache has them. Pass
            False before writing or deleting.

    Raises:
        UsageError: The name is empty, absolute, not a file name, or leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    legal = parts and not any(part in ("..", "/", "//") or not _is_file_name(part) for part in parts)
    child = folder.joinpath(*parts) if legal else folder
    if child == folder or not (follow_links or child.resolve().is_relative_to(folder.resolve())):
        raise UsageError(
            f"A file of {folder} names {ascii(name)[:200]}, which is not a file inside that directory.",
            "Restore the directory from where it came from.",
        )
    return child


def _is_file_name(part: str) -> bool:
    """Whether a path component can exist on this system, and on others that separate paths differently."""
    try:
        return len(part.encode()) <= 255 and not set(part) & {"\\", "\0"} and part[1:2] != ":"
    except UnicodeEncodeError:  # a lone surrogate
        return False
