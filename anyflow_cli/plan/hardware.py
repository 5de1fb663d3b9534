"""The machine of a plan: GPUs, their memory, and their dense bf16 peaks from NVIDIA's data sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.units import GIB
from anyflow_cli.utils.user_text import shortened

# Assumed to be lost on a GPU to the driver, cuBLAS, NCCL and fragmentation; in the host's memory, to the
# system and to Python.
RESERVE = 3 * GIB
GPUS = {  # name: memory in GiB as sold, dense bf16 TFLOPS
    "A100": (80, 312), "H100": (80, 989), "H200": (141, 989), "B200": (180, 2250), "L40S": (48, 362),
    "RTX4090": (24, 165),
}  # fmt: skip
# Bytes per second between host and device, assumed for 16 lanes of PCIe 4.0: from pinned memory, from other.
PINNED_LINK, PAGEABLE_LINK = 20e9, 6e9
REFERENCE = "H100"  # whose speed a plan takes where only the memory is given
GPUS_FORMAT = r"(\d{1,6})\s*x\s*(?:(\d{1,6}(?:\.\d{1,6})?)\s*GB|([a-z]\w*))"
HINT = f"Write --gpus 8x80GB, or a number and one of {', '.join(GPUS)}: --gpus 8xH100."


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind: GPUs, or one CPU."""

    count: int
    memory: int  # bytes per device
    peak: float | None  # FLOPs per second and device; None where it is unknown (a CPU)
    mfu: float = 0.4  # model FLOPs utilization
    is_gpu: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)  # measured FLOPs per second, by stage of a plan
    host: int | None = None  # bytes of the machine's own memory; None where it is unknown

    @property
    def usable(self) -> int:
        """Bytes per device that a process may fill with tensors."""
        return self.memory - RESERVE if self.is_gpu else self.memory

    @property
    def usable_host(self) -> float:
        """Bytes of the machine's own memory that its processes may fill with weights."""
        return float("inf") if self.host is None else self.host - RESERVE

    def seconds(self, flops: float, stage: str = "") -> float | None:
        """Time that one device takes for the work of a stage, at its measured speed where there is one."""
        rate = self.rates.get(stage) or (self.peak and self.peak * self.mfu)
        return flops / rate if rate else None

    def __str__(self) -> str:
        """As in ``--gpus``."""
        memory = f"{self.memory / GIB:.3g} GB"
        return f"{self.count} x {memory}" if self.is_gpu else f"CPU with {memory}"


def parse_hardware(text: str, teraflops: float | None = None, mfu: float = Hardware.mfu) -> Hardware:
    """Read ``8x80GB`` or ``8xH100``; ``teraflops`` replaces the GPU's peak."""
    match = re.fullmatch(GPUS_FORMAT, text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{shortened(ascii(text))} is not a value of --gpus.", HINT)
    name = (match[3] or REFERENCE).upper()
    if name not in GPUS:
        raise UsageError(f"{shortened(match[3])} is not a GPU that --gpus knows.", HINT)
    memory, peak = GPUS[name]
    size = float(match[2]) if match[2] else memory
    if size * GIB <= RESERVE:
        raise UsageError(
            f"A GPU of {size:g} GB is too small: driver and libraries take {RESERVE // GIB} GB of it.", HINT
        )
    return Hardware(int(match[1]), int(size * GIB), 1e12 * (teraflops or peak), mfu)


def this_machine(teraflops: float | None = None, mfu: float = Hardware.mfu) -> Hardware:
    """The GPUs of this machine, or its CPU, whose peak is unknown."""
    import psutil
    import torch

    peak, host = teraflops and 1e12 * teraflops, int(psutil.virtual_memory().total)
    if not torch.cuda.is_available():
        return Hardware(1, host, peak, mfu, is_gpu=False)
    properties = torch.cuda.get_device_properties(0)
    label = properties.name.upper().replace(" ", "")
    known = next((1e12 * speed for name, (_, speed) in GPUS.items() if name in label), None)
    return Hardware(torch.cuda.device_count(), properties.total_memory, peak or known, mfu, host=host)
