"""From an exception to the sentence, hint and exit code that a user gets.

0 done, 1 failed, 2 wrong use or recipe, or a full disk (to be changed before a new start), 130 interrupted.
What is not recognised here is a bug and keeps its traceback: a run that dies after hours must say where.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

from anyflow_cli.errors import AnyflowError, system_errors
from anyflow_cli.utils.distributed import is_main_process

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT)
FREE_SPACE = "Free some space, or choose another disk with --runs; starting the same command again continues."
OTHER_PLACE = "Correct its permissions, or choose another place with --runs."
# errno -> sentence about a path, hint
DISK = {
    errno.ENOSPC: ("No space is left on the disk{of}.", FREE_SPACE),
    errno.EDQUOT: ("The disk quota is used up{of}.", FREE_SPACE),
    errno.EACCES: ("There is no permission to open the file{name}.", OTHER_PLACE),
    errno.EPERM: ("There is no permission to change the file{name}.", OTHER_PLACE),
    errno.EROFS: ("The disk{of} can only be read.", OTHER_PLACE),
}
LOST_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "watchdog thread")


@dataclass(frozen=True)
class Failure:
    """What is printed, and the exit code."""

    message: str
    hint: str | None
    code: int
    said: bool = False  # by the first process, which knows it as well as this one


def failure_of(error: BaseException) -> Failure | None:
    """Recognise an error; None for a bug."""
    if isinstance(error, AnyflowError):
        said = error.everywhere and not is_main_process()
        full = any(cause.errno in FULL for cause in system_errors(error))
        return Failure(error.message, error.hint, 2 if full else error.exit_code, said)
    if hasattr(error, "format_message"):
        return _wrong_use(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's, told by name: torch may not be loaded
        hint = "Lower the section's micro_batch or batch, or set model.gradient_checkpointing=true."
        return Failure("The device ran out of memory.", hint, 1)
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_PEER_WORDS):
        hint = "Start the same command again: it continues from the last checkpoint."
        return Failure("Another process of this run ended, so this one cannot go on.", hint, 1)
    return next((failure for cause in system_errors(error) if (failure := _of_the_disk(cause))), None)


def _wrong_use(error: Any) -> Failure:
    """Word an error of the command line's parser."""
    guesses = getattr(error, "possibilities", None)
    message = (
        f"{error.message}; did you mean {' or '.join(sorted(guesses))}?"
        if guesses
        else error.format_message()
    )
    command = error.ctx.command_path if getattr(error, "ctx", None) else "anyflow"
    return Failure(message, f"`{command} --help` shows what there is.", error.exit_code)


def _of_the_disk(error: OSError) -> Failure | None:
    if error.errno not in DISK:
        return None
    sentence, hint = DISK[error.errno]
    name = error.filename
    message = sentence.format(of=f" of {name}" if name else "", name=f" {name}" if name else "")
    return Failure(message, hint, 2 if error.errno in FULL else 1)
