"""The failures this field knows, seen in what a run reports, before they cost a night.

    not a number      a loss or gradient; ends the run unless it may roll back
    embedding norm    of the two times, against its value when the run began (Fig. 11)
    saturation        power of the student's own samples, against that of the data
    static            motion of the student's own samples, against that of the data
    fake divergence   loss of the fake score, against its own average so far

All but the first look at rows of the metrics and need several bad ones in a row. Every process sees the same
rows, so all of them act alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from anyflow_cli.errors import AnyflowError
from anyflow_cli.recipe import schema

log = logging.getLogger(__name__)

MetricsRow = Mapping[str, float]
MEMORY = 0.9  # of the fake score's average, a row


class AlarmError(AnyflowError):
    """Something went wrong at ``step``; what was saved before it is good."""

    def __init__(self, what: str, step: int, hint: str) -> None:
        super().__init__(what, hint, everywhere=True)
        self.step = step


class Alarms:
    """Looks at each row; ``state`` travels in the checkpoint."""

    def __init__(self, settings: schema.AlarmsSection) -> None:
        self.settings = settings
        self.norm: float | None = None  # of the embedding, when the run began
        self.fake: float | None = None
        self.since: dict[str, int] = {}  # step of the first of the bad rows in a row
        self.rows: dict[str, int] = {}  # and how many there are

    def look(self, step: int, row: MetricsRow) -> None:
        """Warn or raise, as the recipe says, once a value has been bad for long enough."""
        for name, measure in MEASURES.items():
            value = measure(self, row)
            if value is None or not self._is_bad(name, value):
                self.since.pop(name, None)
                self.rows.pop(name, None)
                continue
            self.since.setdefault(name, step)
            self.rows[name] = self.rows.get(name, 0) + 1
            if self.rows[name] == self.settings.patience:
                self._sound(name, value)
        self._remember(row)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"norm": self.norm, "fake": self.fake, "since": dict(self.since), "rows": dict(self.rows)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from what a checkpoint holds."""
        self.norm, self.fake = state["norm"], state["fake"]
        self.since, self.rows = dict(state["since"]), dict(state["rows"])

    def _is_bad(self, name: str, value: float) -> bool:
        bound: float = getattr(self.settings, name)
        return value < bound if name == "static" else value > bound

    def _sound(self, name: str, value: float) -> None:
        bound, since = getattr(self.settings, name), self.since[name]
        what = f"Since step {since}: {WORDS[name].format(value)} (alarms.{name} is {bound:g})."
        if self.settings.action == "warn":
            return log.warning("%s", what)
        raise AlarmError(
            what, since, "Look at the previews; continue with another alarms.action or threshold."
        )

    def _remember(self, row: MetricsRow) -> None:
        self.norm = row.get("embedding_norm") if self.norm is None else self.norm
        if "fake" in row:
            self.fake = row["fake"] if self.fake is None else MEMORY * self.fake + (1 - MEMORY) * row["fake"]


def _ratio(row: MetricsRow, name: str) -> float | None:
    """Of the student's own samples to the data; None where there are no samples, or nothing moves."""
    own, data = row.get(f"sample_{name}"), row.get(f"data_{name}")
    return own / data if own is not None and data else None


MEASURES: dict[str, Callable[[Alarms, MetricsRow], float | None]] = {
    "embedding_norm": lambda a, row: (
        row["embedding_norm"] / a.norm if a.norm and "embedding_norm" in row else None
    ),
    "saturation": lambda a, row: _ratio(row, "power"),
    "static": lambda a, row: _ratio(row, "motion"),
    "fake_divergence": lambda a, row: row["fake"] / a.fake if a.fake and "fake" in row else None,
}
WORDS = {
    "embedding_norm": "the embedding of the times is {:.3g} times as long as when the run began",
    "saturation": "the student's samples have {:.3g} times the power of the data",
    "static": "the student's samples move {:.3g} times as much as the data",
    "fake_divergence": "the loss of the fake score is {:.3g} times its average",
}
