"""Processes of one command: forming their group."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = """
import sys
from anyflow_cli.utils.distributed import join_group
from anyflow_cli.utils.signals import interruptible
import torch.distributed
with interruptible():
    print("waits", flush=True)
    join_group()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_waits_for_the_others_can_be_ended(number: signal.Signals) -> None:
    """The others may have been ended by the same signal; the wait runs no handler of Python's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **group, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)  # it waits for process 1
        process.send_signal(number)
        assert process.wait(30) == -number
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
