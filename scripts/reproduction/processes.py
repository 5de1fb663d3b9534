"""Processes that start with everything imported: workers that share the cells, and commands of anyflow.

They are forked from a server that has imported the packages and never touched a device, since CUDA does not
survive a fork. A command starts at once instead of after seconds of imports, several hundred times.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from anyflow_cli.cli.app import main

# Otherwise torch.cuda.is_available(), which diffusers calls, prevents CUDA in forked processes.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "anyflow_cli.cli.app", "anyflow_cli.train.trainer", "anyflow_cli.train.stages",
    "anyflow_cli.evaluate.run", "anyflow_cli.plan.steps", "anyflow_cli.sample.sampler",
    "anyflow_cli.synthesize.run",
    "anyflow_cli.evaluate.shapes.suite", "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.transformers.transformer_wan", "transformers.models.umt5.modeling_umt5",
    "transformers.models.t5.tokenization_t5", "torch._dynamo", "tensorboard",
])  # fmt: skip
log = logging.getLogger(__name__)


def run(words: Sequence[str]) -> float:
    """Run a command of anyflow and return its processor seconds.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    log.info("%s", " ".join(words))
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_command, args=(list(words[1:]), theirs))
    with _running([process]):
        theirs.close()
        try:
            seconds = float(ours.recv())
        except EOFError:
            seconds = 0.0
    if process.exitcode:
        raise subprocess.CalledProcessError(process.exitcode, list(words))
    return seconds


def share(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Let ``count`` processes do the same work, which they divide among themselves."""
    workers = [SERVER.Process(target=work, args=arguments) for _ in range(count)]
    with _running(workers):
        pass
    if any(worker.exitcode for worker in workers):
        raise SystemExit(1)


@contextmanager
def _running(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Run processes until they end, or end them where this process is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _command(arguments: list[str], seconds: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    code = main(arguments)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds.send(sum(one.ru_utime + one.ru_stime for one in used))
    sys.exit(code)
