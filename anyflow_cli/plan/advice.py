"""Settings that would make a stage fit its device, tried one after another, mildest first.

First the strongest value of each kind of setting, until the stage fits; then, from the last kind back, the
mildest value with which it still fits. Each change states what it costs in time or quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from anyflow_cli.plan.hardware import Hardware
from anyflow_cli.recipe.compare import with_values
from anyflow_cli.recipe.schema import Recipe, scales_of

RANKS = (256, 128, 64, 32, 16)
SHORTER_VIDEOS = (49, 33, 17)


class Change(NamedTuple):
    """Values for keys of the recipe that go together, and what they cost."""

    values: Mapping[str, Any]
    price: str

    def __str__(self) -> str:
        """As options of the command line."""
        values = {key: str(value).lower() if value is True else value for key, value in self.values.items()}
        return " ".join(f"--set {key}={value}" for key, value in values.items())


class Advice(NamedTuple):
    """Changes that lower the peak, whether the stage fits with all of them, and its peak with them."""

    changes: tuple[Change, ...]
    fits: bool
    peak: int


def advise(
    peak_of: Callable[[Recipe], int], section: str, recipe: Recipe, hardware: Hardware, budget: int
) -> Advice:
    """Find changes that make a stage fit, or bring it as near as they can.

    Args:
        peak_of: Bytes that the stage needs with a recipe.
        section: Section of the recipe with the stage's settings.
        recipe: The recipe as it is.
        hardware: What the stage runs on.
        budget: Bytes that the stage has to fit.
    """

    def peak(changes: Sequence[Change]) -> int:
        values = {key: value for change in changes for key, value in change.values.items()}
        return peak_of(with_values(recipe, values))

    kept, tried, least = list[Change](), list[Sequence[Change]](), peak([])
    for kind in kinds_of_change(section, recipe, hardware):
        if least > budget and (needed := peak([*kept, kind[-1]])) < least:
            kept, tried, least = [*kept, kind[-1]], [*tried, kind], needed
    for place in reversed(range(len(kept))) if least <= budget else ():
        for milder in ([], *([change] for change in tried[place][:-1])):
            changes = [*kept[:place], *milder, *kept[place + 1 :]]
            if (needed := peak(changes)) <= budget:
                kept, least = changes, needed
                break
    return Advice(tuple(kept), least <= budget, least)


def kinds_of_change(section: str, recipe: Recipe, hardware: Hardware) -> list[Sequence[Change]]:
    """Kinds of change, mildest first, each with its values, mildest first."""
    model, settings = recipe.model, getattr(recipe, section)
    if section in ("sample", "synthesize"):
        kinds = [_halves(f"{section}.batch_size", settings.batch_size, "fewer videos at once")]
    else:
        kinds = list(_of_training(section, recipe, hardware))
    shorter = [frames for frames in SHORTER_VIDEOS if frames < model.frames and model.causal is None]
    kinds.append([Change({"model.frames": one}, "shorter videos, of new data") for one in shorter])
    return [kind for kind in kinds if kind]


def _of_training(section: str, recipe: Recipe, hardware: Hardware) -> Iterator[list[Change]]:
    model, settings = recipe.model, getattr(recipe, section)
    if not model.gradient_checkpointing:
        yield [Change({"model.gradient_checkpointing": True}, "a third more time")]
    if section == "distill" and not settings.recompute_rollout:
        yield [Change({"distill.recompute_rollout": True}, "the rollout is computed twice")]
    # a recipe cannot combine sharding with guidance 1
    stages = (recipe.train_flowmap, recipe.distill, recipe.finetune)
    if all(1 not in scales_of(stage.flow_map.guidance) for stage in stages):
        full, sharding = {"launch.sharding": "full"}, list[Change]()
        if recipe.launch.sharding != "full" and hardware.count > 1:
            sharding.append(Change(full, "weights are exchanged block by block"))
        if hardware.is_gpu and not recipe.launch.offload:
            price, alone = "weights come from the host's memory: slow", hardware.count == 1
            sharded = {} if alone and model.lora is not None else full
            sharding.append(Change({**sharded, "launch.offload": True}, price))
        yield sharding
    size = settings.micro_batch or settings.global_batch
    yield _halves(f"{section}.micro_batch", size, "more and smaller passes")
    if settings.preview_every:
        yield [Change({f"{section}.preview_every": 0}, "no previews")]
    if settings.optimizer.states == "fp32":
        yield [Change({f"{section}.optimizer.states": "8bit"}, "moments in 8 bits, by torchao")]
    if model.lora is not None and model.base_weights == "full":
        yield [Change({"model.base_weights": "fp8"}, "the frozen base is rounded to fp8")]
    price = "adapters of a lower rank than the paper's" if model.lora else "adapters instead of all weights"
    ranks = [rank for rank in RANKS if model.lora is None or rank < model.lora.rank]
    yield [Change({"model.lora.rank": rank, "model.lora.alpha": rank}, price) for rank in ranks]


def _halves(key: str, size: int, price: str) -> list[Change]:
    return [Change({key: size >> shift}, price) for shift in range(1, size.bit_length())]
