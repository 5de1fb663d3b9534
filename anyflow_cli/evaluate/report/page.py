"""An evaluation as one self-contained page: scores, figure, protocol card, and the videos side by side.

Nothing is fetched when it is opened: style, script, figures and videos are inside. Prompts and addresses are
data and are escaped. The page stops adding videos at a size that a phone still opens.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from anyflow_cli.evaluate.compare import Comparison
from anyflow_cli.evaluate.report.figures import DARK_FIGURE, LIGHT_FIGURE, FigureTheme, chunks_png, scores_png
from anyflow_cli.evaluate.report.tables import (
    NONE,
    asked,
    closing,
    group_title,
    latex,
    markdown,
    number,
    published_rows,
    row_of,
)
from anyflow_cli.evaluate.results import NOT_COMPARABLE, RESULTS, Evaluation, Measured
from anyflow_cli.evaluate.store import Scored
from anyflow_cli.evaluate.suite import Suite
from anyflow_cli.evaluate.vbench.published import SOURCE
from anyflow_cli.utils.files import atomic_write, write_json

MOST_BYTES = 24 * 2**20  # of videos on the page
WEAK = 0.7  # scores below this are named under the video
HERE = Path(__file__).parent


def write_results(evaluation: Evaluation, suite: Suite, out: Path) -> dict[str, Path]:
    """``results.json``, tables, figures and ``report.html``; each replaces an earlier one whole."""
    files: dict[str, bytes] = {
        "scores.md": markdown(evaluation).encode(),
        "scores.tex": latex(evaluation).encode(),
        "report.html": render_page(evaluation, suite).encode(),
    }
    if evaluation.is_timed:
        files["scores.png"] = scores_png(evaluation)
    curves = evaluation.curves
    if curves:
        files["chunks.png"] = chunks_png(curves)
    write_json(out / RESULTS, evaluation.as_json())
    return {RESULTS: out / RESULTS} | _written(files, out)


def write_comparison(found: Comparison, out: Path) -> dict[str, Path]:
    """``comparison.json``, and where the suite tells of chunks a figure of both sides."""
    curves = {
        f"{name}, {steps}": one
        for name, side in zip(found.names, found.chunks, strict=True)
        for steps, one in side.items()
    }
    write_json(out / "comparison.json", found.as_json())
    figure = {"comparison.png": chunks_png(curves)} if curves else {}
    return {"comparison.json": out / "comparison.json"} | _written(figure, out)


def _written(files: dict[str, bytes], out: Path) -> dict[str, Path]:
    for name, content in files.items():
        with atomic_write(out / name) as temporary:
            temporary.write_bytes(content)
    return {name: out / name for name in files}


def render_page(evaluation: Evaluation, suite: Suite) -> str:
    """The whole HTML document."""
    card = evaluation.card
    title = f"anyflow: {card['suite']}, {card['recipe']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>{escape(asked(card))}</p>",
        _warning(card),
        f"<div class=cards>{''.join(_headline(one) for one in evaluation.columns)}</div>",
        f"<p>{escape(closing(evaluation))}</p>",
        _figure(evaluation),
        _chunks(evaluation),
        f"<h2>Every dimension</h2>{_scores(evaluation, suite)}",
        _published(card["suite"]),
        f"<h2>Videos</h2>{_videos(evaluation)}",
        f"<h2>Protocol</h2>{_protocol(card)}",
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_asset('report.css')}</style>"
        f"<body>{''.join(body)}<script>{_asset('report.js')}</script></body></html>\n"
    )


def _warning(card: dict[str, Any]) -> str:
    if card["comparable"]:
        return ""
    why = escape("; ".join(card["deviations"]))
    return f"<p class=warn><strong>{NOT_COMPARABLE.capitalize()}</strong> with other results: {why}.</p>"


def _headline(one: Measured) -> str:
    correct = "" if one.result.correct is None else f"<span>{one.result.correct:.0f} % all as named</span>"
    timed = f"<span>{one.seconds:.2g} s a video</span>" if one.steps else ""
    return (
        f"<div class=card>{escape(one.title)}<b>{number(one.result.total)}</b>"
        f"<div class=soft>{correct}{timed}</div></div>"
    )


def _figure(evaluation: Evaluation) -> str:
    if not evaluation.is_timed:
        return ""
    alt = "Scores and seconds a video against network evaluations; the numbers are in the table below."
    drawn = _themed(partial(scores_png, evaluation), alt)
    return f"<h2>Scores and latency against steps</h2>{drawn}"


def _chunks(evaluation: Evaluation) -> str:
    """How quality changes along a causal model's videos."""
    if not (curves := evaluation.curves):
        return ""
    alt = "Scores of the frames of each chunk, first to last, at each number of steps."
    return f"<h2>Scores along the video</h2>{_themed(partial(chunks_png, curves), alt)}"


