"""An evaluation as one self-contained HTML page: scores, figures, protocol card, and videos side by side.

Style, script, figures and videos are embedded, so opening the page loads nothing else. Prompts and addresses
are data and are escaped. Videos are embedded up to a size that a phone can open.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from anyflow_cli.evaluate.compare import Comparison
from anyflow_cli.evaluate.protocol import ProtocolCard
from anyflow_cli.evaluate.report.figures import DARK_FIGURE, LIGHT_FIGURE, FigureTheme, chunks_png, scores_png
from anyflow_cli.evaluate.report.tables import (
    NO_VALUE,
    conclusions,
    group_title,
    latex,
    markdown,
    number,
    protocol_line,
    published_rows,
    summary_cells,
)
from anyflow_cli.evaluate.results import NOT_COMPARABLE, Evaluation, Measured
from anyflow_cli.evaluate.store import COMPARISON, RESULTS, EvaluationDirectory, VideoRecord
from anyflow_cli.evaluate.suite import Suite
from anyflow_cli.evaluate.vbench.published import published_source

VIDEO_BYTES = 24 * 2**20  # of all videos on the page
WEAK_SCORE = 0.7  # lower scores are named below a video
HERE = Path(__file__).parent


def write_results(evaluation: Evaluation, suite: Suite, out: Path) -> dict[str, Path]:
    """Write ``results.json``, tables, figures and ``report.html``."""
    files = {
        RESULTS: _json(evaluation.as_json()),
        "scores.md": markdown(evaluation).encode(),
        "scores.tex": latex(evaluation).encode(),
        "report.html": render_page(evaluation, suite).encode(),
    }
    if evaluation.is_timed:
        files["scores.png"] = scores_png(evaluation)
    if curves := evaluation.curves:
        files["chunks.png"] = chunks_png(curves)
    return EvaluationDirectory(out).write(files)


def write_comparison(found: Comparison, out: Path) -> dict[str, Path]:
    """Write ``comparison.json``, and a figure of both sides where there are scores chunk by chunk."""
    curves = {
        f"{name}, {steps}": one
        for name, side in zip(found.names, found.chunks, strict=True)
        for steps, one in side.items()
    }
    files = {COMPARISON: _json(found.as_json())}
    if curves:
        files["comparison.png"] = chunks_png(curves)
    return EvaluationDirectory(out).write(files)


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def render_page(evaluation: Evaluation, suite: Suite) -> str:
    """Render the HTML document."""
    card = evaluation.card
    title = f"anyflow: {card.suite}, {card.recipe}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>{escape(protocol_line(card))}</p>",
        _warning(card),
        f"<div class=cards>{''.join(_headline(one) for one in evaluation.columns)}</div>",
        f"<p>{escape(conclusions(evaluation))}</p>",
        _figure(evaluation),
        _chunks(evaluation),
        f"<h2>All dimensions</h2>{_scores(evaluation, suite)}",
        _published(card.suite),
        f"<h2>Videos</h2>{_videos(evaluation)}",
        f"<h2>Protocol</h2>{_protocol(card)}",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('report.css')}</style>"
        f"<body>{''.join(body)}<script>{_asset('report.js')}</script></body></html>\n"
    )


def _warning(card: ProtocolCard) -> str:
    if card.comparable:
        return ""
    why = escape("; ".join(card.deviations))
    return f"<p class=warn><strong>{NOT_COMPARABLE.capitalize()}</strong> with other results: {why}.</p>"


def _headline(one: Measured) -> str:
    correct = "" if one.result.correct is None else f"<span>{one.result.correct:.0f} % all correct</span>"
    timed = f"<span>{one.seconds:.2g} s per video</span>" if one.steps else ""
    return (
        f"<div class=card>{escape(one.title)}<b>{number(one.result.total)}</b>"
        f"<div class=soft>{correct}{timed}</div></div>"
    )


def _figure(evaluation: Evaluation) -> str:
    if not evaluation.is_timed:
        return ""
    alt = "Scores and seconds per video over network evaluations; the table below has the numbers."
    return f"<h2>Scores and latency over steps</h2>{_themed(partial(scores_png, evaluation), alt)}"


def _chunks(evaluation: Evaluation) -> str:
    if not (curves := evaluation.curves):
        return ""
    alt = "Scores of the frames of each chunk, in order, at each step count."
    return f"<h2>Scores along the video</h2>{_themed(partial(chunks_png, curves), alt)}"


def _themed(draw: Callable[[FigureTheme], bytes], alt: str) -> str:
    """A figure in light and dark colors, scrollable on a narrow screen."""
    light, dark = (_data("image/png", draw(theme)) for theme in (LIGHT_FIGURE, DARK_FIGURE))
    dark_source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<div class=scroll><picture>{dark_source}<img src="{light}" alt="{alt}"></picture></div>'


def _scores(evaluation: Evaluation, suite: Suite) -> str:
    columns = evaluation.columns
    heads = "".join(f"<th scope=col>{escape(one.title)}</th>" for one in columns)
    cells = [summary_cells(one, evaluation) for one in columns]
    rows = [_row(name.strip(), [f"<td>{escape(cell[name])}</td>" for cell in cells]) for name in cells[0]]
    for group in suite.groups:
        rows.append(f"<tr class=group><th colspan={len(columns) + 1}>{escape(group_title(group))}</th></tr>")
        names = [dimension.name for dimension in suite.dimensions if dimension.group == group]
        rows += [_row(name, [_score(one.result.dimensions.get(name)) for one in columns]) for name in names]
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>"


def _score(value: float | None) -> str:
    """A number with a bar."""
    if value is None:
        return f"<td class=score>{NO_VALUE}</td>"
    width = min(max(value, 0.0), 100.0)
    return f'<td class=score>{value:.1f}<span class=bar><i style="width:{width:.1f}%"></i></span></td>'


def _published(suite: str) -> str:
    """The paper's results on this benchmark."""
    if not (others := published_rows(suite)):
        return ""
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in others[0][1:])
    rows = "".join(_row(name, [f"<td>{value}</td>" for value in values]) for name, *values in others[1:])
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    source = escape(published_source())
    return f"<h2>Published</h2><p class=soft>{source}</p><div class=scroll>{table}</div>"


