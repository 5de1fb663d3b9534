"""Locks that assign shards to processes: byte n of one hidden file for shard n.

The kernel releases the locks of a process that dies, however it dies, and network file systems share such
locks between machines. So processes may start and end at any time and in any number, and others take over the
shards of a dead one. On a file system without locks, shards are divided by rank.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from anyflow_cli.utils.files import disk_errors

LOCK_FILE = ".claims"
SHARED = 1 << 40  # the byte for files of the whole data set
LOCKED = (errno.EACCES, errno.EAGAIN)


class ShardLocks:
    """Locks of this process in one directory; one object per process, since closing it releases them all."""

    def __init__(self, directory: Path, rank: int, ranks: int) -> None:
        self.path = directory / LOCK_FILE
        self.rank, self.ranks = rank, ranks
        with disk_errors(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def __enter__(self) -> ShardLocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    @contextmanager
    def shard(self, number: int, *, wait: bool = False) -> Iterator[bool]:
        """Lock a shard for the block; yield whether this process has it, after a ``wait`` if need be."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except OSError as error:
            yield error.errno not in LOCKED and number % self.ranks == self.rank
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def shared_files(self) -> Iterator[None]:
        """Lock the files of the whole data set for the block; waits for other processes."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX, 1, SHARED)
        except OSError:  # no locks here: files are written atomically, and equal in every process
            yield
            return
        try:
            yield
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, SHARED)
