"""TensorBoard's files, written as the rows are: a row is appended and closed before the next step begins.

TensorBoard's own writer keeps rows for two minutes and writes them in a thread, where a full or read-only
disk ends in its traceback, and a kill loses them.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = "brain.Event:2"


class Board:
    """A file of this start of a run, from which rows after ``step`` that earlier starts wrote are hidden."""

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        started = f"{time.time_ns() // 1000:016d}"  # files are read in the order of their names
        self.path = directory / f"events.out.tfevents.{started}.{socket.gethostname()}.{os.getpid()}"
        again = SessionLog(status=SessionLog.START)
        self._append(Event(file_version=FORMAT), Event(step=step + 1, session_log=again))

    def add(self, row: Mapping[str, float], step: int) -> None:
        """Append a row's values. Raises OSError."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, *events: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        with self.path.open("ab") as file:
            file.write(records.getvalue())
