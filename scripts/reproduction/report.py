"""``docs/paper.md`` from the records: the tables beside the paper's, with intervals over prompts and seeds.

An interval is the central 95 % of a bootstrap that resamples the prompts, the same for all rows, and the
training seeds as a second level. With one seed it covers the prompts alone, and the table says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from reproduction.costs import cost_table
from reproduction.exactness import exactness_section
from reproduction.long_videos import long_section
from reproduction.measure import unpack, video_scores
from reproduction.paper_figures import FIGURES, exposure_bias
from reproduction.pictures import Difference, draw_differences
from reproduction.rows import KINDS, REFERENCE, ROWS, TABLES, Kind, Method

from anyflow_cli.evaluate.bootstrap import DRAW_COUNT, Draws, Interval, draw_seeds, draw_totals, interval
from anyflow_cli.evaluate.shapes.suite import ShapesSuite

PUBLISHED: Mapping[str, Mapping[Kind, tuple[float, float]]] = {
    # Overall of Table 2 at 4 and 32 evaluations (flow matching: 4x2 and 32x2)
    "flow-matching":                   {"bidirectional": (74.64, 83.83), "causal": (76.80, 83.50)},
    "flow-matching-fused":             {"causal": (76.80, 83.50)},
    "consistency-ode":                 {"bidirectional": (80.44, 82.86), "causal": (73.97, 77.55)},
    "flow-map":                        {"bidirectional": (81.75, 83.40), "causal": (80.48, 83.13)},
    "consistency-simulation":          {"bidirectional": (82.96, 79.80), "causal": (82.49, 79.48)},
    "flow-map-consistency-simulation": {"bidirectional": (83.55, 82.96), "causal": (82.99, 83.49)},
    "flow-map-simulation":             {"bidirectional": (83.48, 83.96), "causal": (83.54, 83.96)},
    # Fig. 10
    "uniform-weight-simulation":       {"bidirectional": (83.46, 83.75), "causal": (83.58, 83.91)},
    "normal-weight-simulation":        {"bidirectional": (83.40, 83.79), "causal": (83.54, 83.93)},
}  # fmt: skip
SAMPLERS = {"flow-map": "Euler on the flow map", "euler": "Euler", "consistency": "consistency",
            "teacher": "guided Euler"}  # fmt: skip
FINDINGS = "findings.md"  # beside the records: what the tables say, in words
STREAM = 0  # seeds of two rows are paired


@dataclass(frozen=True)
class Scored:
    """A row under one sampler at one step count, over its training seeds."""

    total: float
    draws: Draws
    seeds: tuple[int, ...]
    bounds: Interval

    def against(self, other: Scored) -> Difference:
        """The difference from another row, over the seeds that both have."""
        bounds = interval(self.draws - other.draws)
        assert bounds is not None
        return Difference(self.total - other.total, bounds)


@dataclass(frozen=True)
class Line:
    """A line of a table: a row under one sampler at one step count."""

    row: str
    kind: Kind
    method: Method
    steps: int
    found: Scored
    against: Difference | None

    @property
    def cells(self) -> list[str]:
        """Its cells, the paper's number last."""
        published = PUBLISHED.get(self.row, {}).get(self.kind)
        paper = str(published[(4, 32).index(self.steps)]) if published and self.steps in (4, 32) else ""
        label = f"{self.steps}x2" if self.method == "teacher" else str(self.steps)
        bounds = self.found.bounds
        return [ROWS[self.row].title, SAMPLERS[self.method], label, f"{self.found.total:.1f}",
                f"{bounds.low:.1f} to {bounds.high:.1f}", str(len(self.found.seeds)),
                str(self.against or ""), paper]  # fmt: skip


Records = Mapping[tuple[str, Kind], Sequence[Mapping[str, Any]]]


def read_records(directory: Path) -> Records:
    """All records by row and kind, in the order of their seeds."""
    found: dict[tuple[str, Kind], list[Mapping[str, Any]]] = {}
    for kind in KINDS:
        for path in sorted((directory / kind).glob("*.json")):
            record = json.loads(path.read_text())
            if record["row"] in ROWS:
                found.setdefault((record["row"], kind), []).append(record)
    return {key: sorted(records, key=lambda one: one["seed"]) for key, records in found.items()}


