"""Pictures of the report: curves with bands, in panels that share an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anyflow_cli.evaluate.report.figures import LIGHT_FIGURE, MARKERS, STYLES

COLUMNS = 3


@dataclass(frozen=True)
class Curve:
    """Points of a line, and the ends of their intervals where they have one."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def draw_curves(
    panels: Mapping[str, Mapping[str, Curve]], path: Path, x_label: str, y_label: str, *, steps: bool = False
) -> None:
    """Draw one panel per title, with a line per label.

    Args:
        panels: Curves by label, by title.
        path: The picture, PNG.
        x_label: Label of the horizontal axes.
        y_label: Label of the vertical axes.
        steps: Whether x is a number of steps: then its axis is logarithmic, with a tick at each.
    """
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for number, (label, curve) in enumerate(curves.items()):
            color = LIGHT_FIGURE.lines[number % len(LIGHT_FIGURE.lines)]
            style = STYLES[number // len(LIGHT_FIGURE.lines) % len(STYLES)]
            marker = MARKERS[number % len(MARKERS)] if len(curve.x) < 12 else None
            axes.plot(curve.x, curve.y, ls=style, color=color, marker=marker, ms=4, label=label)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, lw=0)
        if steps:
            axes.set_xscale("log", base=2)
            ticks = sorted({x for curve in curves.values() for x in curve.x})
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=LIGHT_FIGURE.faint, lw=0.6)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
