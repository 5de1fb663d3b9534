"""Which of several processes this one is, as torchrun, accelerate or a cluster's script has set it.

It is read from the environment, so it is known before torch is imported or a process group is formed.
``utils.environment`` refuses values that are not numbers; here they count as absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.signals import fatal_signals

if TYPE_CHECKING:
    import torch

Shared = TypeVar("Shared")
# How long processes wait for one that samples or saves: longer than NCCL's default of ten minutes. A process
# that dies is noticed at once, by its launcher.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def rank() -> int:
    """Number of this process among all, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return _number("LOCAL_RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default


def is_launched() -> bool:
    """Whether a launcher has started this process as one of a group, which may have one member."""
    return "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this is the process that logs and writes for all."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the group of processes at the end of the block, if one was formed.

    Otherwise the interpreter's end may abort a process whose work is done. After an error that not all
    processes raise, the others cannot be waited for.
    """
    try:
        yield
    except AnyflowError as error:
        if error.everywhere:
            _leave_group()
        raise
    _leave_group()


def join_group() -> None:
    """Form the group of all processes, if there are several and no one has."""
    import torch
    from torch import distributed

    if world_size() > 1 and not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with fatal_signals():  # the others may have been ended
            distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)


def from_first(value: Shared, group: torch.distributed.ProcessGroup | None = None) -> Shared:
    """The value of the first process of a group, on all of them; None is all processes."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values, group_src=0, group=group, device=torch.device("cpu"))
    return values[0]


def computed_by_first(
    compute: Callable[[], Shared], group: torch.distributed.ProcessGroup | None = None
) -> Shared:
    """What the first process of a group computes, on all of them, which also share its failure.

    Raises:
        AnyflowError: The first process raised it; only that one prints it.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return compute()
    found: list[Shared] = []
    error: AnyflowError | None = None
    if distributed.get_rank(group) == 0:
        try:
            found.append(compute())
        except AnyflowError as raised:
            error = raised
    failure = None if error is None else (error.exit_code, error.message, error.hint)
    found, failure = from_first((found, failure), group)
    if error is not None:
        raise error
    if failure is not None:
        code, message, hint = failure
        kind = UsageError if code == UsageError.exit_code else AnyflowError
        raise kind(message, hint, everywhere=True)
    return found[0]


def from_all(value: Shared) -> list[Shared]:
    """The values of all processes in order, on each of them."""
    from torch import distributed

    if not distributed.is_initialized():
        return [value]
    found: list[Shared | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def _leave_group() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def default_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
