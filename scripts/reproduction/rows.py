"""The cells of the reproduction as one table: what a row starts from, its recipe keys, how it is sampled.

A cell is (row, kind, seed), trained with the recipe of its kind (``paper.yaml``, ``paper-causal.yaml``).
Nothing but recipe keys tells rows apart. A row that starts from another one uses
the model of the same kind and seed, so the cells are a graph, and stage 1 of a seed is trained once for all
rows of stage 2.

Every row of a command costs the same: its number of steps follows from the planned FLOPs of a step
(``anyflow plan``) and those of the command's reference row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bidirectional", "causal"]
Command = Literal["train-flowmap", "distill", "finetune"]
Method = Literal["flow-map", "euler", "consistency", "teacher"]
KINDS: tuple[Kind, ...] = ("bidirectional", "causal")
Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Sampled:
    """One way to sample a model: the sampler, and its step counts."""

    method: Method
    steps: tuple[int, ...] = (4, 32)


OWN = (Sampled("flow-map"),)
CONSISTENCY = (Sampled("consistency"), Sampled("flow-map"))


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        title: Its name in tables.
        command: Command that trains it; None for a model that is part of anyflow.
        start: Row whose model it starts from; None: the teacher.
        changes: Recipe keys, laid over the recipe of the kind.
        sampled: How it is measured.
        model: Built-in model, where nothing is trained.
        world: World of the prompts.
        data: Data set that it trains on.
        kinds: Kinds that have the row.
        seeds: Seeds that have the row.
    """

    title: str
    command: Command | None = "train-flowmap"
    start: str | None = None
    changes: Overrides = field(default_factory=dict)
    sampled: tuple[Sampled, ...] = OWN
    model: str | None = None
    world: str = "shapes"
    data: str = "guided"
    kinds: tuple[Kind, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Scale:
    """How large everything is: the paper's tables, or a rehearsal of the same code in minutes.

    Attributes:
        prompts: Prompts of a comparison, the same ones for every cell.
        steps: Steps of each command's reference row, per kind.
        common: Recipe keys of every cell, laid over its recipe.
        data: Recipe keys of every data set.
    """

    prompts: int
    steps: Mapping[Command, Mapping[Kind, int]]
    common: Overrides = field(default_factory=dict)
    data: Overrides = field(default_factory=dict)


REFERENCE: Mapping[Command, str] = {
    "train-flowmap": "flow-map",
    "distill": "flow-map-simulation",
    "finetune": "finetune-flow-map",
}

PAPER = Scale(
    prompts=384,
    steps={
        "train-flowmap": {"bidirectional": 300, "causal": 600},
        "distill": {"bidirectional": 150, "causal": 120},
        "finetune": {"bidirectional": 100, "causal": 100},
    },
)
QUICK = Scale(
    prompts=6,
    steps={command: {"bidirectional": 2, "causal": 2} for command in REFERENCE},
    common={
        "train_flowmap.global_batch": 8,
        "distill.global_batch": 4,
        "finetune.clips": 8,
        **{f"{stage}.log_every": 1 for stage in ("train_flowmap", "distill", "finetune")},
    },
    data={"synthesize.count": 16, "synthesize.steps": 2, "synthesize.shard_size": 8},
)

DATA: Mapping[str, Overrides] = {"guided": {}, "unguided": {"synthesize.guidance": 1.0}}

TABLE_2: Mapping[str, Row] = {
    "flow-matching": Row(
        "flow matching", changes={"train_flowmap.objective": "flow-matching",
                                  "sample.teacher_guidance": 1.5},
        sampled=(Sampled("teacher"),), kinds=("bidirectional",)),
    "flow-matching-fused": Row(
        "flow matching, guidance fused",
        changes={"train_flowmap.flow_map": {"boundary": 1.0, "to_zero": 0.0, "guidance": 1.5}},
        sampled=(Sampled("euler"),), kinds=("causal",)),
    "consistency-ode": Row(
        "consistency, ODE-init", changes={"train_flowmap.objective": "consistency-ode"}, sampled=CONSISTENCY),
    "flow-map": Row("flow map"),
    "flow-map-simulation": Row("flow map + flow-map simulation", "distill", "flow-map"),
    "joint-alone": Row(
        "flow map + joint loss alone, no matching", "distill", "flow-map", {"distill.matching": "none"}),
    "consistency-simulation": Row(
        "consistency, ODE-init + consistency simulation, no joint loss", "distill", "consistency-ode",
        {"distill.simulation": "consistency", "distill.joint": False}, CONSISTENCY),
    "flow-map-consistency-simulation": Row(
        "flow map + consistency simulation", "distill", "flow-map",
        {"distill.simulation": "consistency"}, CONSISTENCY),
}  # fmt: skip

TABLES: Mapping[str, Mapping[str, Row]] = {
    "models": {
        "teacher": Row("teacher", None, sampled=(Sampled("teacher", (4, 50)),), model="tiny",
                       kinds=("bidirectional",), seeds=(0,)),
    },
    "table-2": TABLE_2,
}  # fmt: skip
ROWS: Mapping[str, Row] = {name: row for table in TABLES.values() for name, row in table.items()}


@dataclass(frozen=True)
class Cell:
    """One trained and measured model."""

    row: str
    kind: Kind
    seed: int

    @property
    def name(self) -> str:
        """Path of its record below the directory of records, without the ending."""
        return f"{self.kind}/{self.row}-{self.seed}"

    @property
    def of(self) -> Row:
        """The row."""
        return ROWS[self.row]

    @property
    def start(self) -> Cell | None:
        """The cell whose model it starts from."""
        return None if self.of.start is None else Cell(self.of.start, self.kind, self.seed)


def cells() -> list[Cell]:
    """All cells in the order in which they answer something: per kind, seed by seed, starts first."""
    return [
        Cell(name, kind, seed)
        for kind in KINDS
        for seed in sorted({seed for row in ROWS.values() for seed in row.seeds})
        for name, row in ROWS.items()
        if kind in row.kinds and seed in row.seeds
    ]
