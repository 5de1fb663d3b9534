"""What a command needs before it can start, where each thing comes from, and whether it is there.

Only looks: nothing is loaded, fetched or made. So a dry run can speak on a machine without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from anyflow_cli.data.shards import MANIFEST
from anyflow_cli.model.pipeline_io import BUILT_IN
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.paths import MODEL, RunPaths
from anyflow_cli.utils.hub import is_cached, is_hub_name

State = Literal["there", "fetched at the start", "missing", "not there, and not needed"]
READY = ("there", "not there, and not needed")
PAPER_PROMPTS = "one prompt a line; give yours with --prompts"


class Requirement(NamedTuple):
    """A thing a command starts from; ``source`` says what makes it or where it comes from."""

    what: str
    place: str
    state: State
    source: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.place}: {self.state}" + (f" ({self.source})" if self.state != "there" else "")


def requirements_of(recipe: Recipe, paths: RunPaths, command: str) -> list[Requirement]:
    """Everything that a command of a recipe starts from; a command without needs of its own has none."""
    find = _FINDERS.get(command)
    return find(recipe, paths) if find else []


def missing_facts(recipe: Recipe, paths: RunPaths, command: str) -> dict[str, str]:
    """All that a command needs, as a dry run shows it; nothing if all of it is there."""
    needs = requirements_of(recipe, paths, command)
    if all(need.state in READY for need in needs):
        return {}
    return {f"needs {need.what}": str(need) for need in needs}


def _synthesize(recipe: Recipe, paths: RunPaths) -> list[Requirement]:
    teacher = _pipeline("teacher", recipe.synthesize.teacher or recipe.model.teacher)
    if recipe.data.prompts is None:
        return [teacher]
    file = Path(recipe.data.prompts)
    state: State = "there" if file.is_file() else "missing"
    return [Requirement("prompts", str(file), state, PAPER_PROMPTS), teacher]


def _train(recipe: Recipe, paths: RunPaths) -> list[Requirement]:
    return [_pipeline("teacher", recipe.model.teacher), _data(recipe, paths)]


def _distill(recipe: Recipe, paths: RunPaths) -> list[Requirement]:
    settings = recipe.distill
    start = _made(recipe, "start", settings.init_from, paths.stage_1() / MODEL, "anyflow train-flowmap")
    tuned = "anyflow train-flowmap --objective flow-matching"
    real = _made(recipe, "real score", settings.real_score, paths.stage_1("flow-matching") / MODEL, tuned)
    if real.state == "missing" and settings.real_score is None:
        source = f"without it the teacher is the real score; {real.source}"
        real = real._replace(state="not there, and not needed", source=source)
    return [*_train(recipe, paths), start, real]


def _any_step(recipe: Recipe, paths: RunPaths) -> list[Requirement]:
    if paths.any_step_model() is None and recipe.model.shipped is not None:
        return [_pipeline("model", recipe.model.shipped)]
    place = paths.any_step_model() or paths.stage_1() / MODEL
    return [_made(recipe, "model", None, place, "anyflow train-flowmap")]


_FINDERS: dict[str, Callable[[Recipe, RunPaths], list[Requirement]]] = {
    "synthesize": _synthesize,
    "train-flowmap": _train,
    "distill": _distill,
    "finetune": _any_step,
    "sample": _any_step,
    "evaluate": _any_step,
}


def _pipeline(what: str, address: str) -> Requirement:
    if address in BUILT_IN:
        return Requirement(what, address, "there", "shipped with anyflow")
    on_hub = is_hub_name(address)
    if Path(address).expanduser().is_dir() or (on_hub and is_cached(address)):
        return Requirement(what, address, "there", "")
    if on_hub:
        return Requirement(
            what, address, "fetched at the start", f"Hugging Face Hub; or first: hf download {address}"
        )
    return Requirement(what, address, "missing", "no such directory")


def _data(recipe: Recipe, paths: RunPaths) -> Requirement:
    if recipe.data.path and "://" in recipe.data.path:
        return Requirement("data", recipe.data.path, "fetched at the start", "batch by batch, while training")
    place = Path(recipe.data.path) if recipe.data.path else paths.data
    state: State = "there" if (place / MANIFEST).is_file() else "missing"
    return Requirement("data", str(place), state, f"anyflow synthesize -r {recipe.name}")


def _made(recipe: Recipe, what: str, given: str | None, place: Path, command: str) -> Requirement:
    """A model that is named in the recipe, else the one that a command leaves."""
    if given is not None:
        return _pipeline(what, given)
    state: State = "there" if place.is_dir() else "missing"
    return Requirement(what, str(place), state, f"{command} -r {recipe.name}")
