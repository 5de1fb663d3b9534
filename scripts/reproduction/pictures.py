"""Pictures of the report: curves with bands, in panels that share an axis, and differences with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anyflow_cli.evaluate.bootstrap import Interval
from anyflow_cli.evaluate.report.figures import LIGHT_FIGURE, MARKERS, STYLES

COLUMNS = 3
WIDEST = -8.0  # worse differences are drawn as an arrow


@dataclass(frozen=True)
class Difference:
    """A difference, and its interval."""

    value: float
    bounds: Interval

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.bounds.low > 0 or self.bounds.high < 0

    def __str__(self) -> str:
        """As a cell; bold where the interval excludes 0."""
        end = "**" if self.excludes_zero else ""
        return f"{end}{self.value:+.1f} ({self.bounds.low:+.1f} to {self.bounds.high:+.1f}){end}"


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


def draw_differences(
    groups: Mapping[str, Mapping[str, Mapping[int, Difference]]], path: Path, x_label: str
) -> None:
    """Draw differences by step count, by label, by group.

    A label has a line of its own. A point is filled where its interval excludes 0, and an arrow at the edge
    stands for a difference below ``WIDEST``.
    """
    count = sum(len(entries) + 1 for entries in groups.values())
    figure = Figure(figsize=(10, 0.8 + 0.24 * count), dpi=100, layout="constrained")
    axes = figure.subplots()
    place, ticks = 0.0, list[tuple[float, str]]()
    steps = sorted({step for entries in groups.values() for own in entries.values() for step in own})
    colors = dict(zip(steps, LIGHT_FIGURE.lines, strict=False))
    for title, entries in groups.items():
        axes.text(0, place, title, transform=axes.get_yaxis_transform(), ha="left", va="center", fontsize=8,
                  fontweight="bold")  # fmt: skip
        place += 1
        for label, own in entries.items():
            ticks.append((place, label))
            for number, (step, found) in enumerate(own.items()):
                y = place + 0.3 * (number - (len(own) - 1) / 2)
                if found.value < WIDEST:
                    axes.plot(WIDEST + 0.15, y, marker="<", ms=5, color=colors[step])
                    continue
                axes.plot([found.bounds.low, found.bounds.high], [y, y], color=colors[step], lw=1.2)
                axes.plot(found.value, y, marker="o", ms=4, color=colors[step],
                          mfc=colors[step] if found.excludes_zero else "white")  # fmt: skip
            place += 1
    axes.axvline(0, color=LIGHT_FIGURE.faint, lw=1.2, zorder=0)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], fontsize=7)
    axes.set_ylim(place, -1)
    axes.set_xlim(left=WIDEST)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", color=LIGHT_FIGURE.faint, lw=0.6)
    handles = [axes.plot([], [], marker="o", ms=4, color=colors[step], label=f"{step} steps")[0]
               for step in steps]  # fmt: skip
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=len(steps), loc="outside upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
