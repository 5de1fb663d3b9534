"""Where a data set lies: a local directory, or any address that fsspec reads (s3://, hf://, https://, ...).

Files are read whole or by ranges of bytes, nothing is cached on disk. Another machine may fail for a moment,
so that a failed read from one is repeated before it counts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from anyflow_cli.errors import AnyflowError, UsageError

PAUSES = (0.5, 2.0, 8.0)  # seconds before a failed read from another machine is repeated
ASKED_AT_ONCE = 16
PIECE = 1 << 22  # bytes

Result = TypeVar("Result")


@dataclass(frozen=True)
class Storage:
    """A directory somewhere. Names in it are plain file names."""

    address: str
    files: Any  # fsspec's file system
    root: str

    @staticmethod
    def at(address: str | Path) -> Storage:
        """Find out who can read an address; nothing is read."""
        try:
            files, root = fsspec.core.url_to_fs(str(address))
        except ImportError as error:
            raise UsageError(
                f"Reading {address} needs a package: {error}.", "Install it with pip."
            ) from error
        except ValueError as error:
            raise UsageError(
                f"Nothing can read {address}: {error}.", "Give a directory, or an address that fsspec knows."
            ) from error
        return Storage(str(address), files, root.rstrip("/"))

    def __str__(self) -> str:
        return self.address

    def name(self, name: str) -> str:
        """The address of a file, for people to read."""
        return f"{self.address.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is none."""
        try:
            return int(self._patiently(name, lambda: self.files.size(self._path(name))))
        except FileNotFoundError:
            return None

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Sizes of many files: from one listing where the place gives one, else asked side by side."""
        try:
            entries = self.files.ls(self.root, detail=True)
        except Exception:  # each library has its own error for a server that does not list
            entries = []
        listed = {PurePosixPath(entry["name"]).name: entry.get("size") for entry in entries}
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return list(pool.map(lambda name: listed.get(name) or self.size(name), names))

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """A file, or ``length`` bytes of it, fewer at its end; FileNotFoundError if there is none."""
        stop = None if length is None else start + length
        content: bytes = self._patiently(name, lambda: self.files.cat_file(self._path(name), start, stop))
        if length is not None and len(content) > length:
            raise UsageError(
                f"{self.name(name)} is not served by ranges of bytes.",
                "Use another server, or copy the data set to a disk.",
            )
        return content

    def sha256(self, name: str) -> str:
        """The hash of a file, read in pieces."""
        digest = hashlib.sha256()
        with self.files.open(self._path(name), "rb") as handle:
            while piece := handle.read(PIECE):
                digest.update(piece)
        return digest.hexdigest()

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _patiently(self, name: str, read: Callable[[], Result]) -> Result:
        """What ``read`` gives, asked again after each of PAUSES if another machine failed to answer."""
        if isinstance(self.files, LocalFileSystem):
            return read()
        for pause in (*PAUSES, None):
            try:
                return read()
            except FileNotFoundError:
                raise
            except Exception as error:  # each library has errors of its own
                if pause is None:
                    raise AnyflowError(
                        f"{self.name(name)} cannot be read: {error or type(error).__name__}.",
                        "Check the network and the rights; the same command then goes on.",
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last pause is None")