def _videos(evaluation: Evaluation) -> str:
    """One section per video of the protocol, until the page is full."""
    columns = evaluation.columns
    blocks: list[str] = []
    room = VIDEO_BYTES
    for index, record in enumerate(columns[0].records):
        room -= sum(one.records[index].size for one in columns)
        if room < 0 and blocks:
            break
        shown = [_video(one, one.records[index], one.files[index].read_bytes()) for one in columns]
        heading = f"<h3>{escape(record.prompt)} <span class=soft>seed {record.seed}</span></h3>"
        blocks.append(f"<section class=prompt>{heading}<div class=videos>{''.join(shown)}</div></section>")
    total = len(columns[0].records)
    more = f"<p class=soft>{len(blocks)} of {total} shown.</p>" if len(blocks) < total else ""
    return "".join(blocks) + more


def _video(one: Measured, record: VideoRecord, file: bytes) -> str:
    label = escape(f"{one.title}: {record.prompt}", quote=True)
    wrong = [name for name, right in record.score.right.items() if not right]
    note = f" <span class=wrong>wrong: {escape(', '.join(wrong))}</span>" if wrong else ""
    weak = sorted(
        (s, name) for name, s in record.score.scores.items() if s < WEAK_SCORE and name not in wrong
    )
    low = f"; low: {escape(', '.join(name for _, name in weak[:3]))}" if weak else ""
    return (
        f'<figure><video src="{_data("video/mp4", file)}" aria-label="{label}" muted loop playsinline>'
        "</video>"
        f"<figcaption><strong>{escape(one.title)}</strong>{low}{note}</figcaption></figure>"
    )


def _protocol(card: ProtocolCard) -> str:
    content = card.as_json()
    plain = {name: value for name, value in content.items() if name not in ("models", "dimensions")}
    models = "".join(
        f"<details><summary>{escape(key)}</summary>{_list(values)}</details>"
        for key, values in content["models"].items()
    )
    return _list(plain) + models


def _list(values: dict[str, Any]) -> str:
    items = (
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_text(value))}</dd>"
        for name, value in values.items()
    )
    return f"<dl>{''.join(items)}</dl>"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or NO_VALUE
    if isinstance(value, list):
        return ", ".join(_text(inner) for inner in value) or NO_VALUE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NO_VALUE if value is None else str(value)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
