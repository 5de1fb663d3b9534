"""Failures that a user can act on. Everything may import this file; it imports nothing.

The command line prints the message as one sentence after ``error:``, the hint after ``hint:``, and ends with
the exit code of the class. Bugs are not wrapped in these: they keep their traceback.
"""

from __future__ import annotations


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
