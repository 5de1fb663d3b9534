"""Finished videos of one variant: a line of scores each, and an mp4 for people.

A line is appended and flushed when its mp4 is complete, so after a kill everything before it is kept; a line
cut off by the kill is dropped. Scores were taken from the raw pixels, not from the mp4.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError
from anyflow_cli.evaluate.suite import VideoScore

SCORES = "scores{}.jsonl"  # of the first process; of the others scores-1.jsonl, scores-2.jsonl, ...
VIDEOS = "videos"


@dataclass(frozen=True)
class Scored:
    """A video that is made and scored. Seconds are its share of its batch: in the network, in the decoder."""

    prompt: str
    seed: int
    file: str  # under the variant's directory
    size: int  # of the file, bytes
    digest: str  # of the file, SHA-256
    network: float
    decode: float
    batch: int
    score: VideoScore
    made: float  # when, in seconds since 1970: of two records of a video the newer one holds


def is_store(directory: Path) -> bool:
    """Whether this is the directory of a variant."""
    return any(directory.glob(SCORES.format("*")))


def digest_of(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Store:
    """The directory of a variant."""

    directory: Path

    def read(self) -> dict[tuple[str, int], Scored]:
        """What is complete, by prompt and seed; a video of another size than it was written with is not."""
        return {key: record for key, record in self.records().items() if self._size(record) == record.size}

    def records(self) -> dict[tuple[str, int], Scored]:
        """All that was ever finished, whatever became of its file; the newest of each prompt and seed."""
        paths = sorted(self.directory.glob(SCORES.format("*")))
        found = [record for path in paths for record in self._lines(path)]
        return {(record.prompt, record.seed): record for record in sorted(found, key=lambda r: r.made)}

    def is_whole(self, record: Scored) -> bool:
        """Whether a video is, to the byte, as it was written."""
        path = self.directory / record.file
        return path.is_file() and digest_of(path) == (record.size, record.digest)

    def append(self, record: Scored, rank: int = 0) -> None:
        """Add a finished video, surviving a power cut."""
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with self._path(rank).open("ab") as handle:
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())

    def mend(self, rank: int = 0) -> None:
        """Drop a last line that a kill cut off, before more is appended."""
        if self._path(rank).exists():
            with self._path(rank).open("rb+") as handle:
                handle.truncate(handle.read().rfind(b"\n") + 1)

    def _path(self, rank: int) -> Path:
        return self.directory / SCORES.format(f"-{rank}" if rank else "")

    def _size(self, record: Scored) -> int | None:
        path = self.directory / record.file
        return path.stat().st_size if path.is_file() else None

    def _lines(self, path: Path) -> list[Scored]:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is cut off
        return [self._parsed(path, line, number) for number, line in enumerate(lines, 1)]

    def _parsed(self, path: Path, line: str, number: int) -> Scored:
        try:
            values: dict[str, Any] = json.loads(line)
            score = VideoScore(**values.pop("score"))
            return Scored(
                **values, score=replace(score, features=tuple(score.features), pieces=tuple(score.pieces))
            )
        except (ValueError, TypeError, KeyError) as error:
            raise AnyflowError(
                f"Line {number} of {path} cannot be read.",
                "Delete that line; its video is made and scored again.",
            ) from error
