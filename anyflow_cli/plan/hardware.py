"""The machine a plan is for: how many GPUs, how much each holds, how fast each multiplies.

Peaks are dense bf16 without sparsity, from NVIDIA's data sheets. What a process cannot use of its GPU (the
driver's context, cuBLAS and NCCL buffers, gaps between blocks) is an assumption, stated as ``RESERVE``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.units import GIB

RESERVE = 3 * GIB
UTILISATION = 0.4

# name: memory in GiB as sold, dense bf16 TFLOPS
GPUS = {
    "A100": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
    "L40S": (48, 362),
    "RTX4090": (24, 165),
}
REFERENCE = "H100"  # whose peak a plan takes where only the memory is said
HINT = f"Write --gpus 8x80GB, or a number and one of {', '.join(GPUS)}: --gpus 8xH100."


@dataclass(frozen=True)
class Hardware:
    """``peak``: floating-point operations a second and GPU; None where it is not known (a CPU)."""

    count: int
    memory: int  # bytes a device
    peak: float | None
    utilisation: float = UTILISATION
    is_gpu: bool = True

    @property
    def usable(self) -> int:
        """Bytes a process may fill with tensors."""
        return self.memory - RESERVE if self.is_gpu else self.memory

    def seconds(self, operations: float) -> float | None:
        """How long a device takes for so many operations."""
        return None if self.peak is None else operations / (self.peak * self.utilisation)

    def __str__(self) -> str:
        """As people say it."""
        memory = f"{self.memory / GIB:.3g} GB"
        return f"{self.count} x {memory}" if self.is_gpu else f"CPU with {memory}"


def parse_hardware(text: str, teraflops: float | None = None, utilisation: float = UTILISATION) -> Hardware:
    """Read ``8x80GB`` or ``8xH100``; ``teraflops`` replaces the peak that goes with it."""
    match = re.fullmatch(r"(\d+)\s*x\s*(?:(\d+(?:\.\d+)?)\s*GB|([A-Za-z]\w*))", text.strip(), re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--gpus does not understand {text!r}.", HINT)
    name = (match[3] or REFERENCE).upper()
    if name not in GPUS:
        raise UsageError(f"--gpus does not know a GPU named {match[3]}.", HINT)
    memory, peak = GPUS[name]
    size = float(match[2]) if match[2] else memory
    return Hardware(int(match[1]), int(size * GIB), 1e12 * (teraflops or peak), utilisation)


def this_machine(teraflops: float | None = None, utilisation: float = UTILISATION) -> Hardware:
    """The GPUs of this machine, or its CPU, whose peak nobody states."""
    import psutil
    import torch

    peak = teraflops and 1e12 * teraflops
    if not torch.cuda.is_available():
        return Hardware(1, int(psutil.virtual_memory().total), peak, utilisation, is_gpu=False)
    properties = torch.cuda.get_device_properties(0)
    label = properties.name.upper().replace(" ", "")
    known = next((1e12 * tera for name, (_, tera) in GPUS.items() if name in label), None)
    return Hardware(torch.cuda.device_count(), properties.total_memory, peak or known, utilisation)
