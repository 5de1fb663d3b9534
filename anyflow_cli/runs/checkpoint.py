"""Checkpoints of a training run on disk: written completely or not at all, and found again.

A checkpoint is a folder ``step-000500`` of safetensors (trained weights by role, and their average ``ema``),
optimizer states (``torch.save``, read with ``weights_only``) and ``state.json``. A sharded run has ``shards``
in place of the tensors' files (``runs.dcp``). The folder is written under a temporary name, flushed to the
disk, marked ``COMPLETE`` and renamed, in this order, so a kill at any moment leaves either the previous set
of checkpoints or the new one.

Only folders of exactly these names are read, counted or removed, and of a folder only the files of a
checkpoint are removed. ``step-000500-backup`` and ``step-best`` belong to the user.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs import dcp
from anyflow_cli.runs.dcp import SHARDS
from anyflow_cli.utils.files import flush, safe_child
from anyflow_cli.utils.records import read_record

AVERAGE, STATE, MARKER = "ema", "state.json", "COMPLETE"
CHECKPOINT_FORMAT = 1  # raise it when an older program could not read what this one writes
NAME = re.compile(r"step-(\d{6,})")
PARTIAL_NAME = re.compile(r"\.step-\d{6,}\.partial")
OWN_FILE = re.compile(rf"{re.escape(STATE)}|optimiser-\w+\.pt|\w+\.safetensors")
DAMAGED = "Remove that folder; the same command then continues from the previous one."


@dataclass(frozen=True)
class AlarmState:
    """What the alarms know of a run: see ``train.alarms``."""

    norm: float | None
    fake: float | None
    since: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class LoopState:
    """What the training loop knows beyond its tensors.

    Attributes:
        sums: Sum and count of each value since the last row of the metrics.
        steps: Steps since that row.
        alarms: State of the alarms; None in the first checkpoints of version 0.1.
        rollbacks: Number of roll-backs so far.
    """

    sums: dict[str, tuple[float, int]]
    steps: int
    alarms: AlarmState | None = None
    rollbacks: int = 0


@dataclass(frozen=True)
class CheckpointState:
    """Everything a run needs to continue as if it had not stopped."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # trained weights by role, and their average
    optimizers: Mapping[str, Mapping[str, Any]]  # state dict by role
    loop: LoopState


@dataclass(frozen=True)
class StateRecord:
    """Content of ``state.json``."""

    format: int
    step: int
    tensors: list[str]
    optimisers: list[str]
    extra: LoopState
    optimiser_settings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


# --- finding


