"""Published results from the paper's Tables 3 and 4, shown beside a result on the same benchmark."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from anyflow_cli.evaluate.vbench.dimensions import GROUPS
from anyflow_cli.utils.records import read_record


class PublishedRow(BaseModel):
    """One row as printed.

    Attributes:
        model: Name of the model.
        nfe: Network evaluations, ``4`` or ``50x2``.
        re_evaluated: Whether the paper's authors evaluated it, rather than quoting the model's own paper.
        total: Total score.
        quality: Quality score.
        semantic: Semantic score, on VBench.
        i2v: I2V score, on VBench-I2V.
        remark: Doubt about the row.
    """

    model: str
    nfe: str
    re_evaluated: bool
    total: float
    quality: float
    semantic: float | None = None
    i2v: float | None = None
    remark: str | None = None

    @property
    def groups(self) -> dict[str, float]:
        """Scores of the benchmark's groups."""
        every = {"quality": self.quality, "semantic": self.semantic, "i2v": self.i2v}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def title(self) -> str:
        """Model, evaluations, source and remark."""
        source = "" if self.re_evaluated else ", as reported by its authors"
        return f"{self.model}, {self.nfe}{source}{f', {self.remark}' if self.remark else ''}"

    def as_json(self) -> dict[str, Any]:
        """Entry of ``results.json``."""
        return self.model_dump(exclude_none=True)


class _Table(BaseModel):
    name: str
    rows: list[PublishedRow]


class _Paper(BaseModel):
    source: str
    tables: dict[str, _Table]


@cache
def _paper() -> _Paper:
    return read_record(Path(__file__).with_name("published.json"), _Paper, "Install anyflow again.")


def published_source() -> str:
    """Title of the paper."""
    return _paper().source


def published(suite: str) -> list[PublishedRow]:
    """Rows of the paper's table for a benchmark; none for other suites."""
    return _paper().tables[suite].rows if suite in GROUPS else []
