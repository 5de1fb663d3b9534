"""Settings that would make a stage fit its device, tried one after another, mildest first.

A change is kept when it lowers the peak; the search ends when the stage fits, and what turns out not to be
needed is taken back. What a change costs in time or quality is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from anyflow_cli.plan.stages import Stage, Target
from anyflow_cli.recipe.schema import Recipe

Build = Callable[[Target], Stage]
RANKS = (128, 64, 32, 16)
FRAMES = (49, 33, 17)


@dataclass(frozen=True)
class Change:
    """Values for keys of the recipe that go together, and what they cost; a later one of a kind replaces."""

    kind: str
    values: Mapping[str, Any]
    price: str

    def __str__(self) -> str:
        """As it is written on the command line."""
        return " ".join(f"--set {key}={_in_yaml(value)}" for key, value in self.values.items())


@dataclass(frozen=True)
class Advice:
    """Changes that lower the peak, and whether the stage fits with all of them; ``peak`` is what it needs."""

    changes: tuple[Change, ...]
    fits: bool
    peak: int


def advise(build: Build, section: str, target: Target) -> Advice:
    """Make a stage fit, or come as near as these settings allow. ``section``: the recipe's, of the stage."""

    def peak(changes: Mapping[str, Change]) -> int:
        return build(replace(target, recipe=changed(target.recipe, changes.values()))).peak.total

    limit, kept, least = target.cluster.usable, dict[str, Change](), peak({})
    for change in changes_of(section, target.recipe):
        tried = {**kept, change.kind: change}
        if (needed := peak(tried)) < least:
            kept, least = tried, needed
        if least <= limit:
            break
    for kind in list(kept)[:-1] if least <= limit else ():
        fewer = {other: change for other, change in kept.items() if other != kind}
        if (needed := peak(fewer)) <= limit:
            kept, least = fewer, needed
    return Advice(tuple(kept.values()), least <= limit, least)


def changes_of(section: str, recipe: Recipe) -> Iterator[Change]:
    """What may be tried, mildest first."""
    if section in ("sample", "synthesize"):
        for size in _halves(getattr(recipe, section).batch):
            yield Change("batch", {f"{section}.batch": size}, "fewer videos at once")
    else:
        yield from _of_training(section, recipe)
    for frames in FRAMES:
        if frames < recipe.model.frames:
            yield Change("frames", {"model.frames": frames}, "shorter videos, of data made anew")


def _of_training(section: str, recipe: Recipe) -> Iterator[Change]:
    model, settings = recipe.model, getattr(recipe, section)
    if not model.gradient_checkpointing:
        yield Change("checkpointing", {"model.gradient_checkpointing": True}, "a third more time")
    for size in _halves(settings.micro_batch or settings.batch):
        yield Change("micro batch", {f"{section}.micro_batch": size}, "more and smaller passes")
    if settings.preview_every:
        yield Change("previews", {f"{section}.preview_every": 0}, "no previews")
    own = 2 * RANKS[0] if model.lora is None else model.lora.rank
    for rank in (*((own,) if model.lora is None else ()), *(rank for rank in RANKS if rank < own)):
        values = {"model.lora.rank": rank, "model.lora.alpha": rank}
        yield Change("adapters", values, "adapters of a lower rank than the paper's")


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def changed(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """The same recipe with other values, checked."""
    content = recipe.model_dump()
    for change in changes:
        for key, value in change.values.items():
            *sections, last = key.split(".")
            inner: dict[str, Any] = content
            for section in sections:
                inner[section] = inner = inner[section] or {}
            inner[last] = value
    return Recipe.model_validate(content)


def _in_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
