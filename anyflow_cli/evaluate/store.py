"""Files of an evaluation: reports, and one directory per variant with its videos and their records.

A record is appended as one line and flushed once its mp4 is complete, so a kill loses nothing before it; an
incomplete last line is dropped. Scores come from raw pixels, not from the mp4.

Only files that anyflow wrote are replaced or deleted: reports whose hash is in the directory's marker, videos
at the path that their prompt and seed determine, and variants with a marker and nothing but known files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.protocol import Variant, VideoRequest
from anyflow_cli.evaluate.suite import VideoScore
from anyflow_cli.utils.files import atomic_write, write_json
from anyflow_cli.utils.records import parse_record, read_bytes, read_record

RECORDS = "scores{}.jsonl"  # of the first process; scores-1.jsonl, scores-2.jsonl, ... of the others
VIDEOS = "videos"
ANSWERS = "vbench"  # VBench's answers, in the variant's directory
VARIANT_MARKER = "variant.json"
DIRECTORY_MARKER = ".anyflow-evaluation.json"
VARIANT_NAME = re.compile(r"(model|teacher)-(given|\d+(x2)?)-[0-9a-f]{12}")
VARIANT_FILE = re.compile(
    rf"scores(-\d+)?\.jsonl|{re.escape(VARIANT_MARKER)}"
    rf"|{VIDEOS}(/[0-9a-f]{{12}}--?\d+\.mp4)?"
    rf"|{ANSWERS}(/(work(/.*)?|[a-z0-9_]+(\.json|\.error\.txt)))?",
    re.DOTALL,
)
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # pathlib makes one slash of two
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
BY_HAND = "Move it away, or use another --out."


@dataclass(frozen=True)
class VideoRecord:
    """A video that is sampled and scored.

    Attributes:
        prompt: Text it was sampled with.
        seed: Seed of its noise.
        file: Name below the variant's directory, or path of a video generated elsewhere; for people to read.
        size: Bytes of the file.
        digest: SHA-256 of the file.
        network: Seconds in the network, as a share of its batch.
        decode: Seconds in the decoder, likewise.
        batch: Videos sampled together.
        score: Scores of the suite.
        made: Seconds since 1970; the newest record of a prompt and seed holds.
    """

    prompt: str
    seed: int
    file: str
    size: _Count
    digest: str
    network: _Seconds
    decode: _Seconds
    batch: _Count
    score: VideoScore
    made: _Seconds


def size_and_digest(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file."""
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def video_name(request: VideoRequest) -> str:
    """Name of a video below its variant's directory, from a hash: a prompt never becomes part of a path."""
    return f"{VIDEOS}/{hashlib.sha256(request.prompt.encode()).hexdigest()[:12]}-{request.seed}.mp4"


@dataclass(frozen=True)
class VariantStore:
    """The directory of one variant."""

    directory: Path

    def create(self, one: Variant) -> None:
        """Make the directory, marked as anyflow's."""
        marker = self.directory / VARIANT_MARKER
        if not marker.is_file():
            write_json(marker, {"format": 1, "settings": asdict(one.settings)})

    def records(self) -> dict[tuple[str, int], VideoRecord]:
        """The newest record of each prompt and seed, whether or not its file is still there."""
        paths = sorted(self.directory.glob(RECORDS.format("*")))
        found = [record for path in paths for record in _read_lines(path)]
        return {(record.prompt, record.seed): record for record in sorted(found, key=lambda r: r.made)}

    def append(self, record: VideoRecord, rank: int = 0) -> None:
        """Append a record; it survives a power failure."""
        path = self._own_records(rank)
        line = json.dumps(asdict(record), ensure_ascii=False) + "\n"
        with path.open("ab") as handle:
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())

    def drop_partial_line(self, rank: int = 0) -> None:
        """Remove a last line that a kill left incomplete, before more is appended."""
        path = self._own_records(rank)
        if path.exists():
            with path.open("rb+") as handle:
                handle.truncate(handle.read().rfind(b"\n") + 1)

    def remove_video(self, request: VideoRequest) -> None:
        """Delete a video, so that it is sampled again."""
        path = self.directory / video_name(request)
        if not path.resolve().is_relative_to(self.directory.resolve()):
            raise UsageError(f"{path} leads outside of {self.directory}.", BY_HAND)
        path.unlink(missing_ok=True)

    def _own_records(self, rank: int) -> Path:
        path = self.directory / RECORDS.format(f"-{rank}" if rank else "")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UsageError(f"{path} is not a regular file.", BY_HAND)
        return path


def _read_lines(path: Path) -> Iterator[VideoRecord]:
    """All complete lines of a file of records; those of one file agree in the length of their lists."""
    shape: tuple[int, int] | None = None
    for number, line in enumerate(read_bytes(path).split(b"\n")[:-1], 1):
        source, hint = f"Line {number} of {path}", "Delete that line; its video is sampled and scored again."
        record = parse_record(line, VideoRecord, source, hint)
        lengths = len(record.score.features), len(record.score.pieces)
        shape = shape or lengths
        if lengths != shape:
            raise UsageError(
                f"{source} is damaged: {lengths} features and pieces instead of {shape}.",
                hint,
            )
        yield record


