"""Results for the terminal: a table of scores, and the trend in one sentence."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from anyflow_cli.evaluate.results import NOT_COMPARABLE, Evaluation, Measured, share_of_teacher
from anyflow_cli.evaluate.trend import LEVEL, Trend

NONE = "-"


def score_table(evaluation: Evaluation) -> Table:
    """What was asked, the scores, and the verdict, below each other."""
    whole = Table.grid()
    for part in (Text(headline(evaluation)), _scores(evaluation), Text(closing(evaluation))):
        whole.add_row(part)
    return whole


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
        "seconds a video": f"{one.seconds:.3g}",
        "  without decoding": f"{one.network_seconds:.3g}",
    }


def group_title(name: str) -> str:
    """As the literature writes it: Quality, Semantic, I2V."""
    return name.upper() if name == "i2v" else name.capitalize()


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
    missing = sorted({name for one in evaluation.measured for name in one.result.missing})
    gap = [f"No Total: no prompt tells of {', '.join(missing)}."] if missing else []
    return " ".join([*gap, *([verdict(evaluation.trend)] if evaluation.trend else [])])


def verdict(trend: Trend) -> str:
    """The trend in a sentence."""
    bounds = f"{trend.interval.low:+.1f} to {trend.interval.high:+.1f}"
    return (
        f"From {trend.fewest} to {trend.most} steps Total changes by {trend.change:+.1f} "
        f"({LEVEL:.0%} interval over prompts: {bounds}): {trend.verdict}."
    )


def number(value: float | None) -> str:
    """One decimal, or a dash for what was not measured."""
    return NONE if value is None else f"{value:.1f}"
