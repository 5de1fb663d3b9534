"""The paper's figures from the records, each as a picture beside them: Figs. 1, 7, 8, 10, 11, exposure bias.

A figure returns the lines that show it in the report, or nothing where no record has what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from reproduction.long_videos import along, by_chunk
from reproduction.pictures import Curve, draw_curves
from reproduction.rows import FIGURE_1, FIGURES_7_8, KINDS, ROWS, TABLE_2, Kind

from anyflow_cli.flow.times import WeightKind, loss_weight

Records = Mapping[tuple[str, Kind], Sequence[Mapping[str, Any]]]
Panels = Mapping[str, Mapping[str, Curve]]
STEPS, TOTAL = "steps", "Total (0 to 100)"
SHIFT = 9.0  # of the tiny model


def totals(records: Iterable[Mapping[str, Any]], method: str) -> Curve | None:
    """Total of one sampler over its step counts, with intervals; None where there is no score."""
    from reproduction.report import scored

    own = list(records)
    steps = sorted({p["steps"] for one in own for p in one["points"] if p["method"] == method})
    found = [each for count in steps if (each := scored(own, method, count)) is not None]
    if not found:
        return None
    low, high = ([getattr(each.bounds, end) for each in found] for end in ("low", "high"))
    return Curve(steps, [each.total for each in found], low, high)


def by_kind(records: Records, rows: Mapping[str, Sequence[str]], *, seed: int | None = None) -> Panels:
    """Total over step counts per kind: a curve per title, from the records of its rows, and sampler."""
    from reproduction.report import SAMPLERS

    panels: dict[str, dict[str, Curve]] = {}
    for kind in KINDS:
        for title, names in rows.items():
            own = [one for name in names for one in records.get((name, kind), [])]
            own = [one for one in own if seed in (None, one["seed"])]
            for sampled in ROWS[names[0]].sampled:
                curve = totals(own, sampled.method)
                if curve is not None:
                    label = (
                        title if len(ROWS[names[0]].sampled) == 1 else f"{title}: {SAMPLERS[sampled.method]}"
                    )
                    panels.setdefault(kind, {})[label] = curve
    return panels


def scaling(records: Records, directory: Path) -> str:
    """Fig. 1: Total against 1 to 50 evaluations, of one training seed."""
    rows = {
        ROWS[name].title: (ROWS[name].start or "", name) for name in FIGURE_1
    }  # 4 and 32 steps are in the row that each starts from
    return _shown(by_kind(records, rows, seed=0), directory, "figure-1", "score against evaluations", STEPS)


def fine_tuning(records: Records, directory: Path) -> str:
    """Figs. 7 and 8: Total on the shifted world before and after fine-tuning."""
    panels = by_kind(records, {ROWS[name].title: (name,) for name in FIGURES_7_8})
    return _shown(panels, directory, "figures-7-8", "fine-tuning on a shifted world", STEPS)


def weights(records: Records, directory: Path) -> str:
    """Fig. 10: the weights w(t), and Total of stage 2 under each."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    drawn = {kind: Curve(t.tolist(), loss_weight(kind, SHIFT)(t).tolist()) for kind in get_args(WeightKind)}
    text = _shown({"": drawn}, directory, "figure-10-weights", "the weights w(t)", "t", "w(t)")
    rows = {
        "beta": ("flow-map-simulation",),
        **{name: (f"{name}-weight-simulation",) for name in ("uniform", "normal")},
    }
    panels = by_kind(records, rows)
    if not any(len(curves) > 1 for curves in panels.values()):
        return text
    return text + "\n\n" + _shown(panels, directory, "figure-10", "Total under each weight", STEPS)


def conditioning(records: Records, directory: Path) -> str:
    """Fig. 11: norm of the time embedding in stage 1, power of the samples in stage 2; bands: all seeds."""
    panels: dict[str, dict[str, Curve]] = {}
    wanted: dict[str, tuple[tuple[str, str], Callable[[Mapping[str, float]], float | None]]] = {
        "norm of the time embedding": (("flow-map", "zero-init"), lambda row: row.get("embedding_norm")),
        "power of samples / data": (
            ("flow-map-simulation", "zero-init-simulation"),
            lambda row: row["sample_power"] / row["data_power"] if "sample_power" in row else None,
        ),
    }
    for title, (names, value) in wanted.items():
        for name in names:
            runs = [
                [known for row in record["metrics"] if (known := value(row)) is not None]
                for record in records.get((name, "bidirectional"), [])
            ]
            if not any(runs):
                continue
            length = min(len(run) for run in runs)
            seeds = np.array([run[:length] for run in runs])
            seeds = seeds / seeds[:, :1] if "norm" in title else seeds
            shares = [i / length for i in range(length)]
            curve = Curve(shares, seeds.mean(0), seeds.min(0), seeds.max(0))
            panels.setdefault(title, {})[ROWS[name].title] = curve
    return _shown(panels, directory, "figure-11", "conditioning on r", "share of training", "relative")


def exposure_bias(records: Records, directory: Path) -> str:
    """Quality of the stills along the chunks of causal models, at 4 steps."""
    from reproduction.report import SAMPLERS

    panels: dict[str, dict[str, Curve]] = {}
    for row in TABLE_2:
        for sampled in ROWS[row].sampled:
            points = [
                point
                for record in records.get((row, "causal"), [])
                for point in record["points"]
                if (point["method"], point["steps"]) == (sampled.method, 4)
            ]
            if points:
                panels.setdefault(SAMPLERS[sampled.method], {})[ROWS[row].title] = along(
                    [by_chunk(point["pieces"]) for point in points]
                )
    return _shown(
        panels, directory, "along-the-video", "quality along the video", "chunk", "stills (0 to 100)"
    )


def _shown(panels: Panels, directory: Path, name: str, title: str, x_label: str, y_label: str = TOTAL) -> str:
    """Draw the panels; the line that shows the picture, or nothing."""
    if not panels:
        return ""
    draw_curves(panels, directory / f"{name}.png", x_label, y_label, steps=x_label == STEPS)
    return f"![{title}](paper/{name}.png)"


FIGURES: Mapping[str, Callable[[Records, Path], str]] = {  # by the title of the table that they belong to
    "Fig. 1": scaling,
    "Figs. 7 and 8": fine_tuning,
    "Fig. 10": weights,
    "Fig. 11": conditioning,
}
