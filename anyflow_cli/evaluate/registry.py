"""From a recipe and the command line to a protocol: which suite, which of its prompts, how many videos.

Every way in which that is not the suite's own is a deviation, and makes the result not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from anyflow_cli.data.prompts import read_prompts
from anyflow_cli.data.video import ClipFormat
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.protocol import Protocol
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.vbench.dimensions import VBENCH_DIMENSIONS, Benchmark
from anyflow_cli.evaluate.vbench.environment import open_environment, place
from anyflow_cli.evaluate.vbench.prompts import (
    SAMPLES,
    Question,
    full_info_of,
    in_random_order,
    read_questions,
)
from anyflow_cli.evaluate.vbench.state import weights_in
from anyflow_cli.evaluate.vbench.suite import NOT_ASKED, VBenchSuite
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.files import json_sha256

log = logging.getLogger(__name__)


def protocol_for(settings: Recipe, file: Path | None = None, limit: int | None = None) -> Protocol:
    """What the recipe's suite asks; ``file``: own prompts, of which VBench has none but its own."""
    if settings.evaluate.suite == "shapes":
        return _shapes(settings, file, limit)
    if file is not None:
        raise UsageError(
            f"The suite {settings.evaluate.suite} has its own prompts.",
            "Sample with longer versions of them by --set evaluate.vbench.augmented=FILE.",
        )
    return _vbench(settings, settings.evaluate.suite, limit)


def _shapes(settings: Recipe, file: Path | None, limit: int | None) -> Protocol:
    suite = ShapesSuite(settings.data.world, settings.evaluate.task)
    texts = suite.prompts(settings.evaluate.prompts) if file is None else read_prompts(file)
    deviations = [] if file is None else [f"own prompts from {file}"]
    if limit is not None and limit < len(texts):
        deviations.append(f"only the first {limit} of {len(texts)} prompts")
        texts = texts[:limit]
    samples = settings.evaluate.samples or 1
    return Protocol(suite, tuple(texts), samples, settings.evaluate.seed, tuple(deviations))


def _vbench(settings: Recipe, benchmark: Benchmark, limit: int | None) -> Protocol:
    wanted, model = settings.evaluate.vbench, settings.model
    _check_dimensions(benchmark, wanted.dimensions)
    environment = open_environment(place(wanted.environment))
    full_info = full_info_of(benchmark, environment.full_info, wanted.full_info)
    everything = read_questions(full_info, wanted.augmented)
    asked = [q for q in everything if wanted.dimensions is None or q.dimensions & set(wanted.dimensions)]
    chosen = asked if limit is None else in_random_order(asked)[:limit]
    chosen.sort(key=lambda q: q.number)
    samples = settings.evaluate.samples or SAMPLES
    deviations = [f"only {limit} of {len(asked)} prompts"] if len(chosen) < len(asked) else []
    deviations += [f"{samples} instead of {SAMPLES} videos a prompt"] if samples != SAMPLES else []
    more = _more(chosen, wanted.flickering) if benchmark == "vbench" and samples == SAMPLES else {}
    suite = VBenchSuite(
        name=benchmark,
        questions=tuple(chosen),
        environment=environment,
        weights=weights_in(wanted),
        only=wanted.dimensions,
        seconds=wanted.seconds,
        pictures=_pictures(benchmark, wanted.images),
        shape=ClipFormat(1, model.fps, model.height, model.width),
    )
    unable = [name for name, why in suite.unavailable().items() if why != NOT_ASKED]
    if unable:
        log.warning("Cannot run here: %s. `anyflow doctor` says what they need.", ", ".join(unable))
    notes = {
        "full info": json_sha256([q.lines for q in everything]),
        "prompts sampled with": wanted.augmented or "the benchmark's own",
        "videos a prompt of temporal flickering": max([samples, *more.values()]),
        "dimensions asked for": list(wanted.dimensions or ["all"]),
    }
    return Protocol(
        suite=suite,
        prompts=tuple(q.text for q in chosen),
        samples=samples,
        seed=settings.evaluate.seed,
        deviations=tuple(deviations),
        numbers=tuple(q.number for q in chosen),
        more=more,
        notes=notes,
        titles=tuple(q.prompt for q in chosen),
    )


def _pictures(benchmark: Benchmark, setting: str | None) -> Path | None:
    return Path(setting).expanduser() if setting is not None and benchmark == "vbench-i2v" else None


def _more(chosen: Sequence[Question], flickering: int) -> dict[int, int]:
    """The prompts of temporal flickering, where they are to have more videos than the others."""
    if flickering <= SAMPLES:
        return {}
    return {q.number: flickering for q in chosen if "temporal_flickering" in q.dimensions}


def _check_dimensions(benchmark: Benchmark, names: Sequence[str] | None) -> None:
    known = [dimension.name for dimension in VBENCH_DIMENSIONS[benchmark]]
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise UsageError(f"{benchmark} has no dimension {', '.join(wrong)}.", f"It has {', '.join(known)}.")
