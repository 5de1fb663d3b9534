"""What ``doctor`` says of VBench: its environment, which dimensions can run, and what the others need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from anyflow_cli.evaluate.vbench.dimensions import VBENCH_DIMENSIONS
from anyflow_cli.evaluate.vbench.environment import COMMAND, Environment, is_there, open_environment, place
from anyflow_cli.evaluate.vbench.weights import NEEDS, default_directory, lacking
from anyflow_cli.recipe.schema import VBenchSection


def state_of(settings: VBenchSection) -> str:
    """In a few lines; one if there is no environment."""
    directory = place(settings.environment)
    if not is_there(directory):
        return f"not set up; for `evaluate --suite vbench` make {directory} with `{COMMAND}`"
    environment = open_environment(directory)
    weights = weights_in(settings)
    names = list(dict.fromkeys(d.name for dimensions in VBENCH_DIMENSIONS.values() for d in dimensions))
    missing = {name: _missing(environment, weights, name) for name in names}
    ready = [name for name in names if not missing[name]]
    versions = ", ".join(f"{name} {environment.versions[name]}" for name in ("vbench", "torch", "python"))
    lines = [
        f"{versions} in {directory}; weights in {weights}",
        f"{len(ready)} of {len(names)} dimensions can run: {', '.join(ready)}",
    ]
    return "\n".join([*lines, *_wanted(missing)])


def weights_in(settings: VBenchSection) -> Path:
    """Where the weights lie."""
    return default_directory() if settings.weights is None else Path(settings.weights).expanduser()


def _missing(environment: Environment, weights: Path, name: str) -> dict[str, str]:
    return lacking(NEEDS[name], weights, environment.modules, environment.devices > 0)


def _wanted(missing: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line a missing thing: how to get it, and which dimensions wait for it."""
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    for dimension, things in missing.items():
        for thing in things.items():
            waiting[thing].append(dimension)
    return [f"missing {thing} ({how}) for {', '.join(names)}" for (thing, how), names in waiting.items()]
