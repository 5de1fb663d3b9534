"""The directory of a data set: local, or any address that fsspec reads (s3://, hf://, https://, ...).

Files are read whole or by ranges of bytes; nothing is cached on disk. A failed read from another machine is
repeated a few times before it counts. File names come from manifests, so each passes ``safe_child``.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import safe_child
from anyflow_cli.utils.records import MAX_BYTES

RETRY_PAUSES = (0.5, 2.0, 8.0)  # seconds
PARALLEL_REQUESTS = 16
BLOCK_BYTES = 1 << 22
SEEK_BYTES = 1 << 18
MAX_DEPTH = 5  # of directories that are searched

Result = TypeVar("Result")


@dataclass(frozen=True)
class Storage:
    """A directory somewhere; names in it are plain file names."""

    address: str
    files: Any  # fsspec's file system
    root: str

    @staticmethod
    def at(address: str | Path) -> Storage:
        """Find the file system of an address; nothing is read."""
        try:
            files, root = fsspec.core.url_to_fs(str(address))
        except ImportError as error:
            raise UsageError(
                f"Reading {address} needs a package: {error}.", "Install it with pip."
            ) from error
        except Exception as error:  # each library has errors of its own
            raise UsageError(
                f"Nothing can read {address}: {error}.", "Give a directory, or an address that fsspec knows."
            ) from error
        return Storage(str(address), files, root.rstrip("/"))

    def __str__(self) -> str:
        return self.address

    @property
    def is_local(self) -> bool:
        """Whether it is a directory of this machine."""
        return isinstance(self.files, LocalFileSystem)

    def address_of(self, name: str) -> str:
        """Address of a file, for messages."""
        return f"{self.address.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        try:
            return int(self._retry(name, lambda path: self.files.size(path)))
        except FileNotFoundError:
            return None

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Bytes of many files: from one listing where the file system has one, else by parallel requests."""
        try:
            entries = self.files.ls(self.root, detail=True)
        except Exception:  # each library has its own error for a server that does not list
            entries = []
        listed = {PurePosixPath(entry["name"]).name: entry.get("size") for entry in entries}
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(lambda name: listed.get(name) or self.size(name), names))

    def below(self, name: str) -> tuple[Storage, str]:
        """The directory of a file that ``find`` named, and the file's name in it."""
        folder, _, file = name.rpartition("/")
        if not folder:
            return self, file
        return replace(self, address=self.address_of(folder), root=f"{self.root}/{folder}"), file

    def find(self) -> dict[str, int]:
        """Bytes of all files by name, also in directories below; empty where nothing can be listed."""
        try:
            found = self.files.find(self.root, maxdepth=MAX_DEPTH, detail=True)
        except Exception:  # each library has its own error for a server that does not list
            return {}
        start = len(self.root) + 1
        names = {path[start:]: entry for path, entry in found.items() if entry["type"] == "file"}
        return {name: int(names[name]["size"] or 0) for name in sorted(names)}

    @contextmanager
    def opened(self, name: str) -> Iterator[BinaryIO]:
        """Open a file for random access; from another machine in blocks of ``SEEK_BYTES``."""
        options = {} if self.is_local else {"block_size": SEEK_BYTES}
        file = self._retry(name, lambda path: self.files.open(path, "rb", **options))
        with file:
            yield file

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        """Read a file of at most ``MAX_BYTES``, or ``length`` bytes of any file, fewer at its end.

        Raises:
            FileNotFoundError: There is no such file.
            UsageError: It is too large, not a regular file, or not served by ranges.
            AnyflowError: Reading it failed repeatedly.
        """
        if length is None and (self.size(name) or 0) > MAX_BYTES:
            raise UsageError(
                f"{self.address_of(name)} is larger than {MAX_BYTES >> 20} MiB.", "Restore the data set."
            )
        stop = None if length is None else start + length
        content: bytes = self._retry(name, lambda path: self.files.cat_file(path, start, stop))
        if length is not None and len(content) > length:
            raise UsageError(
                f"{self.address_of(name)} is not served by ranges of bytes.",
                "Use another server, or copy the data set to a disk.",
            )
        return content

    def sha256(self, name: str) -> str:
        """SHA-256 of a file in hexadecimal, read block by block."""

        def hash_file(path: str) -> str:
            digest = hashlib.sha256()
            with self.files.open(path, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
            return digest.hexdigest()

        return self._retry(name, hash_file)

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """Yield the path of a file: its own, or that of a temporary copy of one from another machine."""
        if self.is_local:
            yield Path(self.root, name)
            return
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory, name)
            self._retry(name, lambda path: self.files.get_file(path, str(copy)))
            yield copy

    def _retry(self, name: str, read: Callable[[str], Result]) -> Result:
        """Call ``read`` with the path of a file, again after each of the pauses if another machine failed."""
        path = f"{self.root}/{safe_child(Path(self.root), name).name}"
        if self.is_local:
            return self._read_local(path, read)
        for pause in (*RETRY_PAUSES, None):
            try:
                return read(path)
            except FileNotFoundError:
                raise
            except Exception as error:  # each library has errors of its own
                if pause is None:
                    raise AnyflowError(
                        f"{self.address_of(name)} cannot be read: {error or type(error).__name__}.",
                        "Check the network and the permissions, then run the same command again.",
                    ) from error
                time.sleep(pause)
        raise AssertionError("the last pause is None")

    @staticmethod
    def _read_local(path: str, read: Callable[[str], Result]) -> Result:
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
                raise UsageError(f"{path} is not a regular file.", "Restore the data set.")
            return read(path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error
