"""Alarms: known failures of this kind of training, recognized in the metrics while a run is young.

    not finite        a loss or gradient; ends the run unless it may roll back
    embedding norm    of the two times, relative to its value when the run began (Fig. 11)
    saturation        power of the student's samples, relative to the data
    static            motion of the student's samples, relative to the data
    fake divergence   loss of the fake score, relative to its average so far

All but the first look at rows of the metrics and need several bad rows in succession. Every process sees the
same rows, so all processes act alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from anyflow_cli.errors import AnyflowError
from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import AlarmState

log = logging.getLogger(__name__)

MetricsRow = Mapping[str, float]
DECAY = 0.9  # of the fake score's average, per row


class AlarmError(AnyflowError):
    """Training went wrong at ``step``; checkpoints of earlier steps are good."""

    def __init__(self, what: str, step: int, hint: str) -> None:
        super().__init__(what, hint, everywhere=True)
        self.step = step


class Alarms:
    """Looks at every row of the metrics; its state is part of the checkpoint."""

    def __init__(self, settings: schema.AlarmsSection) -> None:
        self.settings = settings
        self.norm: float | None = None  # of the embedding, when the run began
        self.fake: float | None = None  # average loss of the fake score
        self.since: dict[str, int] = {}  # step of the first of successive bad rows
        self.rows: dict[str, int] = {}  # their number

    def look(self, step: int, row: MetricsRow) -> None:
        """Warn or raise, as the recipe says, when a value has been bad for ``patience`` rows."""
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

    def state(self) -> AlarmState:
        """The state, for the checkpoint."""
        return AlarmState(self.norm, self.fake, dict(self.since), dict(self.rows))

    def resume(self, state: AlarmState) -> None:
        """Restore the state of a checkpoint."""
        self.norm, self.fake = state.norm, state.fake
        self.since, self.rows = dict(state.since), dict(state.rows)

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
            self.fake = row["fake"] if self.fake is None else DECAY * self.fake + (1 - DECAY) * row["fake"]


def _ratio(row: MetricsRow, name: str) -> float | None:
    """Ratio of the student's samples to the data; None without samples, or if the data's value is 0."""
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
    "embedding_norm": "the norm of the time embedding is {:.3g} times that at the start of the run",
    "saturation": "the power of the student's samples is {:.3g} times that of the data",
    "static": "the motion of the student's samples is {:.3g} times that of the data",
    "fake_divergence": "the loss of the fake score is {:.3g} times its average",
}