def complete(directory: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    found = [path for path in directory.glob("step-*") if _has_own_name(path) and (path / MARKER).is_file()]
    return sorted(found, key=checkpoint_step)


def newest(directory: Path) -> Path | None:
    """The checkpoint that a run continues from."""
    found = complete(directory)
    return found[-1] if found else None


def checkpoint_step(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.rpartition("-")[2])


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is the state of a training run at one step, rather than a model."""
    return (path / STATE).is_file()


def _has_own_name(path: Path) -> bool:
    """Whether a path has exactly the name that its step gives a checkpoint."""
    match = NAME.fullmatch(path.name)
    return match is not None and path.name == _name(int(match[1]))


def _name(step: int) -> str:
    return f"step-{step:06d}"


# --- writing


def save(directory: Path, state: CheckpointState, keep: int) -> Path:
    """Write ``directory/step-...``, then remove all but the newest ``keep``.

    A failure leaves the older ones untouched.
    """
    with writing(directory, state.step) as partial:
        begin(partial)
        for name, tensors in state.tensors.items():
            stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(stored, partial / f"{name}.safetensors")
        for name, optimizer in state.optimizers.items():
            with (partial / f"optimiser-{name}.pt").open("wb") as file:  # torch's own reports no OSError
                torch.save(optimizer, file)
        return commit(partial, state, keep)


@contextmanager
def writing(directory: Path, step: int) -> Iterator[Path]:
    """Give the temporary folder of a checkpoint; on a failure, remove it and raise a sentence."""
    partial = directory / f".{_name(step)}.partial"
    try:
        yield partial
    # torch and safetensors report a full disk by errors of their own, caused by the system's
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = dcp.reason(error)
        words = reason.strerror if isinstance(reason, OSError) else reason
        raise AnyflowError(
            f"The checkpoint of step {step} could not be written to {directory}: {words}.",
            "Free space or fix the permissions there, then start the same command again: it continues.",
            everywhere=isinstance(error, CheckpointException),
        ) from error


def begin(partial: Path) -> None:
    """Create the temporary folder, and remove what kills left of others."""
    directory = partial.parent
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if PARTIAL_NAME.fullmatch(path.name):
            shutil.rmtree(path)
        elif _has_own_name(path) and not (path / MARKER).exists():
            _discard(path)
    partial.mkdir()


def commit(partial: Path, state: CheckpointState, keep: int) -> Path:
    """Complete a checkpoint: describe it, mark it, give it its name; remove all but the newest ``keep``."""
    directory = partial.parent
    record = StateRecord(
        format=CHECKPOINT_FORMAT,
        step=state.step,
        tensors=list(state.tensors),
        optimisers=list(state.optimizers),
        optimiser_settings={name: one["param_groups"] for name, one in state.optimizers.items()},
        extra=state.loop,
    )
    (partial / STATE).write_text(json.dumps(asdict(record), indent=1))
    for path in partial.iterdir():
        flush(path)  # a folder too: its entries
    (partial / MARKER).touch()
    flush(partial)
    target = directory / _name(state.step)
    if target.exists():
        raise AnyflowError(
            f"{target} holds files that are not of a checkpoint, so step {state.step} cannot be saved there.",
            "Move that folder away, then start the same command again: it continues.",
        )
    partial.rename(target)
    flush(directory)
    for old in complete(directory)[:-keep]:
        _discard(old)
    return target


def discard_after(path: Path) -> None:
    """Remove the checkpoints newer than one, so that the run continues from it."""
    for newer in complete(path.parent):
        if checkpoint_step(newer) > checkpoint_step(path):
            _discard(newer)


def _discard(path: Path) -> None:
    """Remove the files of a checkpoint, its marker first, so that what a kill leaves is not complete."""
    if path.is_symlink():
        return
    (path / MARKER).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name == SHARDS:
            shutil.rmtree(entry)
        elif OWN_FILE.fullmatch(entry.name):
            entry.unlink()
    with suppress(OSError):  # not empty: someone keeps files of their own there
        path.rmdir()


# --- reading


def load(path: Path, like: Mapping[str, Tensor] | None = None) -> CheckpointState:
    """Read a checkpoint: tensors named in ``like`` sharded as there, all others whole on the CPU."""
    with readable(path, DAMAGED):
        record = read_state(path)
        if (path / SHARDS).is_dir():
            tensors, optimizers = dcp.unflattened(dcp.read(path, like), record.optimiser_settings)
        else:
            tensors = {name: load_file(_stored(path, f"{name}.safetensors")) for name in record.tensors}
            optimizers = {
                name: torch.load(_stored(path, f"optimiser-{name}.pt"), map_location="cpu", weights_only=True)
                for name in record.optimisers
            }
        return CheckpointState(record.step, tensors, optimizers, record.extra)


def _stored(checkpoint: Path, name: str) -> Path:
    """A file of a checkpoint; the reading of a pipe would never end."""
    path = safe_child(checkpoint, name)
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} is not a regular file")
    return path


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The moving average of what a run trains: whole weights, or ``...lora_A.weight`` of its adapters."""
    with readable(checkpoint):
        read_state(checkpoint)
        if (checkpoint / SHARDS).is_dir():
            found = dcp.read(checkpoint, part=f"{AVERAGE}/")
            return {key.partition("/")[2]: value for key, value in found.items()}
        return load_file(_stored(checkpoint, f"{AVERAGE}.safetensors"))


def trained_names(checkpoint: Path) -> list[str]:
    """Names of ``trained_weights``, read from the headers alone."""
    with readable(checkpoint):
        read_state(checkpoint)
        if (checkpoint / SHARDS).is_dir():
            return [key.partition("/")[2] for key in dcp.shard_keys(checkpoint, part=f"{AVERAGE}/")]
        with safe_open(_stored(checkpoint, f"{AVERAGE}.safetensors"), framework="pt") as file:
            return list(file.keys())


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that ``trained_weights`` reads."""
    return sorted(checkpoint.glob(f"{SHARDS}/*.distcp")) or [checkpoint / f"{AVERAGE}.safetensors"]


def read_state(checkpoint: Path) -> StateRecord:
    """Read what a checkpoint states of itself; one of a newer program is refused."""
    path = checkpoint / STATE
    if read_record(path, _Format, DAMAGED).format > CHECKPOINT_FORMAT:
        raise UsageError(
            f"{checkpoint} was written by a newer anyflow.",
            "Update it: pip install -U anyflow.",
            everywhere=True,
        )
    return read_record(path, StateRecord, DAMAGED)


@dataclass(frozen=True)
class _Format:
    format: int


@contextmanager
def readable(checkpoint: Path, hint: str = "Use another one of the same run.") -> Iterator[None]:
    """Name a checkpoint whose content cannot be read or does not fit.

    Damaged files make torch and safetensors raise almost any exception. A file without read permission is
    not damaged, and is named as such.
    """
    try:
        yield
    except (AnyflowError, MemoryError, PermissionError):
        raise
    except (Exception, CheckpointException) as error:  # torch's own is not an Exception
        reason = dcp.reason(error)
        if isinstance(reason, PermissionError):
            raise reason from error
        words = str(reason).strip().splitlines() or [type(reason).__name__]
        raise UsageError(
            f"The checkpoint {checkpoint} is damaged: {words[0]}.",
            hint,
            everywhere=isinstance(error, CheckpointException),
        ) from error
