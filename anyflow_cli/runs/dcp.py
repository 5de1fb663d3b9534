"""The state of a sharded run on disk: each process writes its own part, any number of processes reads it.

``torch.distributed.checkpoint`` in the folder ``shards`` of a checkpoint, instead of the files of an
unsharded one. Keys are ``part/name``: the weights of a phase, ``ema``, and ``optimiser-PHASE`` with the
number of the parameter and what AdamW keeps of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from anyflow_cli.errors import system_errors

SHARDS = "shards"
OPTIMISER = "optimiser-"
Tensors = Mapping[str, Mapping[str, Tensor]]
Optimisers = Mapping[str, Mapping[str, Any]]


def flattened(tensors: Tensors, optimisers: Optimisers) -> dict[str, Tensor]:
    """One dictionary of all tensors; the optimisers' settings follow from the recipe and the step."""
    flat = {f"{part}/{name}": value for part, named in tensors.items() for name, value in named.items()}
    for phase, state in optimisers.items():
        for number, moments in state["state"].items():
            flat |= {f"{OPTIMISER}{phase}/{number}/{key}": value for key, value in moments.items()}
    return flat


def read(folder: Path, like: Mapping[str, Tensor] | None = None, part: str = "") -> dict[str, Tensor]:
    """The tensors whose keys begin with ``part``, divided as those in ``like``, else whole on the CPU.

    With ``like``, all processes read together.
    """
    reader = FileSystemReader(folder / SHARDS)
    found = {
        key: _empty(entry, (like or {}).get(key))
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(part) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        load(found, storage_reader=reader, no_dist=like is None)
    return found


def reason(error: BaseException) -> BaseException:
    """Of several processes' failures to read or write the first; of that what the system said, if it did."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return next(system_errors(first), first)


def _empty(entry: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype) if like is None else torch.empty_like(like)


def unflattened(flat: Mapping[str, Tensor], groups: Mapping[str, Any]) -> tuple[Tensors, Optimisers]:
    """What ``flattened`` was given; ``groups`` are the optimisers' settings by phase."""
    tensors: dict[str, dict[str, Tensor]] = {}
    optimisers: dict[str, dict[str, Any]] = {
        phase: {"state": {}, "param_groups": settings} for phase, settings in groups.items()
    }
    for key, value in flat.items():
        part, _, name = key.partition("/")
        if part.startswith(OPTIMISER):
            number, _, kept = name.partition("/")
            state = optimisers[part.removeprefix(OPTIMISER)]["state"]
            state.setdefault(int(number), {})[kept] = value
        else:
            tensors.setdefault(part, {})[name] = value
    return tensors, optimisers
