"""Failures that a user can act on. Everything may import this file; it imports nothing.

The command line prints the message as one sentence after ``error:``, the hint after ``hint:``, and ends with
the exit code of the class. Bugs are not wrapped in these: they keep their traceback.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

TOLD_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # by safetensors, ffmpeg


class AnyflowError(Exception):
    """Something outside the code went wrong (a file, the disk). ``hint`` names the next step.

    ``everywhere``: all processes of a run raise it alike, so that it is enough if the first one says it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.everywhere = everywhere


class UsageError(AnyflowError):
    """The command, the recipe or a file given by the user cannot be used as it is; nothing was written."""

    exit_code = 2


def system_errors(error: BaseException) -> Iterator[OSError]:
    """What the system said of the disk, by number or in words, in an error and in what led to it."""
    following: BaseException | None = error
    while following:
        if isinstance(following, OSError):
            yield following
        else:
            words = {code: os.strerror(code) for code in TOLD_IN_WORDS}
            yield from (OSError(code, said) for code, said in words.items() if said in str(following))
        following = following.__cause__ or following.__context__
