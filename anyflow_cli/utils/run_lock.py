"""A lock on the directory of a run, so that two commands do not write into it at once.

It is an ``flock`` on a hidden file, which the kernel releases when its owner dies, however it dies. The file
names the owner for whoever comes second. Of several processes the main one has the lock for all.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.distributed import is_main_process
from anyflow_cli.utils.files import disk_errors

RUN_LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)

log = logging.getLogger(__name__)


class RunLock:
    """Holds the lock of ``directory`` while its block runs; the directory is created if need be.

    Raises:
        UsageError: Another command has it; the message says which, where and since when.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / RUN_LOCK
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        if not is_main_process():
            return self
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise UsageError(f"{self.path} is not a regular file.", "Remove it, or choose another directory.")
        with disk_errors(self.path):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                owner = self._owner()
                self.release()
                raise UsageError(
                    f"{self.directory} is in use by {owner}.",
                    "Wait for it to end, stop it, or choose another directory.",
                ) from None
            log.warning("%s cannot be locked (%s): start no second command there.", self.path, error.strerror)
            return self
        with disk_errors(self.path):
            self._file.truncate(0)
            content = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(["anyflow", *sys.argv[1:]]),
            }
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock up before the end of the block, e.g. to the main one of the processes to start."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _owner(self) -> str:
        """Describe the owner; another program may have written the file, or the owner be about to."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return "process {pid} on {host} since {since} ({command})".format(**content)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return "another process"
