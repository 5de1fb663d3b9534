"""``--nproc N``: the same command again, as N processes of this machine.

torchrun starts them, through its own entry point; so ``torchrun``, ``accelerate launch`` and ``--nproc`` are
three ways to the same processes, which learn from the environment that they are several.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from anyflow_cli.errors import AnyflowError
from anyflow_cli.utils.distributed import is_launched

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import LaunchSection

SHUTDOWN_SECONDS = 600  # seconds that processes asked to stop have for their step and their checkpoint
AGAIN = "Start the same command again: it continues from the last checkpoint."

command_line: ContextVar[Sequence[str]] = ContextVar("command_line")  # arguments; ``app.main`` sets them


def start_processes(launch: LaunchSection) -> bool:
    """Run this command as several processes; False if it is one of them already, or is to run alone."""
    if is_launched():
        return False
    count = launch.processes or _gpus()
    if count == 1:
        return False
    _run(count, command_line.get())
    return True


def _gpus() -> int:
    import torch

    return max(torch.cuda.device_count(), 1)


def _run(count: int, arguments: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # each process speaks for itself
    given = ["--standalone", "--nproc-per-node", str(count), "-m", "anyflow_cli"]
    options = parse_args(given)  # type: ignore[no-untyped-call]
    options.training_script_args = list(arguments)  # its parser would take our --nproc for one of its own
    try:
        run(options)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _report(*error.get_first_failure())
    except SignalException as error:
        raise KeyboardInterrupt from error


def _report(rank: int, failure: Any) -> NoReturn:
    """End as the process did that failed first; it has said why, unless it was killed."""
    if failure.exitcode > 0:
        raise SystemExit(failure.exitcode) from None
    name = signal.Signals(-failure.exitcode).name
    raise AnyflowError(f"Process {rank} was ended by {name}, and the others with it.", AGAIN) from None
