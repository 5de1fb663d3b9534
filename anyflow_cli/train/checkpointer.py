"""When the checkpoints of a run are written and made whole: by the main process, or each process its part.

Parts can be written while training goes on. Such a checkpoint is made whole as soon as all of it is on the
disk, at the latest before the next one begins and at the end; a kill before that leaves the one before it.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from anyflow_cli.runs import checkpoint, dcp
from anyflow_cli.runs.checkpoint import CheckpointState


class _Open(NamedTuple):
    """A checkpoint that is still being written."""

    state: CheckpointState  # its tensors are not those being written: they train on
    writing: Future[Any]


@dataclass
class Checkpointer:
    """``divided``: the state is sharded. ``waits``: training stands still until a checkpoint is whole."""

    directory: Path
    keep: int
    accelerator: Any
    divided: bool
    waits: bool
    _open: _Open | None = field(default=None, init=False)
    _group: Any = field(default=None, init=False)

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint of all processes, or begin to."""
        self.finish()
        main = self.accelerator.is_main_process
        if not self.divided:
            if main:
                checkpoint.save(self.directory, state, self.keep)
            self.accelerator.wait_for_everyone()
            return
        with checkpoint.writing(self.directory, state.step) as partial:
            if main:
                checkpoint.begin(partial)
            self.accelerator.wait_for_everyone()
            tensors = dcp.flattened(state.tensors, state.optimizers)
            if self.waits:
                save(tensors, checkpoint_id=partial / dcp.SHARDS)
                self._commit(partial, state)
            else:
                self._open = _Open(state, self._begin_writing(tensors, partial))

    def poll(self) -> None:
        """Make the open checkpoint whole if all of it is on the disk; the main process can tell."""
        if self._open is not None and self.accelerator.is_main_process and self._open.writing.done():
            self._close()

    def finish(self) -> None:
        """Wait until nothing is open, all processes together."""
        if self.divided and not self.waits:
            self._close()
            self.accelerator.wait_for_everyone()

    def _close(self) -> None:
        if self._open is None:
            return
        state, writing = self._open
        self._open = None
        with checkpoint.writing(self.directory, state.step) as partial:
            writing.result()
            self._commit(partial, state)

    def _commit(self, partial: Path, state: CheckpointState) -> None:
        if self.accelerator.is_main_process:
            checkpoint.commit(partial, state, self.keep)
        if self.waits:
            self.accelerator.wait_for_everyone()

    def _begin_writing(self, tensors: dict[str, Any], partial: Path) -> Future[Any]:
        """The writing threads talk among themselves, beside the training's own messages and on the CPU."""
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        future = async_save(tensors, checkpoint_id=partial / dcp.SHARDS, process_group=self._group)
        assert isinstance(future, Future)
        return future