def scored(records: Sequence[Mapping[str, Any]], method: str, steps: int) -> Scored | None:
    """A row under one sampler, or None where no record has it."""
    points = [
        (record["seed"], point)
        for record in records
        for point in record["points"]
        if (point["method"], point["steps"]) == (method, steps)
    ]
    if not points:
        return None
    suite = ShapesSuite(ROWS[records[0]["row"]].world)
    each = [
        draw_totals(suite, (videos := video_scores(point["scores"], suite)), range(len(videos)))
        for _, point in points
    ]
    known = [draws for draws in each if draws is not None]
    draws = draw_seeds(known, STREAM) if len(known) == len(points) else np.full(DRAW_COUNT, np.nan)
    total = float(np.mean([point["total"] for _, point in points]))
    bounds = interval(draws) or Interval(np.nan, np.nan)
    return Scored(total, draws, tuple(seed for seed, _ in points), bounds)


def write_report(directory: Path, page: Path) -> None:
    """Write the page."""
    records = read_records(directory)
    findings = directory / FINDINGS
    lines = {title: {kind: lines_of(records, rows, kind) for kind in KINDS} for title, rows in TABLES.items()}
    sections = [introduction(records), at_a_glance(lines, directory)]
    if findings.is_file():
        sections.append(findings.read_text(encoding="utf-8").strip())
    for title, by_kind in lines.items():
        parts = [table_of(own, kind) for kind, own in by_kind.items() if own]
        if parts and title in FIGURES:
            parts = [*parts, *filter(None, [FIGURES[title](records, directory)])]
        if parts:
            sections.append(f"## {title}\n\n" + "\n\n".join(parts))
    sections += [embedding_norms(records), along_the_video(records, directory), cost_table(records)]
    sections += [long_section(records, directory), exactness_section(directory)]
    page.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")


def introduction(records: Records) -> str:
    """What the page is, what has run, and on which device."""
    done = [record for rows in records.values() for record in rows]
    devices = sorted({device for record in done for device in record["made"]["device"].split("; ")})
    planned = sum(len(row.kinds) * len(row.seeds) for row in ROWS.values())
    seconds = sum(record["processor_seconds"] for record in done)
    prompts = sorted({record["prompts"] for record in done})
    lines = [
        "# The paper in miniature",
        "Made by `python scripts/paper.py report` from the records in `docs/paper`; "
        "`python scripts/paper.py run` makes the records, and continues where it stopped. The model is the "
        "tiny one (1.8 million weights), the suite `shapes`, Total from 0 to 100.",
        f"**{len(done)} of {planned} cells have run**, {seconds / 3600:.1f} processor hours of training, on "
        f"{', '.join(devices) or 'no device'}. Rows without a record are left out.",
        "Unless its title says otherwise, a row of a command costs as many planned FLOPs as the row "
        f"`{REFERENCE['train-flowmap']}` or `{REFERENCE['distill']}`; prompts per score: "
        f"{', '.join(map(str, prompts)) or '384'}, the same for all. "
        "Intervals are the central 95 % of a bootstrap over prompts and, where there are several, over "
        "training seeds. Differences are paired by prompt and seed; bold ones exclude 0.",
    ]
    return "\n\n".join(wrapped(line) for line in lines)


def wrapped(text: str, width: int = 110) -> str:
    """Break a paragraph into lines."""
    lines, line = [], ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return "\n".join([*lines, line])


