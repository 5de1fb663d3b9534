"""From an exception to the sentence, hint and exit code that a user gets.

``KINDS`` is the one table of failures; ``docs/troubleshooting.md`` shows it. What no row recognizes is a bug
and keeps its traceback: a run that dies after hours must say where.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from anyflow_cli.errors import AnyflowError, ExitCode, UsageError, system_errors
from anyflow_cli.utils.distributed import is_main_process
from anyflow_cli.utils.user_text import shortened

CONTINUE = "Start the same command again: it continues from the last checkpoint."
FREE_SPACE = "Free some space, or choose another disk with --runs; starting the same command again continues."
OTHER_PLACE = "Correct its permissions, or choose another place with --runs."
OTHER_NAME = "Choose another path."
UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# errno -> sentence about a path, hint
SYSTEM = {
    errno.ENOSPC: ("No space is left on the disk{of}.", FREE_SPACE),
    errno.EDQUOT: ("The disk quota is used up{of}.", FREE_SPACE),
    errno.EFBIG: ("The file{name} would exceed the largest size that is allowed here.", "Raise `ulimit -f`."),
    errno.EMFILE: ("Too many files are open.", "Raise the limit: `ulimit -n 4096`."),
    errno.EACCES: ("There is no permission to open the file{name}.", OTHER_PLACE),
    errno.EPERM: ("There is no permission to change the file{name}.", OTHER_PLACE),
    errno.EROFS: ("The disk{of} is read-only.", OTHER_PLACE),
    errno.EIO: ("The disk{of} failed: input/output error.", "Check the disk, then start the command again."),
    errno.ENAMETOOLONG: ("The name{name} is too long.", OTHER_NAME),
    errno.ELOOP: ("The file{name} is a link to itself.", OTHER_NAME),
    errno.ENOTDIR: ("{name} is inside a file, not a directory.", OTHER_NAME),
    errno.EISDIR: ("{name} is a directory, not a file.", OTHER_NAME),
    errno.EEXIST: ("{name} exists and is not a directory.", OTHER_NAME),
}
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "NCCL error", "watchdog thread")
NO_MEMORY = ("can't allocate memory", "not enough memory", "bad allocation", "std::bad_alloc")


@dataclass(frozen=True)
class Failure:
    """What is printed, and the exit code; ``silent`` where the first process prints it for all."""

    message: str
    hint: str | None
    code: int
    silent: bool = False


class FailureKind(NamedTuple):
    """A row of the table: what failed, how the command ends, and the exception that shows it."""

    name: str
    code: ExitCode
    recognize: Callable[[BaseException], Failure | None]


def failure_of(error: BaseException) -> Failure | None:
    """Recognize an error; None for a bug."""
    return next((found for kind in KINDS if (found := kind.recognize(error))), None)


def _own(error: BaseException, kind: type[AnyflowError]) -> Failure | None:
    if not isinstance(error, kind):
        return None
    return Failure(error.message, error.hint, error.exit_code, error.everywhere and not is_main_process())


def _parser(error: Any) -> Failure | None:
    """Word an error of the command line's parser."""
    if not hasattr(error, "format_message"):
        return None
    guesses = getattr(error, "possibilities", None)
    message = (
        f"{error.message}; did you mean {' or '.join(sorted(guesses))}?"
        if guesses
        else error.format_message()
    )
    command = error.ctx.command_path if getattr(error, "ctx", None) else "anyflow"
    return Failure(shortened(message, 500), f"`{command} --help` lists what there is.", ExitCode.USAGE)


def _memory(error: BaseException) -> Failure | None:
    device = type(error).__name__ == "OutOfMemoryError"  # torch's, by name: torch may not be loaded
    if not device and not isinstance(error, MemoryError) and not any(w in str(error) for w in NO_MEMORY):
        return None
    what = "The device" if device else "This machine"
    hint = "Lower the section's micro_batch or batch_size, or set model.gradient_checkpointing=true."
    return Failure(f"{what} ran out of memory.", hint, ExitCode.FAILED)


def _lost_peer(error: BaseException) -> Failure | None:
    if not isinstance(error, RuntimeError) or not any(words in str(error) for words in LOST_PEER):
        return None
    hint = f"The first error above is the reason. {CONTINUE}"
    return Failure("Another process of this run ended, so this one cannot go on.", hint, ExitCode.FAILED)


def _system(error: BaseException) -> Failure | None:
    for cause in system_errors(error):
        if cause.errno in SYSTEM:
            sentence, hint = SYSTEM[cause.errno]
            path = cause.filename  # a file descriptor where the path is not known
            name = shortened(os.fsdecode(path), 200) if isinstance(path, str | bytes | os.PathLike) else ""
            if not name and sentence.startswith("{name}"):
                continue
            filled = sentence.format(of=f" of {name}" if name else "", name=f" {name}" if name else "")
            code = ExitCode.USAGE if cause.errno in UNUSABLE_PATH else ExitCode.FAILED
            return Failure(filled.strip(), hint, code)
    return None


KINDS = (
    FailureKind(
        "a command, recipe or file that cannot be used", ExitCode.USAGE, lambda e: _own(e, UsageError)
    ),
    FailureKind("a failure that anyflow foresees", ExitCode.FAILED, lambda e: _own(e, AnyflowError)),
    FailureKind("an unknown option or a bad value", ExitCode.USAGE, _parser),
    FailureKind("out of memory, on a device or the CPU", ExitCode.FAILED, _memory),
    FailureKind("another process of the run ended", ExitCode.FAILED, _lost_peer),
    FailureKind("a full, read-only or broken disk", ExitCode.FAILED, _system),
)