def _themed(draw: Callable[[FigureTheme], bytes], alt: str) -> str:
    """A figure in light and dark; a narrow screen scrolls it."""
    light, dark = (_data("image/png", draw(theme)) for theme in (LIGHT_FIGURE, DARK_FIGURE))
    dark_source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    return f'<div class=scroll><picture>{dark_source}<img src="{light}" alt="{alt}"></picture></div>'


def _scores(evaluation: Evaluation, suite: Suite) -> str:
    columns = evaluation.columns
    heads = "".join(f"<th scope=col>{escape(one.title)}</th>" for one in columns)
    rows = [*_summary_rows(evaluation, columns)]
    for group in suite.groups:
        rows.append(f"<tr class=group><th colspan={len(columns) + 1}>{escape(group_title(group))}</th></tr>")
        names = [dimension.name for dimension in suite.dimensions if dimension.group == group]
        rows += [_row(name, [_score(one.result.dimensions.get(name)) for one in columns]) for name in names]
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class=scroll>{table}</div>"


def _summary_rows(evaluation: Evaluation, columns: Sequence[Measured]) -> Iterator[str]:
    cells = [row_of(one, evaluation) for one in columns]
    for name in cells[0]:
        yield _row(name.strip(), [f"<td>{escape(cell[name])}</td>" for cell in cells])


def _row(name: str, cells: Sequence[str]) -> str:
    return f"<tr><th scope=row>{escape(name)}</th>{''.join(cells)}</tr>"


def _score(value: float | None) -> str:
    """A number with a bar."""
    if value is None:
        return f"<td class=score>{NONE}</td>"
    width = min(max(value, 0.0), 100.0)
    return f'<td class=score>{value:.1f}<span class=bar><i style="width:{width:.1f}%"></i></span></td>'


def _published(suite: str) -> str:
    """What the paper prints for other models on this benchmark."""
    if not (others := published_rows(suite)):
        return ""
    heads = "".join(f"<th scope=col>{escape(name)}</th>" for name in others[0][1:])
    rows = "".join(_row(name, [f"<td>{value}</td>" for value in values]) for name, *values in others[1:])
    table = f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>Published</h2><p class=soft>{escape(SOURCE)}</p><div class=scroll>{table}</div>"


def _videos(evaluation: Evaluation) -> str:
    """One block a prompt, until the page is full."""
    columns = evaluation.columns
    blocks: list[str] = []
    room = MOST_BYTES
    for rows in zip(*(one.scored for one in columns), strict=True):
        files = [
            (one.directory / record.file).read_bytes() for one, record in zip(columns, rows, strict=True)
        ]
        room -= sum(len(file) for file in files)
        if room < 0 and blocks:
            break
        shown = [_video(*entry) for entry in zip(columns, rows, files, strict=True)]
        heading = f"<h3>{escape(rows[0].prompt)} <span class=soft>seed {rows[0].seed}</span></h3>"
        blocks.append(f"<section class=prompt>{heading}<div class=videos>{''.join(shown)}</div></section>")
    total = len(columns[0].scored)
    more = f"<p class=soft>{len(blocks)} of {total} shown.</p>" if len(blocks) < total else ""
    return "".join(blocks) + more


def _video(one: Measured, record: Scored, file: bytes) -> str:
    label = escape(f"{one.title}: {record.prompt}", quote=True)
    wrong = [name for name, right in record.score.right.items() if not right]
    note = f" <span class=wrong>wrong: {escape(', '.join(wrong))}</span>" if wrong else ""
    weak = sorted((s, name) for name, s in record.score.scores.items() if s < WEAK and name not in wrong)
    low = f"; low: {escape(', '.join(name for _, name in weak[:3]))}" if weak else ""
    return (
        f'<figure><video src="{_data("video/mp4", file)}" aria-label="{label}" muted loop playsinline>'
        "</video>"
        f"<figcaption><strong>{escape(one.title)}</strong>{low}{note}</figcaption></figure>"
    )


def _protocol(card: dict[str, Any]) -> str:
    plain = {name: value for name, value in card.items() if name not in ("models", "dimensions")}
    models = "".join(
        f"<details><summary>{escape(key)}</summary>{_list(values)}</details>"
        for key, values in card["models"].items()
    )
    return _list(plain) + models


def _list(values: dict[str, Any]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(_text(value))}</dd>" for name, value in values.items())
    return f"<dl>{''.join(items)}</dl>"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or NONE
    if isinstance(value, list):
        return ", ".join(_text(inner) for inner in value) or NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NONE if value is None else str(value)


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