def at_a_glance(lines: Mapping[str, Mapping[Kind, Sequence[Line]]], directory: Path) -> str:
    """Differences from the reference rows of stage 1 and stage 2, drawn row by row; empty without any."""
    text = (
        "Each row against `flow-map` (stage 1) or `flow-map-simulation` (stage 2) at the same number of "
        "steps, with 95 % intervals and the number of seeds. A filled point excludes 0; an arrow stands for "
        "a loss beyond the axis."
    )
    pictures = []
    for kind in KINDS:
        groups = {title: differences_of(by_kind[kind]) for title, by_kind in lines.items()}
        groups = {title: entries for title, entries in groups.items() if entries}
        if groups:
            draw_differences(groups, directory / f"differences-{kind}.png", "difference in Total")
            pictures.append(f"{kind.capitalize()}:\n\n![{kind} rows](paper/differences-{kind}.png)")
    return "\n\n".join(["## At a glance", wrapped(text), *pictures]) if pictures else ""


def differences_of(lines: Sequence[Line]) -> dict[str, dict[int, Difference]]:
    """Differences by step count, by row and sampler."""
    found: dict[str, dict[int, Difference]] = {}
    for line in lines:
        if line.against is not None:
            row = ROWS[line.row]
            label = row.title + (f" [{SAMPLERS[line.method]}]" if len(row.sampled) > 1 else "")
            label += f" ({len(line.found.seeds)})"
            found.setdefault(label, {})[line.steps] = line.against
    return found


def table_of(lines: Sequence[Line], kind: Kind) -> str:
    """A table, with the paper's numbers and the difference from the reference."""
    head = ["row", "sampler", "steps", "Total", "95 %", "seeds", "against the reference", "paper"]
    return f"{kind.capitalize()}:\n\n" + markdown([head, *(line.cells for line in lines)])


def lines_of(records: Records, rows: Iterable[str], kind: Kind) -> list[Line]:
    """One line per sampler and step count of each row that has records."""
    return [line for row in rows if (row, kind) in records for line in _lines(records, row, kind)]


def _lines(records: Records, row: str, kind: Kind) -> Iterator[Line]:
    own, of = records[row, kind], ROWS[row]
    reference = records.get((REFERENCE.get(of.command or "distill", ""), kind), [])
    for sampled in of.sampled:
        for steps in sampled.steps:
            found = scored(own, sampled.method, steps)
            if found is None:
                continue
            against = None
            if own is not reference and of.world == "shapes":
                ours, theirs = common(own, reference)
                this, other = scored(ours, sampled.method, steps), scored(theirs, "flow-map", steps)
                against = None if this is None or other is None else this.against(other)
            yield Line(row, kind, sampled.method, steps, found, against)


def common(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """The records of two rows with seeds that both have."""
    both = {one["seed"] for one in first} & {one["seed"] for one in second}
    return [[one for one in records if one["seed"] in both] for records in (first, second)]


def embedding_norms(records: Records) -> str:
    """Fig. 11: the norm of the time embedding along training, relative to the start."""
    lines = []
    for row in ("flow-map", "zero-init"):
        for record in records.get((row, "bidirectional"), []):
            norms = [one["embedding_norm"] for one in record["metrics"] if "embedding_norm" in one]
            shown = " ".join(f"{norm / norms[0]:.2f}" for norm in norms)
            lines.append([ROWS[row].title, str(record["seed"]), shown])
    if not lines:
        return ""
    return "## Embedding norms (Fig. 11)\n\nNorm of the time embedding in each tenth of training, relative " \
        "to the first.\n\n" + markdown([["row", "seed", "norm"], *lines])  # fmt: skip


def along_the_video(records: Records, directory: Path) -> str:
    """Exposure bias: quality of the stills of each latent frame, causal rows."""
    lines = []
    for row in TABLES["Table 2"]:
        for record in records.get((row, "causal"), [])[:1]:
            for point in record["points"]:
                stills = 100 * np.nanmean(unpack(point["pieces"]), axis=0)
                shown = " ".join(f"{value:.0f}" for value in stills)
                lines.append([ROWS[row].title, SAMPLERS[point["method"]], str(point["steps"]), shown])
    if not lines:
        return ""
    head = ["row", "sampler", "steps", "quality of each latent frame"]
    picture = exposure_bias(records, directory)
    heading = "## Along the video (exposure bias)\n\nCausal rows, seed 0; the picture has all seeds."
    return "\n\n".join([heading, picture, markdown([head, *lines])])


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])
