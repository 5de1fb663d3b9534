"""Comparison of two models on the same prompts and seeds: the difference of their Totals, paired by prompt.

A side is an evaluation that just ran, or one that was finished earlier. Only videos that both sides have are
compared. The bootstrap draws the same prompts for both, so that variation between prompts cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.bootstrap import Interval, draw_totals, interval
from anyflow_cli.evaluate.per_chunk import ChunkCurves, chunk_curves
from anyflow_cli.evaluate.results import Evaluation, read_results
from anyflow_cli.evaluate.store import RESULTS, VariantStore
from anyflow_cli.evaluate.suite import Suite, VideoScore, summarize

VideoScores = Mapping[tuple[str, int], VideoScore]  # by prompt and seed
ComparisonVerdict = Literal["better", "no difference", "worse", "too few prompts"]


@dataclass(frozen=True)
class Side:
    """One model's scores of single videos at each step count."""

    name: str
    suite: str
    version: int
    by_steps: Mapping[int, VideoScores]
    partition: tuple[int, ...] | None
    deviations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """Total of the second side minus that of the first, in points, at one step count.

    Attributes:
        steps: Step count.
        videos: Videos that both sides have.
        first: Total of the first side over these videos.
        second: Total of the second side over these videos.
        change: Their difference.
        interval: Confidence interval of the difference.
        finding: What the interval says about the second side.
    """

    steps: int
    videos: int
    first: float | None
    second: float | None
    change: float | None
    interval: Interval | None
    finding: ComparisonVerdict


@dataclass(frozen=True)
class Comparison:
    """Differences at all common step counts; ``chunks`` are each side's scores chunk by chunk, by steps."""

    names: tuple[str, str]
    suite: str
    differences: tuple[Difference, ...]
    chunks: tuple[dict[int, ChunkCurves], dict[int, ChunkCurves]]
    deviations: tuple[str, ...]  # of either side

    def as_json(self) -> dict[str, Any]:
        """Content of ``comparison.json`` and ``--json``."""
        return {"comparable": not self.deviations} | asdict(self)


def side_of(name: str, found: Evaluation) -> Side:
    """Take an evaluation that just ran as a side."""
    by_steps = {m.steps: {(r.prompt, r.seed): r.score for r in m.records} for m in found.models}
    card = found.card
    return Side(name, card.suite, card.suite_version, by_steps, found.partition, card.deviations)


def is_finished(address: str) -> bool:
    """Whether an address is the directory of a finished evaluation rather than a model."""
    return (Path(address).expanduser() / RESULTS).is_file()


def read_side(directory: Path) -> Side:
    """Read a finished evaluation as a side."""
    found = read_results(directory / RESULTS)
    first, last = found.card.seeds
    by_steps = {
        entry.steps: {
            key: record.score
            for key, record in VariantStore(directory / entry.directory).records().items()
            if first <= record.seed <= last
        }
        for entry in found.scores
        if not entry.teacher
    }
    card = found.card
    return Side(str(directory), card.suite, card.suite_version, by_steps, found.partition, card.deviations)


def compare(suite: Suite, first: Side, second: Side) -> Comparison:
    """Compare the second side with the first."""
    for side in (first, second):
        if (side.suite, side.version) != (suite.name, suite.version):
            raise UsageError(
                f"{side.name} was scored with {side.suite} {side.version}, not with {suite.name} "
                f"{suite.version}.",
                "Evaluate both with the same suite (--suite, --task) and the same version of anyflow.",
            )
    common = sorted(first.by_steps.keys() & second.by_steps.keys())
    pairs = [(steps, first.by_steps[steps], second.by_steps[steps]) for steps in common]
    differences = tuple(_difference(suite, *each) for each in pairs if each[1].keys() & each[2].keys())
    if not differences:
        raise UsageError(
            f"{first.name} and {second.name} have no video with the same prompt, seed and step count.",
            "Evaluate both with the same --nfe, --prompts and --seed.",
        )
    partition = first.partition or second.partition  # a bidirectional model is scored by the other's chunks
    return Comparison(
        (first.name, second.name),
        suite.name,
        differences,
        (_chunks(suite, first, partition), _chunks(suite, second, partition)),
        tuple(dict.fromkeys([*first.deviations, *second.deviations])),
    )


def _difference(suite: Suite, steps: int, first: VideoScores, second: VideoScores) -> Difference:
    keys = [key for key in first if key in second]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in keys))}
    prompts = [numbers[prompt] for prompt, _ in keys]
    sides = [[side[key] for key in keys] for side in (first, second)]
    a, b = (summarize(suite, scores).total for scores in sides)
    draws_a, draws_b = (draw_totals(suite, scores, prompts) for scores in sides)
    change = None if a is None or b is None else b - a
    bounds = None if draws_a is None or draws_b is None else interval(draws_b - draws_a)
    return Difference(steps, len(keys), a, b, change, bounds, _finding(bounds))


def _finding(bounds: Interval | None) -> ComparisonVerdict:
    if bounds is None:
        return "too few prompts"
    return "better" if bounds.low > 0 else "worse" if bounds.high < 0 else "no difference"


def _chunks(suite: Suite, side: Side, partition: tuple[int, ...] | None) -> dict[int, ChunkCurves]:
    scores: dict[int, Sequence[VideoScore]] = {n: list(v.values()) for n, v in side.by_steps.items()}
    found = {steps: chunk_curves(suite, each, partition) for steps, each in scores.items()}
    return {steps: one for steps, one in found.items() if one is not None}
