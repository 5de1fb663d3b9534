"""The rows of the paper's Tables 3 and 4, to stand beside a result."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_cli.evaluate.suite import total_score
from anyflow_cli.evaluate.vbench.dimensions import GROUPS

CONTENT = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
SOURCE: str = CONTENT["source"]
ROUNDING = 0.005  # of a number with two decimals


@dataclass(frozen=True)
class PublishedRow:
    """A published result: Quality, Semantic or I2V, and Total, as printed."""

    model: str
    nfe: str
    groups: dict[str, float]
    total: float
    own: bool  # evaluated by the paper's authors, not quoted from the model's own paper

    def adds_up(self, benchmark: str) -> bool:
        """Whether some groups that print like these give a Total that prints like this one."""
        total = total_score(self.groups, GROUPS[benchmark])
        return total is not None and abs(total - self.total) <= 2 * ROUNDING + 1e-9

    def title(self, benchmark: str) -> str:
        """Which model at which evaluations, who measured it, and whether its sum is right."""
        source = "" if self.own else ", as its authors report"
        doubt = "" if self.adds_up(benchmark) else ", does not add up in print"
        return f"{self.model}, {self.nfe}{source}{doubt}"

    def as_json(self, benchmark: str) -> dict[str, Any]:
        """For ``results.json``, beside the scores of a result."""
        return {
            "model": self.model,
            "nfe": self.nfe,
            "total": self.total,
            **self.groups,
            "re-evaluated": self.own,
            "adds up": self.adds_up(benchmark),
        }


def published(suite: str) -> list[PublishedRow]:
    """The paper's table for a benchmark, in its order; no row for a suite that the paper does not have."""
    if suite not in GROUPS:
        return []
    return [
        PublishedRow(
            row["model"],
            row["nfe"],
            {group: row[group] for group in GROUPS[suite]},
            row["total"],
            row["re-evaluated"],
        )
        for row in CONTENT["tables"][suite]["rows"]
    ]
