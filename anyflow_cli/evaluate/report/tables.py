"""Results for the terminal: a table of scores, and the trend in one sentence."""

from __future__ import annotations

import re
from typing import Any

from rich.table import Table
from rich.text import Text

from anyflow_cli.evaluate.bootstrap import LEVEL, Interval, Trend
from anyflow_cli.evaluate.compare import Comparison
from anyflow_cli.evaluate.results import NOT_COMPARABLE, Evaluation, Measured, share_of_teacher
from anyflow_cli.evaluate.vbench.dimensions import GROUPS
from anyflow_cli.evaluate.vbench.published import SOURCE, published

NONE = "-"


def score_table(evaluation: Evaluation) -> Table:
    """What was asked, the scores, the verdict, and what others published, below each other."""
    whole = Table.grid()
    for part in (Text(headline(evaluation)), _scores(evaluation), Text(closing(evaluation))):
        whole.add_row(part)
    if others := published_rows(evaluation.card["suite"]):
        whole.add_row(_published(*others))
    return whole


def _published(heads: list[str], *rows: list[str]) -> Table:
    table = Table(title=SOURCE, title_justify="left")
    table.add_column("published")
    for name in heads[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def published_rows(suite: str) -> list[list[str]]:
    """What the paper prints for other models on this benchmark, below a head; empty for other suites."""
    if not (others := published(suite)):
        return []
    names = list(GROUPS[suite])
    return [["", "Total", *map(group_title, names)]] + [
        [row.title(suite), *(f"{value:.2f}" for value in (row.total, *(row.groups[name] for name in names)))]
        for row in others
    ]


def _scores(evaluation: Evaluation) -> Table:
    """Scores in rows, step counts in columns."""
    table = Table()
    table.add_column("")
    for one in evaluation.columns:
        table.add_column(Text(one.title), justify="right")
    cells = [row_of(one, evaluation) for one in evaluation.columns]
    for name in cells[0]:
        table.add_row(name, *(cell[name] for cell in cells))
    table.add_section()
    for name in evaluation.card["dimensions"]:
        table.add_row(name, *(number(one.result.dimensions.get(name)) for one in evaluation.columns))
    return table


def row_of(one: Measured, evaluation: Evaluation) -> dict[str, str]:
    """The summary of one column, in order."""
    share = share_of_teacher(one, evaluation.teacher)
    bounds = one.interval
    return {
        "Total": number(one.result.total),
        f"  {LEVEL:.0%} interval": f"{bounds.low:.1f} to {bounds.high:.1f}" if bounds else NONE,
        "  of the teacher's": NONE if share is None else f"{share:.1%}",
        **{group_title(name): number(mean) for name, mean in one.result.groups.items()},
        "all as named, %": number(one.result.correct),
        "Fréchet distance": number(one.result.distance),
        "seconds a video": f"{one.seconds:.3g}" if one.steps else NONE,
        "  without decoding": f"{one.network_seconds:.3g}" if one.steps else NONE,
    }


def group_title(name: str) -> str:
    """As the literature writes it: Quality, Semantic, I2V."""
    return name.upper() if name == "i2v" else name.capitalize()


def markdown(evaluation: Evaluation) -> str:
    """The table for a README or an issue, with what was asked above it and the verdict below."""
    heads = ["", *(one.title for one in evaluation.columns)]
    rows = [[name.strip(), *cells] for name, cells in rows_of(evaluation)]
    parts = [headline(evaluation), _pipes(heads, *rows), closing(evaluation)]
    if others := published_rows(evaluation.card["suite"]):
        parts += [f"Published: {SOURCE}", _pipes(*others)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pipes(heads: list[str], *rows: list[str]) -> str:
    """A table of Markdown, its numbers to the right."""
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)
    )


def latex(evaluation: Evaluation) -> str:
    """The same for a paper; needs ``booktabs``."""
    columns = evaluation.columns
    body = [[name.strip(), *cells] for name, cells in rows_of(evaluation)]
    lines = [
        " & ".join(_tex(cell) for cell in row) + r" \\" for row in (["", *(m.title for m in columns)], *body)
    ]
    return "\n".join([
        f"% {headline(evaluation)}",
        *(f"% {line}" for line in closing(evaluation).splitlines()),
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
        r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def comparison_table(found: Comparison) -> Table:
    """Step counts in rows: both Totals, the difference and whether it is one."""
    why = "; ".join(found.deviations)
    table = Table(caption=f"{NOT_COMPARABLE} with other results: {why}" if why else None)
    for name in ("steps", *found.names, "difference", f"{LEVEL:.0%} interval", "videos", "the second is"):
        table.add_column(Text(name), justify="right")
    for one in found.differences:
        bounds = one.interval
        table.add_row(
            str(one.steps), number(one.first), number(one.second),
            NONE if one.change is None else f"{one.change:+.1f}",
            _bounds(bounds) if bounds else NONE, str(one.videos), one.finding,
        )  # fmt: skip
    return table


def rows_of(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Every row of the table: the summary, then the dimensions."""
    cells = [row_of(one, evaluation) for one in evaluation.columns]
    summary = [(name, [cell[name] for cell in cells]) for name in cells[0]]
    names = evaluation.card["dimensions"]
    return summary + [
        (name, [number(one.result.dimensions.get(name)) for one in evaluation.columns]) for name in names
    ]


def _tex(text: str) -> str:
    return re.sub(r"([%&_#$])", r"\\\1", text)


def headline(evaluation: Evaluation) -> str:
    """What was asked, and whether the numbers may be compared with others."""
    card = evaluation.card
    if card["comparable"]:
        return asked(card)
    return f"{asked(card)}; {NOT_COMPARABLE} ({'; '.join(card['deviations'])})"


def asked(card: dict[str, Any]) -> str:
    """The size of the question."""
    prompts, videos = card["prompts"], card["samples a prompt"]
    each = "one video" if videos == 1 else f"{videos} videos"
    return f"suite {card['suite']}, {prompts} prompt{'' if prompts == 1 else 's'}, {each} a prompt"


def closing(evaluation: Evaluation) -> str:
    """The verdict, and what is missing."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in {k: v for one in evaluation.measured for k, v in one.result.reasons.items()}.items():
        by_reason.setdefault(reason, []).append(name)
    gaps = [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]
    missing = [f"No Total, since these are missing: {'; '.join(gaps)}."] if gaps else []
    return " ".join([*missing, *([verdict(evaluation.trend)] if evaluation.trend else [])])


def verdict(trend: Trend) -> str:
    """The trend in a sentence, and a second one where the most steps are not the best."""
    sentence = (
        f"From {trend.fewest} to {trend.most} steps Total changes by {trend.change:+.1f} "
        f"({LEVEL:.0%} interval over prompts: {_bounds(trend.interval)}): {trend.verdict}."
    )
    if fall := trend.fall:
        sentence += (
            f" It is best at {fall.best} steps and changes by {fall.change:+.1f} from there to {trend.most} "
            f"({_bounds(fall.interval)})."
        )
    return sentence


def _bounds(bounds: Interval) -> str:
    return f"{bounds.low:+.1f} to {bounds.high:+.1f}"


def number(value: float | None) -> str:
    """One decimal, or a dash for what was not measured."""
    return NONE if value is None else f"{value:.1f}"
