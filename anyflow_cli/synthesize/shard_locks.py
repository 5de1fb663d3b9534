"""Which process makes which shard: claims on bytes of one hidden file, byte n for shard n.

The kernel gives back the claims of a process that dies, however it dies, and network file systems carry such
locks between machines. So processes may start and end at any time and in any number, and the shards of a dead
one are taken by the others. Where a file system has no locks, shards are divided by rank alone.
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
SHARED = 1 << 40  # the byte of what belongs to the data set as a whole
TAKEN = (errno.EACCES, errno.EAGAIN)


class ShardLocks:
    """The claims of this process on one directory; one object a process, since closing ends them all."""

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
    def shard(self, number: int) -> Iterator[bool]:
        """Whether this process may make the shard; no other may while the block runs."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            yield error.errno not in TAKEN and number % self.ranks == self.rank
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, number)

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Wait until this process alone writes what belongs to no shard."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX, 1, SHARED)
        except OSError:  # no locks here: files are whole all the same, and equal whoever writes them
            yield
            return
        try:
            yield
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, SHARED)
