"""Settings that would make a stage fit its device, tried one after another, mildest first.

First the strongest value of each kind of setting, until the stage fits; then, from the last kind back, the
mildest value with which it still does. What a change costs in time or quality is said beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from anyflow_cli.plan.stages import Stage, Target
from anyflow_cli.recipe.schema import Recipe

Build = Callable[[Target], Stage]
RANKS = (128, 64, 32, 16)
FRAMES = (49, 33, 17)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Values for keys of the recipe that go together, and what they cost."""

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
    log.info("Looking for settings with which %s fits.", section)

    def peak(changes: Sequence[Change]) -> int:
        return build(replace(target, recipe=changed(target.recipe, changes))).peak.total

    limit, kinds = target.cluster.usable, list[Sequence[Change]]()
    kept, least = list[Change](), peak([])
    for kind in kinds_of(section, target):
        if (needed := peak([*kept, kind[-1]])) < least:
            kept, least = [*kept, kind[-1]], needed
            kinds.append(kind)
        if least <= limit:
            break
    if least > limit:
        return Advice(tuple(kept), False, least)
    for place in reversed(range(len(kept))):
        kept, least = _milder(peak, limit, kept, place, kinds[place]) or (kept, least)
    return Advice(tuple(kept), True, least)


def _milder(
    peak: Callable[[Sequence[Change]], int],
    limit: int,
    kept: list[Change],
    place: int,
    kind: Sequence[Change],
) -> tuple[list[Change], int] | None:
    """Do without the change at ``place``, or with a milder one of its kind; None where neither fits."""
    for milder in ([], *([change] for change in kind[:-1])):
        tried = [*kept[:place], *milder, *kept[place + 1 :]]
        if (needed := peak(tried)) <= limit:
            return tried, needed
    return None


def kinds_of(section: str, target: Target) -> list[Sequence[Change]]:
    """What may be tried: kinds of change, mildest first, and values of each, mildest first."""
    kinds = _of_sampling if section in ("sample", "synthesize") else _of_training
    model = target.recipe.model
    shorter = [
        Change({"model.frames": frames}, "shorter videos, of data made anew")
        for frames in FRAMES
        if frames < model.frames and model.causal is None  # its chunks make up its frames
    ]
    return [kind for kind in (*kinds(section, target), shorter) if kind]


def _of_sampling(section: str, target: Target) -> Iterator[list[Change]]:
    batches = _halves(getattr(target.recipe, section).batch_size)
    yield [Change({f"{section}.batch_size": size}, "fewer videos at once") for size in batches]


def _of_training(section: str, target: Target) -> Iterator[list[Change]]:
    recipe = target.recipe
    model, settings = recipe.model, getattr(recipe, section)
    if not model.gradient_checkpointing:
        yield [Change({"model.gradient_checkpointing": True}, "a third more time")]
    if section == "distill" and not recipe.distill.recompute_rollout:
        yield [Change({"distill.recompute_rollout": True}, "the rollout is made twice")]
    yield _of_sharding(target)
    sizes = _halves(settings.micro_batch or settings.global_batch)
    yield [Change({f"{section}.micro_batch": size}, "more and smaller passes") for size in sizes]
    if settings.preview_every:
        yield [Change({f"{section}.preview_every": 0}, "no previews")]
    own = model.lora.rank if model.lora else 2 * RANKS[0] + 1
    price = "adapters of a lower rank than the paper's" if model.lora else "adapters instead of all weights"
    ranks = [rank for rank in (2 * RANKS[0], *RANKS) if rank < own]
    yield [Change({"model.lora.rank": rank, "model.lora.alpha": rank}, price) for rank in ranks]


def _of_sharding(target: Target) -> list[Change]:
    launch, full = target.recipe.launch, {"launch.sharding": "full"}
    stages = (target.recipe.train_flowmap, target.recipe.distill, target.recipe.finetune)
    if any(stage.flow_map.guidance == 1 for stage in stages):  # as a recipe says, they cannot be sharded
        return []
    changes = []
    if launch.sharding != "full" and target.cluster.count > 1:
        changes.append(Change(full, "weights are exchanged block by block"))
    if target.cluster.is_gpu and not launch.offload:
        changes.append(Change({**full, "launch.offload": True}, "weights come from the CPU's memory: slow"))
    return changes


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
