"""Finished videos of one variant: a line of scores each, and an mp4 for people.

A line is appended and flushed when its mp4 is complete, so after a kill everything before it is kept; a line
cut off by the kill is dropped. Scores were taken from the raw pixels, not from the mp4.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.suite import VideoScore

SCORES = "scores.jsonl"
VIDEOS = "videos"


@dataclass(frozen=True)
class Scored:
    """A video that is made and scored. Seconds are its share of its batch: in the network, in the decoder."""

    prompt: str
    seed: int
    file: str  # under the variant's directory
    network: float
    decode: float
    batch: int
    score: VideoScore


@dataclass(frozen=True)
class Store:
    """The directory of a variant."""

    directory: Path

    def read(self) -> dict[tuple[str, int], Scored]:
        """What is complete, by prompt and seed."""
        path = self.directory / SCORES
        if not path.exists():
            return {}
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is cut off
        records = [self._parsed(line, number) for number, line in enumerate(lines, 1)]
        return {(r.prompt, r.seed): r for r in records if (self.directory / r.file).is_file()}

    def append(self, records: Sequence[Scored]) -> None:
        """Add finished videos, surviving a power cut."""
        lines = "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        path = self.directory / SCORES
        with path.open("ab") as handle:
            handle.write(lines.encode())
            handle.flush()
            os.fsync(handle.fileno())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second evaluation of the same variant out; drops a cut-off last line."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / SCORES).open("ab+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"Another evaluation is writing to {self.directory}.",
                    "Wait for it to end, or use other --runs.",
                ) from error
            handle.seek(0)
            handle.truncate(handle.read().rfind(b"\n") + 1)
            yield

    def _parsed(self, line: str, number: int) -> Scored:
        try:
            values: dict[str, Any] = json.loads(line)
            score = VideoScore(**values.pop("score"))
            return Scored(
                **values, score=replace(score, features=tuple(score.features), pieces=tuple(score.pieces))
            )
        except (ValueError, TypeError, KeyError) as error:
            raise AnyflowError(
                f"Line {number} of {self.directory / SCORES} cannot be read.",
                "Delete that line; its video is made and scored again.",
            ) from error