# -- variants of earlier models or settings ------------------------------------------------------------------


@dataclass(frozen=True)
class OtherVariants:
    """Variants in an evaluation's directory that are not part of the evaluation.

    Attributes:
        removable: Those that anyflow made and that hold nothing else.
        kept: Those without a marker, or with other files.
        size: Bytes of the removable ones.
    """

    removable: tuple[Path, ...]
    kept: tuple[Path, ...]
    size: int


def other_variants(out: Path, own: Sequence[Variant]) -> OtherVariants:
    """Find variants of earlier models and settings, which are kept in case they are needed again."""
    keys = {one.key for one in own}
    found = [
        path for path in sorted(out.iterdir())
        if VARIANT_NAME.fullmatch(path.name) and path.name not in keys
        and path.is_dir() and not path.is_symlink()
    ]  # fmt: skip
    removable = [path for path in found if _is_only_ours(path)]
    files = [file for path in removable for file in path.rglob("*") if file.is_file()]
    return OtherVariants(
        tuple(removable),
        tuple(path for path in found if path not in removable),
        sum(file.stat().st_size for file in files),
    )


def remove_variants(directories: Sequence[Path]) -> None:
    """Delete variants that ``other_variants`` found removable."""
    for directory in directories:
        assert _is_only_ours(directory), directory
        shutil.rmtree(directory)


def _is_only_ours(directory: Path) -> bool:
    """Whether a variant carries its marker and no file that anyflow does not write."""
    if not (directory / VARIANT_MARKER).is_file():
        return False
    names = (path.relative_to(directory).as_posix() for path in directory.rglob("*"))
    return all(VARIANT_FILE.fullmatch(name) for name in names)


# -- the directory of an evaluation --------------------------------------------------------------------------


class _DirectoryMarker(BaseModel):
    """Hashes of the reports that anyflow wrote, before and after a replacement that may be interrupted."""

    format: Literal[1] = 1
    files: dict[str, list[str]] = {}


class _OldResults(BaseModel):
    """What identifies a ``results.json`` of 0.1, which wrote no marker."""

    card: dict[str, Any]
    scores: list[dict[str, Any]]


class _OldComparison(BaseModel):
    """The same of a ``comparison.json``."""

    names: tuple[str, str]
    differences: list[dict[str, Any]]


RESULTS, COMPARISON = "results.json", "comparison.json"
REPORTS: dict[str, tuple[type[BaseModel], tuple[str, ...]]] = {
    # file, its form in 0.1                other files written with it
    RESULTS:    (_OldResults,    ("scores.md", "scores.tex", "scores.png", "chunks.png", "report.html")),
    COMPARISON: (_OldComparison, ("comparison.png",)),
}  # fmt: skip


@dataclass(frozen=True)
class EvaluationDirectory:
    """The directory that holds the reports and the variants of an evaluation."""

    path: Path

    def check(self) -> None:
        """Raise a UsageError if a report would replace a file that anyflow did not write."""
        if URL.match(str(self.path)):
            raise UsageError(f"{self.path} is not a local directory.", "Give a local directory to --out.")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file, not a directory.", "Give a directory to --out.")
        known = self._known()
        for name in (name for first, (_, more) in REPORTS.items() for name in (first, *more)):
            path = self.path / name
            if (path.exists() or path.is_symlink()) and not self._is_known(path, known):
                raise UsageError(f"{path} was not written by anyflow, or was changed since.", BY_HAND)

    def write(self, files: Mapping[str, bytes]) -> dict[str, Path]:
        """Write reports, each replacing an earlier one atomically.

        Raises:
            UsageError: A file of that name was not written by anyflow.
        """
        self.check()
        known = self._known()
        for name, content in files.items():
            known[name] = [*known.get(name, ())[-1:], hashlib.sha256(content).hexdigest()]
        write_json(self.path / DIRECTORY_MARKER, _DirectoryMarker(files=known).model_dump())
        for name, content in files.items():
            with atomic_write(self.path / name) as temporary:
                temporary.write_bytes(content)
        return {name: self.path / name for name in files}

    def _known(self) -> dict[str, list[str]]:
        """Hashes of own reports: by the marker, else those beside a results or comparison file of 0.1."""
        marker = self.path / DIRECTORY_MARKER
        if marker.exists():
            hint = f"Delete {DIRECTORY_MARKER}, or use another --out."
            return read_record(marker, _DirectoryMarker, hint).files
        known: dict[str, list[str]] = {}
        for name, (schema, more) in REPORTS.items():
            if (self.path / name).is_file() and _matches(self.path / name, schema):
                own = [self.path / each for each in (name, *more) if (self.path / each).is_file()]
                known |= {path.name: [size_and_digest(path)[1]] for path in own}
        return known

    def _is_known(self, path: Path, known: Mapping[str, Sequence[str]]) -> bool:
        regular = path.is_file() and not path.is_symlink()
        return regular and path.name in known and size_and_digest(path)[1] in known[path.name]


def _matches(path: Path, schema: type[BaseModel]) -> bool:
    try:
        read_record(path, schema)
    except UsageError:
        return False
    return True
