"""What an evaluation found, as plain values: what the table, the plot, the page and the JSON are made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from anyflow_cli.evaluate.bootstrap import Interval, Trend
from anyflow_cli.evaluate.per_chunk import ChunkCurves
from anyflow_cli.evaluate.store import Scored
from anyflow_cli.evaluate.suite import SuiteResult
from anyflow_cli.evaluate.vbench.published import published

NOT_COMPARABLE = "not comparable"
RESULTS = "results.json"


@dataclass(frozen=True)
class Measured:
    """One model at one number of steps."""

    key: str
    label: str  # 4, or 50x2
    guided: bool  # a plain Wan model, two evaluations a step
    reference: bool  # the teacher beside the model in question
    address: str
    steps: int
    evaluations: int
    result: SuiteResult
    interval: Interval | None  # of Total
    network_seconds: float  # median over videos
    decode_seconds: float
    batch: int  # videos at once, of the timed ones
    directory: Path
    scored: tuple[Scored, ...]  # in the order of the protocol
    along: ChunkCurves | None  # chunk by chunk, where the suite tells

    @property
    def seconds(self) -> float:
        """A video, decoded."""
        return self.network_seconds + self.decode_seconds

    @property
    def title(self) -> str:
        """As a column is headed."""
        if self.reference:
            return f"teacher {self.label}"
        if not self.steps:
            return "given videos"
        return f"{self.label} step{'' if self.steps == 1 else 's'}"


@dataclass(frozen=True)
class Evaluation:
    """All variants under one protocol."""

    card: dict[str, Any]
    measured: tuple[Measured, ...]
    trend: Trend | None
    prompts: tuple[str, ...]
    partition: tuple[int, ...] | None  # latent frames of the model's chunks; None: it has none

    @property
    def is_timed(self) -> bool:
        """Whether the videos were made here, at known step counts."""
        return all(m.steps for m in self.measured)

    @property
    def models(self) -> list[Measured]:
        """The model's own step counts, ascending."""
        return sorted((m for m in self.measured if not m.reference), key=lambda m: m.steps)

    @property
    def teacher(self) -> Measured | None:
        """The teacher, where it was scored beside the model."""
        return next((m for m in self.measured if m.reference), None)

    @property
    def columns(self) -> list[Measured]:
        """As tables show them: the teacher last."""
        return [*self.models, *([self.teacher] if self.teacher else [])]

    @property
    def curves(self) -> dict[str, ChunkCurves]:
        """Chunk by chunk, by the head of the column; empty where the model has no chunks."""
        if self.partition is None:
            return {}
        return {one.title: one.along for one in self.columns if one.along is not None}

    def as_json(self) -> dict[str, Any]:
        """For ``results.json`` and ``--json``; scores of single videos stay in their own files."""
        suite = self.card["suite"]
        return {
            "card": self.card,
            "scores": [_summary(m, self.teacher) for m in self.measured],
            "published": [row.as_json(suite) for row in published(suite)],
            "trend": None if self.trend is None else asdict(self.trend),
            "partition": self.partition,
        }


def share_of_teacher(one: Measured, teacher: Measured | None) -> float | None:
    """Total over the teacher's Total."""
    if teacher is None or one is teacher or one.result.total is None or not teacher.result.total:
        return None
    return one.result.total / teacher.result.total


def _summary(one: Measured, teacher: Measured | None) -> dict[str, Any]:
    result = asdict(one.result)
    return {
        "model": one.address,
        "teacher": one.reference,
        "steps": one.steps,
        "evaluations": one.evaluations,
        "total": result["total"],
        **result["groups"],
        **{name: result[name] for name in ("correct", "distance")},
        "interval": None if one.interval is None else [one.interval.low, one.interval.high],
        "share of teacher": share_of_teacher(one, teacher),
        "dimensions": result["dimensions"],
        "missing": result["reasons"],
        "videos": result["videos"],
        "seconds": {"network": one.network_seconds, "with decoding": one.seconds, "batch": one.batch},
        "chunks": None if one.along is None else asdict(one.along),
        "directory": one.key,
    }
