"""When checkpoints are written and completed: by the main process, or sharded by all of them.

A sharded checkpoint can be written in the background while training continues. It is completed once all of
it is on the disk, at the latest before the next one begins or the run ends; a kill before that leaves the
previous checkpoint.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from anyflow_cli.runs import checkpoint, dcp
from anyflow_cli.runs.checkpoint import CheckpointState


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    state: CheckpointState  # its tensors continue to train; copies of them are being written
    writing: Future[Any]


class Checkpointer:
    """Writes the checkpoints of a run and keeps the newest ``keep``.

    With ``blocking`` training waits until a sharded checkpoint is complete.
    """

    def __init__(
        self, directory: Path, keep: int, accelerator: Any, *, sharded: bool, blocking: bool
    ) -> None:
        self.directory, self.keep, self.accelerator = directory, keep, accelerator
        self.sharded, self.blocking = sharded, blocking
        self._pending: _Pending | None = None
        self._group: Any = None

    def save(self, state: CheckpointState) -> None:
        """Write a checkpoint of all processes, or start to; every process calls this."""
        self.finish()
        main = self.accelerator.is_main_process
        if not self.sharded:
            if main:
                checkpoint.save(self.directory, state, self.keep)
            self.accelerator.wait_for_everyone()
            return
        with checkpoint.writing(self.directory, state.step) as partial:
            if main:
                checkpoint.begin(partial)
            self.accelerator.wait_for_everyone()
            tensors: dict[str, Any] = dict(dcp.flattened(state.tensors, state.optimizers))
            if self.blocking:
                save(tensors, checkpoint_id=partial / dcp.SHARDS)
                self._commit(partial, state)
                return
            if self._group is None:  # beside the training's own collectives, and on the CPU
                self._group = distributed.new_group(backend="gloo")
            writing = async_save(tensors, checkpoint_id=partial / dcp.SHARDS, process_group=self._group)
            assert isinstance(writing, Future)
            self._pending = _Pending(state, writing)

    def poll(self) -> None:
        """Complete the pending checkpoint if all of it is on the disk, which the main process knows."""
        if self._pending is not None and self.accelerator.is_main_process and self._pending.writing.done():
            self._complete()

    def finish(self) -> None:
        """Wait until no checkpoint is pending; every process calls this."""
        if self.sharded and not self.blocking:
            self._complete()
            self.accelerator.wait_for_everyone()

    def _complete(self) -> None:
        if self._pending is None:
            return
        state, writing = self._pending
        self._pending = None
        with checkpoint.writing(self.directory, state.step) as partial:
            writing.result()
            self._commit(partial, state)

    def _commit(self, partial: Path, state: CheckpointState) -> None:
        if self.accelerator.is_main_process:
            checkpoint.commit(partial, state, self.keep)
        if self.blocking:
            self.accelerator.wait_for_everyone()
