"""Which of several processes this one is, as torchrun, accelerate or a cluster's script has set it.

Read from the environment, so that it is known before torch is imported or a process group is formed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_launched() -> bool:
    """Whether a launcher has started this process as one of a group, which may have one member."""
    return "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this is the process that logs and writes for all."""
    return rank() == 0


def default_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
