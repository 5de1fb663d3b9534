"""What a machine reaches: the speed of a matrix product and of a copy, and seconds of calls."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from anyflow_cli.model.precision import Precision

MATRIX = {"cuda": 8192, "cpu": 2048}  # rows and columns, enough to be limited by arithmetic
COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes, larger than any cache
SPEED_REPEATS = 5
CallKey = TypeVar("CallKey")


@dataclass(frozen=True)
class MachineSpeed:
    """A device and the speeds that it reaches; the floor of everything else.

    Attributes:
        device: Its name.
        threads: Threads of a CPU; of a GPU 0.
        flops: FLOPs per second of a matrix product in the type that the networks compute in.
        bandwidth: Bytes per second that a copy reads and writes.
    """

    device: str
    threads: int
    flops: float
    bandwidth: float

    def floor(self, flops: float, size: float = 0.0) -> float:
        """Least seconds for so many FLOPs and bytes: arithmetic and memory can overlap, so the longer."""
        return max(flops / self.flops, size / self.bandwidth)


def machine_speed(device: torch.device, precision: Precision) -> MachineSpeed:
    """Measure this machine."""
    kind, dtype = device.type, torch.bfloat16 if precision == "bf16" else torch.float32
    side = MATRIX[kind]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(COPIED[kind], dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    seconds = interleaved(
        {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, SPEED_REPEATS, device
    )
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or "CPU"
    threads = 0 if kind == "cuda" else torch.get_num_threads()
    return MachineSpeed(name, threads, 2 * side**3 / seconds["product"], 2 * COPIED[kind] / seconds["copy"])


def interleaved(
    calls: Mapping[CallKey, Callable[[], object]], repeats: int, device: torch.device
) -> dict[CallKey, float]:
    """Median seconds of each call, run in turn, so that a machine that slows down slows all; one warm-up."""
    seconds: dict[CallKey, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, call in calls.items():
            synchronize(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if repeat:
                seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
