"""Failures that a user can act on, and exit codes. Everything may import this file; it imports nothing.

The command line prints the message as one sentence after ``error:`` and the hint after ``hint:``, and ends
with the exit code of the class. Bugs are not wrapped in these: they keep their traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from enum import IntEnum

NAMED_BY_LIBRARIES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # safetensors, ffmpeg


class ExitCode(IntEnum):
    """How a command ends."""

    DONE = 0
    FAILED = 1  # something outside went wrong on the way: the same command may succeed later
    USAGE = 2  # the command, the recipe or a file that it names cannot be used: change it first
    INTERRUPTED = 130  # by a signal; training has saved its state


class AnyflowError(Exception):
    """Something outside the code went wrong (a file, the disk, a device).

    Attributes:
        message: One sentence.
        hint: The next step.
        everywhere: Whether all processes of a run raise it, so that only the first one prints it.
    """

    exit_code: int = ExitCode.FAILED

    def __init__(self, message: str, hint: str | None = None, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.everywhere = everywhere


class UsageError(AnyflowError):
    """The command, the recipe or a file that the user named cannot be used as it is; nothing was written."""

    exit_code = ExitCode.USAGE


def system_errors(error: BaseException) -> Iterator[OSError]:
    """The operating system's errors, by number or in words, in an error and in those that led to it."""
    following: BaseException | None = error
    while following:
        if isinstance(following, OSError):
            yield following
        else:
            words = {code: os.strerror(code) for code in NAMED_BY_LIBRARIES}
            yield from (OSError(code, said) for code, said in words.items() if said in str(following))
        following = following.__cause__ or following.__context__
