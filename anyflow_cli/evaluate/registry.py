"""From recipe and options to a protocol: which suite, which of its prompts, and how many videos.

Every difference from the suite's own protocol is a deviation and makes the result not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from anyflow_cli.data.prompts import read_prompts
from anyflow_cli.data.video import ClipFormat
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.protocol import Protocol, VBenchNotes
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.vbench.dimensions import FLICKERING, SAMPLES, VBENCH_DIMENSIONS, Benchmark
from anyflow_cli.evaluate.vbench.environment import environment_directory, open_environment
from anyflow_cli.evaluate.vbench.prompts import (
    BenchmarkPrompt,
    full_info_of,
    in_random_order,
    read_prompts_of,
)
from anyflow_cli.evaluate.vbench.suite import NOT_REQUESTED, VBenchSuite
from anyflow_cli.evaluate.vbench.weights import weights_directory
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.files import json_sha256

log = logging.getLogger(__name__)


def protocol_for(settings: Recipe, file: Path | None = None, limit: int | None = None) -> Protocol:
    """Build the protocol of the recipe's suite.

    Args:
        settings: The recipe.
        file: Prompts of the user, which VBench does not allow.
        limit: Only so many prompts.
    """
    if settings.evaluate.suite == "shapes":
        return _shapes(settings, file, limit)
    check_own_prompts(settings, file)
    return _vbench(settings, settings.evaluate.suite, limit)


def check_own_prompts(settings: Recipe, file: Path | None) -> None:
    """Raise a UsageError for prompts of the user on a suite that has its own."""
    if settings.evaluate.suite != "shapes" and file is not None:
        raise UsageError(
            f"The suite {settings.evaluate.suite} has its own prompts.",
            "Sample with longer versions of them by --set evaluate.vbench.augmented=FILE.",
        )


def _shapes(settings: Recipe, file: Path | None, limit: int | None) -> Protocol:
    suite = ShapesSuite(settings.data.world, settings.evaluate.task)
    if file is None:
        count = settings.evaluate.prompts
        texts = suite.prompts(count if limit is None else min(count, limit))
    else:
        texts = read_prompts(file)
        count, texts = len(texts), texts[:limit]
    deviations = [] if file is None else [f"own prompts from {file}"]
    if len(texts) < count:
        deviations.append(f"only the first {len(texts)} of {count} prompts")
    samples = settings.evaluate.samples or 1
    return Protocol(suite, tuple(texts), samples, settings.evaluate.seed, tuple(deviations))


def _vbench(settings: Recipe, benchmark: Benchmark, limit: int | None) -> Protocol:
    wanted, model = settings.evaluate.vbench, settings.model
    check_dimensions(benchmark, wanted.dimensions)
    environment = open_environment(environment_directory(wanted.environment))
    full_info = full_info_of(benchmark, environment.full_info, wanted.full_info)
    everything = read_prompts_of(full_info, wanted.augmented)
    requested = [p for p in everything if wanted.dimensions is None or p.dimensions & set(wanted.dimensions)]
    chosen = requested if limit is None else in_random_order(requested)[:limit]
    chosen.sort(key=lambda p: p.number)
    samples = settings.evaluate.samples or SAMPLES
    deviations = [f"only {limit} of {len(requested)} prompts"] if len(chosen) < len(requested) else []
    deviations += [f"{samples} instead of {SAMPLES} videos per prompt"] if samples != SAMPLES else []
    has_filter = benchmark == "vbench" and samples == SAMPLES
    more_samples = _more_samples(chosen, wanted.flickering) if has_filter else {}
    images = wanted.images if benchmark == "vbench-i2v" else None
    suite = VBenchSuite(
        name=benchmark,
        benchmark_prompts=tuple(chosen),
        environment=environment,
        weights=weights_directory(wanted.weights),
        only=wanted.dimensions,
        seconds=wanted.seconds,
        images_directory=None if images is None else Path(images).expanduser(),
        image_format=ClipFormat(1, model.fps, model.height, model.width),
    )
    unable = [name for name, why in suite.unavailable().items() if why != NOT_REQUESTED]
    if unable:
        log.warning("Cannot run here: %s. `anyflow doctor` lists what they need.", ", ".join(unable))
    return Protocol(
        suite=suite,
        prompts=tuple(p.text for p in chosen),
        samples=samples,
        seed=settings.evaluate.seed,
        deviations=tuple(deviations),
        numbers=tuple(p.number for p in chosen),
        more_samples=more_samples,
        notes=VBenchNotes(
            full_info=json_sha256([p.entries for p in everything]),
            sampled_prompts=wanted.augmented or "the benchmark's own",
            flickering_samples=max([samples, *more_samples.values()]),
            dimensions_requested=wanted.dimensions or ("all",),
        ),
        titles=tuple(p.prompt for p in chosen),
    )


def _more_samples(chosen: Sequence[BenchmarkPrompt], flickering: int) -> dict[int, int]:
    """Prompts of temporal flickering, where they need more videos than the others."""
    if flickering <= SAMPLES:
        return {}
    return {p.number: flickering for p in chosen if FLICKERING in p.dimensions}


def check_dimensions(benchmark: Benchmark, names: Sequence[str] | None) -> None:
    """Raise a UsageError for a dimension that the benchmark lacks."""
    known = [dimension.name for dimension in VBENCH_DIMENSIONS[benchmark]]
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise UsageError(
            f"{benchmark} does not have the dimension {', '.join(wrong)}.", f"It has {', '.join(known)}."
        )
