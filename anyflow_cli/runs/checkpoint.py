"""The state of a training run on disk: written whole or not at all, the newest complete one found again.

A checkpoint is a folder ``step-000500`` of safetensors (weights by phase, EMA), optimizer states
(``torch.save``, read back with ``weights_only``) and ``state.json``; a sharded run has ``shards`` (see
``anyflow_cli.runs.dcp``) in place of the tensors' files. It is written under a temporary name, flushed to the
disk, marked ``COMPLETE`` and renamed, in this order, so that a kill at any moment leaves either the old set
of checkpoints or the new one. What belongs into it is the trainer's business, when it is written the
``saver``'s; here are names, files and their order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.runs import dcp
from anyflow_cli.runs.open import CHECKPOINT_FORMAT, MARKER, STATE, read_state
from anyflow_cli.utils.files import flush

UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, EOFError)  # what readers raise for a damaged file


@dataclass(frozen=True)
class CheckpointState:
    """Everything a run needs to go on as if it had not stopped."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # file name -> named tensors: weights by phase, and "ema"
    optimizers: Mapping[str, Mapping[str, Any]]  # phase -> state dict
    extra: Mapping[str, Any]  # small, as JSON: open sums of the metrics, what an objective keeps


def save(directory: Path, state: CheckpointState, keep: int) -> Path:
    """Write ``directory/step-...``, then remove all but the newest ``keep``.

    A failure leaves the older ones untouched.
    """
    with writing(directory, state.step) as partial:
        begin(partial)
        _write(partial, state)
        return commit(partial, state, keep)


@contextmanager
def writing(directory: Path, step: int) -> Iterator[Path]:
    """The temporary folder of a checkpoint; a failure removes it and is told in a sentence."""
    partial = directory / f".{_name(step)}.partial"
    try:
        yield partial
    # torch and safetensors report a full disk by errors of their own, which lead to the system's
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
    """Make the temporary folder, and clear what a kill left of others."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials(partial.parent)
    partial.mkdir()


def commit(partial: Path, state: CheckpointState, keep: int) -> Path:
    """Say what the folder holds, mark it whole, give it its name, and remove all but the newest ``keep``."""
    directory = partial.parent
    _describe(partial, state)
    target = partial.rename(directory / _name(state.step))
    flush(directory)
    for old in complete(directory)[:-keep]:
        _discard(old)
    return target


def _name(step: int) -> str:
    return f"step-{step:06d}"


def complete(directory: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    return sorted(path for path in directory.glob("step-*") if (path / MARKER).exists())


def checkpoint_step(path: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(path.name.rpartition("-")[2])


def discard_after(path: Path) -> None:
    """Remove the checkpoints newer than one, so that a run continues from it."""
    for newer in complete(path.parent):
        if checkpoint_step(newer) > checkpoint_step(path):
            _discard(newer)


def newest(directory: Path) -> Path | None:
    """The checkpoint a run continues from."""
    found = complete(directory)
    return found[-1] if found else None


def load(path: Path, like: Mapping[str, Tensor] | None = None) -> CheckpointState:
    """Read a checkpoint into memory: what ``like`` names divided as there, the rest whole on the CPU."""
    try:
        record = read_state(path)
        if (path / dcp.SHARDS).is_dir():
            flat = dcp.read(path, like)
            tensors, optimizers = dcp.unflattened(flat, record["optimiser_settings"])
            return CheckpointState(record["step"], tensors, optimizers, record["extra"])
        return CheckpointState(
            step=record["step"],
            tensors={name: load_file(path / f"{name}.safetensors") for name in record["tensors"]},
            optimizers={name: _load_optimizer(path, name) for name in record["optimisers"]},
            extra=record["extra"],
        )
    except (*UNREADABLE, SafetensorError, CheckpointException) as error:
        raise UsageError(
            f"The checkpoint {path} is damaged: {dcp.reason(error)}.",
            "Remove that folder; the same command then continues from the one before it.",
        ) from error


def _write(folder: Path, state: CheckpointState) -> None:
    for name, tensors in state.tensors.items():
        stored = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(stored, folder / f"{name}.safetensors")
    for name, optimizer in state.optimizers.items():
        with (folder / f"optimiser-{name}.pt").open("wb") as file:  # torch's own tells no system error
            torch.save(optimizer, file)


def _describe(folder: Path, state: CheckpointState) -> None:
    """What the folder holds, then its marker, all flushed."""
    record = {
        "format": CHECKPOINT_FORMAT,
        "step": state.step,
        "tensors": list(state.tensors),
        "optimisers": list(state.optimizers),
        "optimiser_settings": {name: one["param_groups"] for name, one in state.optimizers.items()},
        "extra": state.extra,
    }
    (folder / STATE).write_text(json.dumps(record, indent=1))
    for path in folder.iterdir():
        flush(path)  # a folder too: its entries
    (folder / MARKER).touch()
    flush(folder)


def _load_optimizer(path: Path, name: str) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / f"optimiser-{name}.pt", map_location="cpu", weights_only=True)
    return state


def _discard(path: Path) -> None:
    """Remove a checkpoint, its marker first, so that what a kill leaves of it is not taken for whole."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def _remove_partials(directory: Path) -> None:
    for path in directory.glob(".step-*.partial"):
        shutil.rmtree(path)
    for path in directory.glob("step-*"):
        if not (path / MARKER).exists():
            shutil.rmtree(path)
