"""Results of an evaluation as plain values, from which tables, figures, the page and JSON are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from anyflow_cli.evaluate.bootstrap import Interval, Trend
from anyflow_cli.evaluate.per_chunk import ChunkCurves
from anyflow_cli.evaluate.protocol import RENAMED_KEYS, ProtocolCard
from anyflow_cli.evaluate.store import VARIANT_NAME, VideoRecord
from anyflow_cli.evaluate.suite import SuiteResult
from anyflow_cli.evaluate.vbench.published import published
from anyflow_cli.utils.records import read_record

NOT_COMPARABLE = "not comparable"


@dataclass(frozen=True)
class Measured:
    """Results of one variant.

    Attributes:
        key: Name of the variant's directory.
        label: Steps as the literature writes them, ``4`` or ``50x2``.
        reference: Whether this is the teacher beside the evaluated model.
        address: Path or name of the model.
        steps: Step count; 0 for videos generated elsewhere.
        evaluations: Network evaluations per video.
        result: Scores.
        interval: Confidence interval of Total.
        network_seconds: Median seconds per video in the network.
        decode_seconds: Median seconds per video in the decoder.
        batch: Batch size behind these times.
        records: One per video, in the order of the protocol.
        files: The videos, likewise.
        chunks: Scores chunk by chunk, where the suite has them.
    """

    key: str
    label: str
    reference: bool
    address: str
    steps: int
    evaluations: int
    result: SuiteResult
    interval: Interval | None
    network_seconds: float
    decode_seconds: float
    batch: int
    records: tuple[VideoRecord, ...]
    files: tuple[Path, ...]
    chunks: ChunkCurves | None

    @property
    def seconds(self) -> float:
        """Seconds per video, decoding included."""
        return self.network_seconds + self.decode_seconds

    @property
    def title(self) -> str:
        """Heading of its column."""
        if self.reference:
            return f"teacher {self.label}"
        if not self.steps:
            return "external videos"
        return f"{self.label} step{'' if self.steps == 1 else 's'}"


@dataclass(frozen=True)
class Evaluation:
    """Results of all variants under one protocol; ``partition`` are the chunks of the evaluated model."""

    card: ProtocolCard
    measured: tuple[Measured, ...]
    trend: Trend | None
    prompts: tuple[str, ...]
    partition: tuple[int, ...] | None

    @property
    def is_timed(self) -> bool:
        """Whether the videos were sampled here, at known step counts."""
        return all(m.steps for m in self.measured)

    @property
    def models(self) -> list[Measured]:
        """The evaluated model by ascending step count."""
        return sorted((m for m in self.measured if not m.reference), key=lambda m: m.steps)

    @property
    def teacher(self) -> Measured | None:
        """The teacher, where it was scored beside the model."""
        return next((m for m in self.measured if m.reference), None)

    @property
    def columns(self) -> list[Measured]:
        """In the order of tables: the model, then the teacher."""
        return [*self.models, *([self.teacher] if self.teacher else [])]

    @property
    def curves(self) -> dict[str, ChunkCurves]:
        """Scores chunk by chunk, by column title; empty for a bidirectional model."""
        if self.partition is None:
            return {}
        return {one.title: one.chunks for one in self.columns if one.chunks is not None}

    def as_json(self) -> dict[str, Any]:
        """Content of ``results.json`` and ``--json``; scores of single videos are in files of their own."""
        suite = self.card.suite
        return {
            "card": self.card.as_json(),
            "scores": [_entry(m, self.teacher) for m in self.measured],
            "published": [row.as_json() for row in published(suite)],
            "trend": None if self.trend is None else asdict(self.trend),
            "partition": self.partition,
        }


def share_of_teacher(one: Measured, teacher: Measured | None) -> float | None:
    """Total divided by the teacher's Total."""
    if teacher is None or one is teacher or one.result.total is None or not teacher.result.total:
        return None
    return one.result.total / teacher.result.total


def _entry(one: Measured, teacher: Measured | None) -> dict[str, Any]:
    result = asdict(one.result)
    return {
        "model": one.address,
        "teacher": one.reference,
        "steps": one.steps,
        "evaluations": one.evaluations,
        "total": result["total"],
        **result["groups"],
        "correct": result["correct"],
        "distance": result["distance"],
        "figures": result["figures"],
        "interval": None if one.interval is None else [one.interval.low, one.interval.high],
        "share_of_teacher": share_of_teacher(one, teacher),
        "dimensions": result["dimensions"],
        "missing": result["reasons"],
        "videos": result["videos"],
        "seconds": {"network": one.network_seconds, "with_decoding": one.seconds, "batch": one.batch},
        "chunks": None if one.chunks is None else asdict(one.chunks),
        "directory": one.key,
    }


class ResultsEntry(BaseModel):
    """What a comparison needs of one variant in ``results.json``."""

    teacher: bool
    steps: int
    directory: Annotated[str, Field(pattern=f"^(?:{VARIANT_NAME.pattern})$")]


class ResultsFile(BaseModel):
    """What a comparison needs of ``results.json``."""

    card: ProtocolCard
    scores: list[ResultsEntry]
    partition: tuple[int, ...] | None = None


def read_results(path: Path) -> ResultsFile:
    """Read ``results.json`` of this or an earlier version."""
    return read_record(path, ResultsFile, "Evaluate again.", RENAMED_KEYS)
