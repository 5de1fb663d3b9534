"""Two models on the same questions: the difference of their Totals, paired by prompt.

A side is an evaluation just made or one that lies finished in a directory. Videos are compared that both
sides have, by prompt and seed; prompts are drawn alike for both, so what is hard for both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.bootstrap import Interval, interval, totals
from anyflow_cli.evaluate.per_chunk import ChunkCurves, chunk_curves
from anyflow_cli.evaluate.results import RESULTS, Evaluation
from anyflow_cli.evaluate.store import Store
from anyflow_cli.evaluate.suite import Suite, VideoScore, summarise
from anyflow_cli.utils.files import read_json

VideoScores = Mapping[tuple[str, int], VideoScore]  # by prompt and seed
ComparedDimension = Literal["better", "no difference", "worse", "too few prompts to tell"]


@dataclass(frozen=True)
class Side:
    """One model's videos at each number of steps."""

    name: str
    suite: str
    version: int
    by_steps: Mapping[int, VideoScores]
    partition: tuple[int, ...] | None
    deviations: tuple[str, ...] = ()  # in what its protocol is not the suite's own


@dataclass(frozen=True)
class Difference:
    """Total of the second side less that of the first, in points, at one number of steps."""

    steps: int
    videos: int  # that both sides have
    first: float | None
    second: float | None
    change: float | None
    interval: Interval | None
    finding: ComparedDimension


@dataclass(frozen=True)
class Comparison:
    """Two sides at all the step counts that both have."""

    names: tuple[str, str]
    suite: str
    differences: tuple[Difference, ...]
    chunks: tuple[
        dict[int, ChunkCurves], dict[int, ChunkCurves]
    ]  # of each side, by steps; empty without pieces
    deviations: tuple[str, ...]  # of either side

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"comparable": not self.deviations} | asdict(self)


def side_of(name: str, found: Evaluation) -> Side:
    """What was just evaluated."""
    by_steps = {m.steps: {(r.prompt, r.seed): r.score for r in m.scored} for m in found.models}
    card = found.card
    deviations = tuple(card["deviations"])
    return Side(name, card["suite"], card["suite version"], by_steps, found.partition, deviations)


def is_finished(address: str) -> bool:
    """Whether an address is the directory of an evaluation, rather than a model."""
    return (Path(address).expanduser() / RESULTS).is_file()


def read_side(directory: Path) -> Side:
    """What an earlier evaluation left in its directory."""
    content = read_json(directory / RESULTS)
    try:
        card, entries = content["card"], [entry for entry in content["scores"] if not entry["teacher"]]
        first, last = card["seeds"]
        by_steps = {
            entry["steps"]: {
                (prompt, seed): record.score
                for (prompt, seed), record in Store(directory / entry["directory"]).read().items()
                if first <= seed <= last
            }
            for entry in entries
        }
        partition = content["partition"]
        version, suite, deviations = card["suite version"], card["suite"], tuple(card["deviations"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{directory / RESULTS} is not what this version of anyflow writes.", "Evaluate again."
        ) from error
    chunks = None if partition is None else tuple(partition)
    return Side(str(directory), suite, version, by_steps, chunks, deviations)


def compare(suite: Suite, first: Side, second: Side) -> Comparison:
    """The second side against the first."""
    for side in (first, second):
        if (side.suite, side.version) != (suite.name, suite.version):
            raise UsageError(
                f"{side.name} was scored by {side.suite} {side.version}, and not by {suite.name} "
                f"{suite.version}.",
                "Evaluate both with the same suite (--suite, --task) and version of anyflow.",
            )
    common = sorted(first.by_steps.keys() & second.by_steps.keys())
    pairs = [(steps, first.by_steps[steps], second.by_steps[steps]) for steps in common]
    differences = tuple(_difference(suite, *each) for each in pairs if each[1].keys() & each[2].keys())
    if not differences:
        raise UsageError(
            f"{first.name} and {second.name} have no video of the same prompt, seed and step count.",
            "Evaluate both with the same --nfe, --prompts and --seed.",
        )
    partition = first.partition or second.partition  # a model without chunks is told by the other's
    return Comparison(
        (first.name, second.name),
        suite.name,
        differences,
        (_chunks(suite, first, partition), _chunks(suite, second, partition)),
        tuple(dict.fromkeys([*first.deviations, *second.deviations])),
    )


def _difference(suite: Suite, steps: int, first: VideoScores, second: VideoScores) -> Difference:
    keys = [key for key in first if key in second]
    prompts = list(dict.fromkeys(prompt for prompt, _ in keys))
    numbers = [prompts.index(prompt) for prompt, _ in keys]
    sides = [[side[key] for key in keys] for side in (first, second)]
    a, b = (summarise(suite, scores).total for scores in sides)
    drawn_a, drawn_b = (totals(suite, scores, numbers) for scores in sides)
    change = None if a is None or b is None else b - a
    bounds = None if drawn_a is None or drawn_b is None else interval(drawn_b - drawn_a)
    return Difference(steps, len(keys), a, b, change, bounds, _finding(bounds))


def _finding(bounds: Interval | None) -> ComparedDimension:
    if bounds is None:
        return "too few prompts to tell"
    return "better" if bounds.low > 0 else "worse" if bounds.high < 0 else "no difference"


def _chunks(suite: Suite, side: Side, partition: tuple[int, ...] | None) -> dict[int, ChunkCurves]:
    scores: dict[int, Sequence[VideoScore]] = {n: list(v.values()) for n, v in side.by_steps.items()}
    found = {steps: chunk_curves(suite, each, partition) for steps, each in scores.items()}
    return {steps: one for steps, one in found.items() if one is not None}
