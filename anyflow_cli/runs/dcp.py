"""Sharded checkpoints through ``torch.distributed.checkpoint``: each process writes its part.

Any number of processes can read them. They are in the folder ``shards`` of a checkpoint, in place of the
tensors' files. Keys are ``part/name``,
where a part is a role, ``ema``, or ``optimiser-ROLE`` with number of the parameter and name of the moment.
torch pickles the metadata and unpickles whatever is there; here only the classes of metadata are.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from anyflow_cli.errors import system_errors
from anyflow_cli.utils.files import safe_child
from anyflow_cli.utils.records import read_bytes

SHARDS = "shards"
OPTIMIZER_PART = "optimiser-"
METADATA = ".metadata"
METADATA_CLASSES = {  # module -> what torch's pickles of metadata name, besides types of tensors
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties",
        "TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # of Python 3.13
}  # fmt: skip
Tensors = Mapping[str, Mapping[str, Tensor]]
Optimizers = Mapping[str, Mapping[str, Any]]


class _MetadataUnpickler(pickle.Unpickler):
    """Finds the classes of metadata alone, so that nothing in a pickle is executed."""

    def find_class(self, module: str, name: str) -> Any:
        """Find a class of metadata or a type of tensors; some Pythons name members of enums by getattr."""
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"its {METADATA} names {module}.{name}, which is not executed")
        return super().find_class(module, name)


def _enum_member(owner: Any, name: str) -> Enum:
    """A member of an enum, and nothing else that getattr would give."""
    if not (isinstance(owner, type) and issubclass(owner, Enum)):
        raise pickle.UnpicklingError(f"its {METADATA} names builtins.getattr, which is not executed")
    return owner[name]


class ShardReader(FileSystemReader):
    """Reads files of its folder alone, and metadata without executing anything."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read what the shards hold; every file must be a regular one inside the folder."""
        folder = Path(self.path)
        metadata = _MetadataUnpickler(io.BytesIO(read_bytes(folder / METADATA))).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"its {METADATA} holds something else")
        for name in {info.relative_path for info in metadata.storage_data.values()}:
            if not safe_child(folder, name).is_file():
                raise ValueError(f"{name} is missing or not a regular file")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def flattened(tensors: Tensors, optimizers: Optimizers) -> dict[str, Tensor]:
    """Put all tensors into one dictionary; the optimizers' settings are stored elsewhere."""
    flat = {f"{part}/{name}": value for part, named in tensors.items() for name, value in named.items()}
    for phase, state in optimizers.items():
        for number, moments in state["state"].items():
            flat |= {f"{OPTIMIZER_PART}{phase}/{number}/{key}": value for key, value in moments.items()}
    return flat


def read(folder: Path, like: Mapping[str, Tensor] | None = None, part: str = "") -> dict[str, Tensor]:
    """Read the tensors whose keys begin with ``part``: those in ``like`` sharded as there, others on the CPU.

    With ``like``, all processes read together.
    """
    reader = ShardReader(folder / SHARDS)
    found = {key: _empty(entry, (like or {}).get(key)) for key, entry in _entries(reader, part).items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        load(found, storage_reader=reader, no_dist=like is None)
    return found


def shard_keys(folder: Path, part: str = "") -> list[str]:
    """Keys of the tensors that ``read`` returns, from the metadata alone."""
    return list(_entries(ShardReader(folder / SHARDS), part))


def _entries(reader: FileSystemReader, part: str) -> dict[str, TensorStorageMetadata]:
    found = reader.read_metadata().state_dict_metadata.items()
    return {key: e for key, e in found if key.startswith(part) and isinstance(e, TensorStorageMetadata)}


def reason(error: BaseException) -> BaseException:
    """The error behind an error: the first of several processes' failures, and the system's cause of it."""
    first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return next(system_errors(first), first)


def _empty(entry: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype) if like is None else torch.empty_like(like)


def unflattened(flat: Mapping[str, Tensor], groups: Mapping[str, Any]) -> tuple[Tensors, Optimizers]:
    """Undo ``flattened``; ``groups`` are the optimizers' settings by role."""
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
