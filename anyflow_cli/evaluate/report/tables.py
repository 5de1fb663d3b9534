"""Tables of an evaluation for the terminal, Markdown and LaTeX, and its conclusions in sentences."""

from __future__ import annotations

import re

from rich.table import Table
from rich.text import Text

from anyflow_cli.evaluate.bootstrap import LEVEL, Interval, Trend
from anyflow_cli.evaluate.compare import Comparison
from anyflow_cli.evaluate.protocol import ProtocolCard
from anyflow_cli.evaluate.results import NOT_COMPARABLE, Evaluation, Measured, share_of_teacher
from anyflow_cli.evaluate.vbench.dimensions import GROUPS
from anyflow_cli.evaluate.vbench.published import published, published_source
from anyflow_cli.utils.user_text import escaped

NO_VALUE = "-"


def score_table(evaluation: Evaluation) -> Table:
    """Protocol, scores, conclusions and published results, below each other."""
    whole = Table.grid()
    for part in (Text(headline(evaluation)), _scores(evaluation), Text(conclusions(evaluation))):
        whole.add_row(part)
    if others := published_rows(evaluation.card.suite):
        whole.add_row(_published(*others))
    return whole


def _published(heads: list[str], *rows: list[str]) -> Table:
    table = Table(title=published_source(), title_justify="left")
    table.add_column("published")
    for name in heads[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def published_rows(suite: str) -> list[list[str]]:
    """The paper's results on this benchmark below a heading; empty for other suites."""
    if not (others := published(suite)):
        return []
    names = list(GROUPS[suite])
    return [["", "Total", *map(group_title, names)]] + [
        [row.title, *(f"{value:.2f}" for value in (row.total, *(row.groups[name] for name in names)))]
        for row in others
    ]


def _scores(evaluation: Evaluation) -> Table:
    """Scores in rows, step counts in columns."""
    table = Table()
    table.add_column("")
    for one in evaluation.columns:
        table.add_column(Text(one.title), justify="right")
    cells = [summary_cells(one, evaluation) for one in evaluation.columns]
    for name in cells[0]:
        table.add_row(name, *(cell[name] for cell in cells))
    table.add_section()
    for name in evaluation.card.dimensions:
        table.add_row(name, *(number(one.result.dimensions.get(name)) for one in evaluation.columns))
    return table


def summary_cells(one: Measured, evaluation: Evaluation) -> dict[str, str]:
    """Cells of one column by row heading, in order."""
    share = share_of_teacher(one, evaluation.teacher)
    bounds = one.interval
    return {
        "Total": number(one.result.total),
        f"  {LEVEL:.0%} interval": f"{bounds.low:.1f} to {bounds.high:.1f}" if bounds else NO_VALUE,
        "  share of teacher": NO_VALUE if share is None else f"{share:.1%}",
        **{group_title(name): number(mean) for name, mean in one.result.groups.items()},
        "all attributes correct, %": number(one.result.correct),
        "Fréchet distance": number(one.result.distance),
        **{name: number(value) for name, value in one.result.figures.items()},
        "seconds per video": f"{one.seconds:.3g}" if one.steps else NO_VALUE,
        "  network only": f"{one.network_seconds:.3g}" if one.steps else NO_VALUE,
    }


def group_title(name: str) -> str:
    """Spelling of a group in the literature: Quality, Semantic, I2V."""
    return name.upper() if name == "i2v" else name.capitalize()


def markdown(evaluation: Evaluation) -> str:
    """Protocol, scores, conclusions and published results in Markdown."""
    heads = ["", *(one.title for one in evaluation.columns)]
    rows = [[name.strip(), *cells] for name, cells in _rows(evaluation)]
    parts = [headline(evaluation), _pipes(heads, *rows), conclusions(evaluation)]
    if others := published_rows(evaluation.card.suite):
        parts += [f"Published: {published_source()}", _pipes(*others)]
    return escaped("\n\n".join(part for part in parts if part) + "\n")


def _pipes(heads: list[str], *rows: list[str]) -> str:
    """A Markdown table with numbers aligned to the right."""
    return "\n".join(
        f"| {' | '.join(row)} |" for row in (heads, ["---", *["---:"] * (len(heads) - 1)], *rows)
    )


def latex(evaluation: Evaluation) -> str:
    """Scores in LaTeX, with protocol and conclusions as comments; needs ``booktabs``."""
    columns = evaluation.columns
    body = [[name.strip(), *cells] for name, cells in _rows(evaluation)]
    lines = [
        " & ".join(_tex(cell) for cell in row) + r" \\" for row in (["", *(m.title for m in columns)], *body)
    ]
    comments = [headline(evaluation), *conclusions(evaluation).splitlines()]
    return "\n".join([
        *(f"% {' '.join(escaped(line).split())}" for line in comments),
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", lines[0], r"\midrule", *lines[1:],
        r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def comparison_table(found: Comparison) -> Table:
    """Step counts in rows: both Totals, their difference and the finding."""
    why = "; ".join(found.deviations)
    table = Table(caption=Text(f"{NOT_COMPARABLE} with other results: {why}") if why else None)
    for name in ("steps", *found.names, "difference", f"{LEVEL:.0%} interval", "videos", "the second is"):
        table.add_column(Text(name), justify="right")
    for one in found.differences:
        table.add_row(
            str(one.steps), number(one.first), number(one.second),
            NO_VALUE if one.change is None else f"{one.change:+.1f}",
            _signed(one.interval) if one.interval else NO_VALUE, str(one.videos), one.finding,
        )  # fmt: skip
    return table


def _rows(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Summary and dimensions, each with its cells."""
    cells = [summary_cells(one, evaluation) for one in evaluation.columns]
    summary = [(name, [cell[name] for cell in cells]) for name in cells[0]]
    return summary + [
        (name, [number(one.result.dimensions.get(name)) for one in evaluation.columns])
        for name in evaluation.card.dimensions
    ]


def _tex(text: str) -> str:
    return re.sub(r"([%&_#$])", r"\\\1", text)


def headline(evaluation: Evaluation) -> str:
    """The protocol in one line, and whether the scores are comparable with others."""
    card = evaluation.card
    if card.comparable:
        return protocol_line(card)
    return f"{protocol_line(card)}; {NOT_COMPARABLE} ({'; '.join(card.deviations)})"


def protocol_line(card: ProtocolCard) -> str:
    """Suite, number of prompts and videos per prompt."""
    prompts, videos = card.prompts, card.samples_per_prompt
    each = "one video" if videos == 1 else f"{videos} videos"
    return f"suite {card.suite}, {prompts} prompt{'' if prompts == 1 else 's'}, {each} per prompt"


def conclusions(evaluation: Evaluation) -> str:
    """The trend over step counts, and what is missing for a Total."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in {k: v for one in evaluation.measured for k, v in one.result.reasons.items()}.items():
        by_reason.setdefault(reason, []).append(name)
    gaps = [f"{', '.join(names)} ({why})" for why, names in by_reason.items()]
    missing = [f"There is no Total, because some dimensions are missing: {'; '.join(gaps)}."] if gaps else []
    return " ".join([*missing, *([trend_sentence(evaluation.trend)] if evaluation.trend else [])])


def trend_sentence(trend: Trend) -> str:
    """The trend in words, with a second sentence if the largest step count is not the best."""
    sentence = (
        f"From {trend.fewest} to {trend.most} steps Total changes by {trend.change:+.1f} "
        f"({LEVEL:.0%} interval over prompts: {_signed(trend.interval)}): {trend.verdict}."
    )
    if drop := trend.drop:
        sentence += (
            f" The best step count is {drop.best}; from there to {trend.most} steps Total changes by "
            f"{drop.change:+.1f} ({_signed(drop.interval)})."
        )
    return sentence


def _signed(bounds: Interval) -> str:
    return f"{bounds.low:+.1f} to {bounds.high:+.1f}"


def number(value: float | None) -> str:
    """Format a score with one decimal, or a dash if it is missing."""
    return NO_VALUE if value is None else f"{value:.1f}"
