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
OPTIMIZER_PART = "optimiser-"
Tensors = Mapping[str, Mapping[str, Tensor]]
Optimizers = Mapping[str, Mapping[str, Any]]


def flattened(tensors: Tensors, optimizers: Optimizers) -> dict[str, Tensor]:
    """One dictionary of all tensors; the optimizers' settings follow from the recipe and the step."""
    flat = {f"{part}/{name}": value for part, named in tensors.items() for name, value in named.items()}
    for phase, state in optimizers.items():
        for number, moments in state["state"].items():
            flat |= {f"{OPTIMIZER_PART}{phase}/{number}/{key}": value for key, value in moments.items()}
    return flat


def read(folder: Path, like: Mapping[str, Tensor] | None = None, part: str = "") -> dict[str, Tensor]:
    """The tensors whose keys begin with ``part``, divided as those in ``like``, else whole on the CPU.

    With ``like``, all processes read together.
    """
    reader = FileSystemReader(folder / SHARDS)
    found = {key: _empty(entry, (like or {}).get(key)) for key, entry in _entries(reader, part).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
        load(found, storage_reader=reader, no_dist=like is None)
    return found


def shard_keys(folder: Path, part: str = "") -> list[str]:
    """Keys of the tensors that ``read`` returns, from the metadata alone."""
    return list(_entries(FileSystemReader(folder / SHARDS), part))


def _entries(reader: FileSystemReader, part: str) -> dict[str, TensorStorageMetadata]:
    found = reader.read_metadata().state_dict_metadata.items()
    return {key: e for key, e in found if key.startswith(part) and isinstance(e, TensorStorageMetadata)}


def reason(error: BaseException) -> BaseException:
    """Of several processes' failures to read or write the first; of that what the system said, if it did."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return next(system_errors(first), first)


def _empty(entry: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype) if like is None else torch.empty_like(like)


def unflattened(flat: Mapping[str, Tensor], groups: Mapping[str, Any]) -> tuple[Tensors, Optimizers]:
    """What ``flattened`` was given; ``groups`` are the optimizers' settings by phase."""
    tensors: dict[str, dict[str, Tensor]] = {}
    optimizers: dict[str, dict[str, Any]] = {
        phase: {"state": {}, "param_groups": settings} for phase, settings in groups.items()
    }
    for key, value in flat.items():
        part, _, name = key.partition("/")
        if part.startswith(OPTIMIZER_PART):
            number, _, kept = name.partition("/")
            state = optimizers[part.removeprefix(OPTIMIZER_PART)]["state"]
            state.setdefault(int(number), {})[kept] = value
        else:
            tensors.setdefault(part, {})[name] = value
    return tensors, optimizers
