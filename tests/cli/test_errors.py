"""Which exceptions become which sentence and code; a bug is none of them."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from anyflow_cli.cli.errors import KINDS, SYSTEM, UNUSABLE_PATH, Failure, failure_of
from anyflow_cli.errors import AnyflowError, ExitCode, UsageError


@pytest.mark.parametrize("code", list(SYSTEM))
def test_the_disk_names_the_file(code: int) -> None:
    failure = failure_of(OSError(code, "words of the system", "some/file"))
    assert failure
    assert failure.code == (ExitCode.USAGE if code in UNUSABLE_PATH else ExitCode.FAILED)
    assert failure.hint
    assert "some/file" in failure.message or code == errno.EMFILE
    assert "  " not in failure.message


def test_the_disk_is_found_behind_another_error() -> None:
    cause, error = OSError(errno.ENOSPC, "full", "a.tar"), RuntimeError("could not save")
    error.__context__ = cause
    assert failure_of(error) == failure_of(cause)
    error.__cause__, error.__context__ = cause, None
    assert failure_of(error) == failure_of(cause)


def test_a_full_disk_under_safetensors_is_understood() -> None:
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert failure_of(error) == failure_of(OSError(errno.ENOSPC, "full"))


def out_of_memory() -> BaseException:
    """What torch raises on the CPU."""
    try:
        torch.empty(2**60)
    except RuntimeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
            "The device ran out of memory.",
        ),
        (MemoryError(), "This machine ran out of memory."),
        (out_of_memory(), "This machine ran out of memory."),
    ],
)
def test_out_of_memory_is_a_sentence_with_a_way_out(error: BaseException, words: str) -> None:
    failure = failure_of(error)
    assert failure is not None
    assert failure.message == words
    assert "micro_batch" in (failure.hint or "")


def test_the_table_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = {kind.strip(): int(code) for kind, code in re.findall(r"^\| ([a-z][^|]+) \| (\d+) \|", page, re.M)}
    assert {kind.name: kind.code for kind in KINDS}.items() <= rows.items()
    assert {"a bug": 1, "a signal": 130}.items() <= rows.items()
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \|", page, re.M)


def test_our_own_errors_keep_their_words() -> None:
    error = AnyflowError("It broke.", "Mend it.")
    assert failure_of(error) == Failure("It broke.", "Mend it.", 1)
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert failure_of(error) == Failure("It broke.", "Mend it.", 1)
    assert failure_of(UsageError("Not so.")) == Failure("Not so.", None, 2)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shape"), FileNotFoundError(2, "gone", "a")])
def test_a_bug_is_no_failure(error: Exception) -> None:
    assert failure_of(error) is None
