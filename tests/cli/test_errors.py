"""Which exceptions become which sentence and code; a bug is none of them."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from anyflow_cli.cli.errors import DISK, Failure, failure_of
from anyflow_cli.errors import AnyflowError


@pytest.mark.parametrize("code", list(DISK))
def test_the_disk_names_the_file(code: int) -> None:
    failure = failure_of(OSError(code, "words of the system", "some/file"))
    assert failure
    assert failure.code == (2 if code in (errno.ENOSPC, errno.EDQUOT) else 1)
    assert failure.hint
    assert "some/file" in failure.message
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


def test_out_of_memory_has_a_way_out() -> None:
    failure = failure_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."))
    assert failure
    assert "micro_batch" in (failure.hint or "")


def test_our_own_errors_keep_their_words() -> None:
    error = AnyflowError("It broke.", "Mend it.")
    assert failure_of(error) == Failure("It broke.", "Mend it.", 1)
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert failure_of(error) == Failure("It broke.", "Mend it.", 2)


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shape"), FileNotFoundError(2, "gone", "a")])
def test_a_bug_is_no_failure(error: Exception) -> None:
    assert failure_of(error) is None
