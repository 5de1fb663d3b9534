"""From recipe and options to a protocol: which suite, which of its prompts, and how many videos.

Every difference from the suite's own protocol is a deviation and makes the result not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.data.prompts import read_prompts
from anyflow_cli.data.video import ClipFormat
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.protocol import EXTRA_SEEDS, Protocol, VBenchNotes
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.vbench.dimensions import (
    FLICKERING,
    SAMPLES,
    STATIC_SAMPLES,
    VBENCH_DIMENSIONS,
    Benchmark,
    prompt_and_video_counts,
)
from anyflow_cli.evaluate.vbench.environment import (
    SETUP_COMMAND,
    environment_directory,
    is_created,
    open_environment,
)
from anyflow_cli.evaluate.vbench.prompts import (
    full_info_of,
    in_random_order,
    read_prompts_of,
)
from anyflow_cli.evaluate.vbench.suite import NOT_REQUESTED, VBenchSuite
from anyflow_cli.evaluate.vbench.weights import REQUIREMENTS, missing_requirements, weights_directory
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.resources import Resource
from anyflow_cli.utils.files import json_sha256

MAX_VIDEOS = 10**6  # of one model at one step count
SEED_END = 2**63

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProtocolOutline:
    """Size of a protocol, known without the benchmark's environment.

    Attributes:
        suite: Name of the suite.
        dimensions: What it measures.
        prompts: Number of prompts.
        videos: Videos of one model at one step count.
        is_complete: Whether these are all prompts and videos of the suite.
    """

    suite: str
    dimensions: tuple[str, ...]
    prompts: int
    videos: int
    is_complete: bool


def outline(settings: Recipe, file: Path | None = None, limit: int | None = None) -> ProtocolOutline:
    """Count prompts and videos of the protocol that ``protocol_for`` builds.

    Raises:
        UsageError: There are more than MAX_VIDEOS, or more than there are seeds.
    """
    evaluate = settings.evaluate
    if evaluate.suite == "shapes":
        suite = ShapesSuite(settings.data.world, evaluate.task)
        name, dimensions = suite.name, suite.dimensions
        whole = evaluate.prompts if file is None else len(read_prompts(file))
        samples = evaluate.samples or 1
        videos, is_complete = whole * samples, file is None
    else:
        wanted = evaluate.vbench
        _check_vbench(evaluate.suite, wanted.dimensions, file)
        name, dimensions = evaluate.suite, VBENCH_DIMENSIONS[evaluate.suite]
        samples = evaluate.samples or SAMPLES
        whole, videos = prompt_and_video_counts(name, wanted.dimensions, samples, wanted.flickering)
        is_complete = samples == SAMPLES
    prompts = whole if limit is None else min(whole, limit)
    if prompts < whole:  # of which prompts have more videos than others is known once they are chosen
        videos = prompts * samples
    if videos > MAX_VIDEOS or evaluate.seed + max(videos, EXTRA_SEEDS + whole * STATIC_SAMPLES) >= SEED_END:
        raise UsageError(
            f"{prompts:,} prompts with {samples:,} videos each, from seed {evaluate.seed}, are more than the "
            f"{MAX_VIDEOS:,} videos or the seeds there are.",
            "Lower --limit, evaluate.prompts, evaluate.samples or --seed.",
        )
    names = tuple(dimension.name for dimension in dimensions)
    return ProtocolOutline(name, names, prompts, videos, is_complete and prompts == whole)


def suite_resources(settings: Recipe) -> list[Resource]:
    """What the recipe's suite needs on this machine; nothing for the built-in one."""
    if settings.evaluate.suite == "shapes":
        return []
    benchmark, wanted = settings.evaluate.suite, settings.evaluate.vbench
    directory = environment_directory(wanted.environment)
    found = [Resource("VBench environment", str(directory), "ready")]
    if not is_created(directory):
        how = f"create it with `{SETUP_COMMAND}` (2.2 GB from PyPI)"
        found = [Resource("VBench environment", str(directory), "missing", how)]
    if benchmark == "vbench-i2v":
        how = "download vbench2_i2v_full_info.json from VBench's repository"
        found.append(_file_resource("VBench-I2V prompts", wanted.full_info, "evaluate.vbench.full_info", how))
        how = "crop VBench-I2V's images to your aspect ratio"
        found.append(_file_resource("VBench-I2V images", wanted.images, "evaluate.vbench.images", how))
    weights = weights_directory(wanted.weights)
    names = [d.name for d in VBENCH_DIMENSIONS[benchmark] if d.name in (wanted.dimensions or REQUIREMENTS)]
    modules = [module for needs in REQUIREMENTS.values() for module, _ in needs.modules]
    lacking = [n for n in names if missing_requirements(REQUIREMENTS[n], weights, modules, cuda=True)]
    how = f"`anyflow doctor` lists what {len(lacking)} of {len(names)} dimensions lack; they are left out"
    if lacking:
        return [*found, Resource("VBench weights", str(weights), "optional", how)]
    return [*found, Resource("VBench weights", str(weights), "ready")]


def _file_resource(name: str, setting: str | None, key: str, how: str) -> Resource:
    if setting is not None and Path(setting).expanduser().exists():
        return Resource(name, setting, "ready")
    return Resource(name, setting or key, "missing", f"{how}, and name it with --set {key}=PATH")


def protocol_for(settings: Recipe, file: Path | None = None, limit: int | None = None) -> Protocol:
    """Build the protocol of the recipe's suite.

    Args:
        settings: The recipe.
        file: Prompts of the user, which VBench does not allow.
        limit: Only so many prompts.
    """
    outline(settings, file, limit)
    if settings.evaluate.suite == "shapes":
        return _shapes(settings, file, limit)
    return _vbench(settings, settings.evaluate.suite, limit)


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
    environment = open_environment(environment_directory(wanted.environment))
    full_info = full_info_of(benchmark, environment.full_info, wanted.full_info)
    everything = read_prompts_of(full_info, wanted.augmented)
    requested = [p for p in everything if wanted.dimensions is None or p.dimensions & set(wanted.dimensions)]
    chosen = requested if limit is None else in_random_order(requested)[:limit]
    chosen.sort(key=lambda p: p.number)
    samples = settings.evaluate.samples or SAMPLES
    deviations = [f"only {limit} of {len(requested)} prompts"] if len(chosen) < len(requested) else []
    deviations += [f"{samples} instead of {SAMPLES} videos per prompt"] if samples != SAMPLES else []
    has_filter = benchmark == "vbench" and samples == SAMPLES < wanted.flickering
    flickering = [p.number for p in chosen if FLICKERING in p.dimensions] if has_filter else []
    more_samples = dict.fromkeys(flickering, wanted.flickering)
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


def _check_vbench(benchmark: Benchmark, names: Sequence[str] | None, file: Path | None) -> None:
    """Raise a UsageError for prompts of the user, or a dimension that the benchmark lacks."""
    if file is not None:
        raise UsageError(
            f"The suite {benchmark} has its own prompts.",
            "Sample with longer versions of them by --set evaluate.vbench.augmented=FILE.",
        )
    known = [dimension.name for dimension in VBENCH_DIMENSIONS[benchmark]]
    wrong = [name for name in names or () if name not in known]
    if wrong:
        raise UsageError(
            f"{benchmark} does not have the dimension {', '.join(wrong)}.", f"It has {', '.join(known)}."
        )
