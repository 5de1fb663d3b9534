"""``--nproc N``: the same command, run as N processes of this machine.

torchrun starts them, through its own entry point. So ``torchrun``, ``accelerate launch`` and ``--nproc`` lead
to the same processes, which find their rank in the environment.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.distributed import is_launched, world_size
from anyflow_cli.utils.signals import stop_signals

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import LaunchSection

SHUTDOWN_SECONDS = 600  # that processes have after a signal for their step and their checkpoint
AGAIN = "Start the same command again: it continues from the last checkpoint."

command_line: ContextVar[Sequence[str]] = ContextVar("command_line")  # arguments; ``app.main`` sets them


def start_processes(launch: LaunchSection, before: Callable[[], None] | None = None) -> bool:
    """Run this command as several processes, and ``before`` first.

    Returns False, and does nothing, if this process is one of several already or is to run alone.
    """
    if is_launched():
        return False
    count = launch.processes or _gpus()
    if count == 1:
        return False
    if before is not None:
        before()
    _run(count, command_line.get())
    return True


def count_processes(launch: LaunchSection) -> int:
    """How many processes run a command; refuses those that form no groups of ``launch.context_parallel``."""
    count = world_size() if is_launched() else launch.processes or _gpus()
    shared = launch.context_parallel or 1
    if count % shared:
        raise UsageError(
            f"launch.context_parallel is {shared}, and {count} process{'es do' if count > 1 else ' does'} "
            f"not form groups of {shared}.",
            f"Start a multiple of {shared} processes with --nproc, or set launch.context_parallel=null.",
            everywhere=True,
        )
    return count


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def _run(count: int, arguments: Sequence[str]) -> None:
    """Start the processes through torchrun, and pass on every signal that asks for the end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    # each process reports for itself
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    given = ["--standalone", "--nproc-per-node", str(count), "-m", "anyflow_cli"]
    options = parse_args(given)  # type: ignore[no-untyped-call]
    # those that it passes on: with SIGUSR1, and without an ignored SIGHUP
    options.signals_to_handle = ",".join(one.name for one in (*stop_signals(), signal.SIGQUIT))
    options.training_script_args = list(arguments)  # torchrun's parser would take --nproc as its own
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _report(*error.get_first_failure())
    except SignalException as error:
        raise KeyboardInterrupt from error


def _report(rank: int, failure: Any) -> NoReturn:
    """End as the process did that failed first; it has printed why, unless it was killed."""
    if failure.exitcode > 0:
        raise SystemExit(failure.exitcode) from None
    name = signal.Signals(-failure.exitcode).name
    raise AnyflowError(f"Process {rank} was ended by {name}, and the others with it.", AGAIN) from None
