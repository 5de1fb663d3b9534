"""The plan of a recipe: what each stage holds and takes, what would make it fit, what it leaves on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from anyflow_cli.plan import disk, stages
from anyflow_cli.plan.advice import Advice, advise
from anyflow_cli.plan.hardware import RESERVE, Hardware
from anyflow_cli.plan.stages import Stage, Target, target_of
from anyflow_cli.plan.steps import RoleSize
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.runs.resources import Resource, inputs


class Builder(NamedTuple):
    """How a stage is planned, and the section of the recipe that its settings are in."""

    build: Callable[[Target], Stage]
    section: str


BUILDERS = {
    "synthesize": Builder(stages.synthesis, "synthesize"),
    "tune": Builder(stages.tuning, "train_flowmap"),
    "train-flowmap": Builder(stages.stage_one, "train_flowmap"),
    "distill": Builder(stages.stage_two, "distill"),
    "finetune": Builder(stages.finetuning, "finetune"),
    "sample": Builder(stages.sampling, "sample"),
    "stream": Builder(stages.streaming, "sample"),
}
COMMANDS = ("synthesize", "train-flowmap", "distill", "sample")


def chain_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a plan; a step of finetune is one of stage 1."""
    chain = ("synthesize", "tune", "train-flowmap", "distill", "sample")
    return chain if recipe.model.causal is None else (*chain, "stream")


@dataclass(frozen=True)
class Planned:
    """A stage, and advice where it does not fit."""

    stage: Stage
    advice: Advice | None

    @property
    def fits(self) -> bool:
        """Whether it does as it is."""
        return self.advice is None


@dataclass(frozen=True)
class Plan:
    """All of a recipe on a cluster. ``disk``: bytes by what lies there; ``needs``: of each command."""

    target: Target
    stages: Mapping[str, Planned]
    disk: Mapping[str, int]
    needs: Mapping[str, Sequence[Resource]]

    @property
    def roles(self) -> Mapping[str, RoleSize]:
        """Of stage 2, which has all of them."""
        return self.stages["distill"].stage.roles


def plan(recipe: Recipe, cluster: Hardware, paths: RunPaths) -> Plan:
    """Plan the chain of a recipe, whose runs are in ``paths``."""
    target = target_of(recipe, cluster)
    planned = {name: plan_stage(target, name) for name in chain_of(recipe)}
    needs = {name: inputs(recipe, paths, name) for name in COMMANDS}
    return Plan(target, planned, _disk(target, planned), needs)


def plan_stage(target: Target, name: str) -> Planned:
    """Plan one stage, and look for settings that make it fit."""
    build, section = BUILDERS[name]
    stage = build(target)
    fits = stage.peak.total <= target.cluster.usable
    return Planned(stage, None if fits else advise(build, section, target))


def _disk(target: Target, planned: Mapping[str, Planned]) -> dict[str, int]:
    recipe = target.recipe
    found = {f"data: {part}": size for part, size in disk.dataset(target).items()}
    for name in ("tune", "train-flowmap", "distill"):
        stage = planned[name].stage
        settings = recipe.distill if name == "distill" else recipe.train_flowmap
        found[f"{stage.name}: checkpoints"] = disk.checkpoints(stage.roles, settings)
        found[f"{stage.name}: model"] = disk.finished(stage.setup, stage.roles)
    return found


def as_values(made: Plan) -> dict[str, Any]:
    """Everything as plain values, for ``--json``: bytes, operations, seconds, hours."""
    target, cluster = made.target, made.target.cluster
    return {
        "recipe": target.recipe.name,
        "teacher": target.recipe.model.teacher,
        "precision": target.precision,
        "cluster": {
            "devices": cluster.count, "memory": cluster.memory, "usable": cluster.usable,
            "reserve": RESERVE if cluster.is_gpu else 0, "peak": cluster.peak,
            "utilisation": cluster.utilisation,
        },
        "roles": {name: size._asdict() for name, size in made.roles.items()},
        "stages": {name: _stage_values(planned) for name, planned in made.stages.items()},
        "disk": dict(made.disk),
        "needs": {name: [need._asdict() for need in needs] for name, needs in made.needs.items()},
    }  # fmt: skip


def _stage_values(planned: Planned) -> dict[str, Any]:
    stage, advice = planned.stage, planned.advice
    values = {
        "command": f"anyflow {stage.command}",
        "memory": dict(stage.peak.parts),
        "peak": stage.peak.total,
        "at": stage.peak.name,
        "fits": planned.fits,
        "activations": stages.activations(stage),
        "rollout": stage.rollout,
        "host": stage.host,
        **stage.work._asdict(),
    }
    if advice is not None:
        settings = [f"{key}={value}" for change in advice.changes for key, value in change.values.items()]
        values["advice"] = {"set": settings, "fits": advice.fits, "peak": advice.peak}
    return values
