"""Figures of an evaluation: scores and latency over network evaluations, and scores over chunks.

The teacher is a dashed line in the first; the second has one line per model and step count.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from anyflow_cli.evaluate.per_chunk import ChunkCurves
from anyflow_cli.evaluate.report.tables import group_title
from anyflow_cli.evaluate.results import NOT_COMPARABLE, Evaluation, Measured

MARKERS = ("o", "s", "^")
STYLES = ("-", "--", ":")


@dataclass(frozen=True)
class FigureTheme:
    """Colors of a figure; lines differ in marker too."""

    paper: str
    ink: str
    faint: str
    lines: tuple[str, str, str]


LIGHT_FIGURE = FigureTheme("#ffffff", "#1d2433", "#c9ced8", ("#0b6bcb", "#d1590b", "#2f8f4e"))
DARK_FIGURE = FigureTheme("#14181f", "#e6e9ef", "#3a4250", ("#6cb2ff", "#ff9d5c", "#72d08f"))


def scores_png(evaluation: Evaluation, theme: FigureTheme = LIGHT_FIGURE) -> bytes:
    """Draw scores and latency over network evaluations."""
    figure = Figure(figsize=(9, 3.8), dpi=150, facecolor=theme.paper, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_scores(left, evaluation, theme)
    _draw_latency(right, evaluation, theme)
    steps = sorted({m.evaluations for m in evaluation.models})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        _dress(axes, steps, "network evaluations per video", theme)
    if not evaluation.card.comparable:
        figure.suptitle(f"{NOT_COMPARABLE}: {'; '.join(evaluation.card.deviations)}", color=theme.ink, size=9)
    return _png(figure)


def chunks_png(
    curves: Mapping[str, ChunkCurves], theme: FigureTheme = LIGHT_FIGURE, colors: int = len(MARKERS)
) -> bytes:
    """Draw the groups of scores over the index of the chunk.

    Args:
        curves: Scores chunk by chunk, by label.
        theme: Colors.
        colors: How many curves, at most three, differ in color and marker; later ones repeat them dashed.
    """
    cycle = min(colors, len(MARKERS))
    names = list(next(iter(curves.values())).groups)
    figure = Figure(figsize=(4.5 * len(names), 3.8), dpi=150, facecolor=theme.paper, layout="constrained")
    for number, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), number + 1)
        for i, (label, curve) in enumerate(curves.items()):
            values = curve.groups[name]
            color, marker = theme.lines[i % cycle], MARKERS[i % cycle]
            style = STYLES[i // cycle % len(STYLES)]
            axes.plot(values, marker=marker, ls=style, color=color, ms=5, label=label)
        axes.set_title(f"{group_title(name)}, single frames (0 to 100)")
        most = max(len(curve.partition) for curve in curves.values())
        _dress(axes, range(most), "chunk", theme)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, loc="lower left")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_scores(axes: Axes, evaluation: Evaluation, theme: FigureTheme) -> None:
    names = ("total", *evaluation.measured[0].result.groups)
    for name, color, marker in zip(names, theme.lines, MARKERS, strict=True):
        known = [(m.evaluations, _score(m, name)) for m in evaluation.models]
        points = [(x, y) for x, y in known if y is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker + "-", color=color, label=group_title(name), ms=5)
        teacher = evaluation.teacher
        if teacher and (value := _score(teacher, name)) is not None:
            label = f"teacher {teacher.label}" if name == "total" else None
            axes.axhline(value, color=color, ls="--", lw=1.2, alpha=0.9, label=label)
    _draw_interval(axes, evaluation.models, theme)
    axes.set_title("score (0 to 100)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, loc="lower right")


def _score(one: Measured, name: str) -> float | None:
    return one.result.total if name == "total" else one.result.groups[name]


def _draw_interval(axes: Axes, models: list[Measured], theme: FigureTheme) -> None:
    bounds = [(m.evaluations, m.interval) for m in models]
    known = [(x, b.low, b.high) for x, b in bounds if b is not None]
    if known:
        x, low, high = zip(*known, strict=True)
        axes.fill_between(x, low, high, color=theme.lines[0], alpha=0.18, lw=0)


def _draw_latency(axes: Axes, evaluation: Evaluation, theme: FigureTheme) -> None:
    steps = [m.evaluations for m in evaluation.models]
    decoded = [m.seconds for m in evaluation.models]
    axes.plot(steps, decoded, "o-", color=theme.lines[0], ms=5, label="with decoding")
    network = [m.network_seconds for m in evaluation.models]
    axes.plot(steps, network, "s:", color=theme.lines[1], ms=5, label="network only")
    if evaluation.teacher:
        label = f"teacher {evaluation.teacher.label}"
        axes.axhline(evaluation.teacher.seconds, color=theme.lines[0], ls="--", lw=1.2, label=label)
    axes.set_yscale("log")
    axes.set_title("seconds per video")
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, loc="lower right")


def _dress(axes: Axes, ticks: Sequence[float], label: str, theme: FigureTheme) -> None:
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label, color=theme.ink)
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, lw=0.6)
    axes.tick_params(colors=theme.ink, which="both")
    axes.title.set_color(theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.faint)
