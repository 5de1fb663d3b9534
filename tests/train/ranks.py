"""Several gloo processes on this CPU, each running the same function of its rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

PATIENCE = 600  # seconds; processes whose group never forms would wait for ever


def start(ranks: int, function: Callable[..., None], *arguments: Any, machines: int = 1) -> list[int | None]:
    """Run ``function(*arguments)`` in ``ranks`` processes, on pretended machines; their exit codes.

    Those that outlive ``PATIENCE`` are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    places = [(rank, ranks, ranks // machines, port) for rank in range(ranks)]
    all_of_them = [context.Process(target=_process, args=(place, function, arguments)) for place in places]
    for one in all_of_them:
        one.start()
    for one in all_of_them:
        one.join(PATIENCE)
        one.kill()
        one.join()
    return [one.exitcode for one in all_of_them]


def _process(place: tuple[int, ...], function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    os.environ |= {name: str(value) for name, value in zip(names, place, strict=True)}
    os.environ |= {"LOCAL_RANK": str(place[0] % place[2]), "MASTER_ADDR": "127.0.0.1"}
    function(*arguments)
    torch.distributed.destroy_process_group()
