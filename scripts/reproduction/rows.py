"""The cells of the reproduction as one table: what a row starts from, its recipe keys, how it is sampled.

A cell is (row, kind, seed), trained with the recipe of its kind (``paper.yaml``, ``paper-causal.yaml``).
Nothing but recipe keys tells rows apart. A row that starts from another one uses
the model of the same kind and seed, so the cells are a graph, and stage 1 of a seed is trained once for all
rows of stage 2.

Every row of a command costs the same, unless it says which share: its number of steps follows from the
planned FLOPs of a step (``anyflow plan``) and those of the command's reference row.
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


@dataclass(frozen=True)
class LongSampled:
    """Videos of a causal model of several times the trained length.

    Attributes:
        length: How many times.
        switches: Whether another prompt follows half way.
        steps: Step count of each chunk.
    """

    length: int
    switches: bool = False
    steps: int = 4


OWN = (Sampled("flow-map"),)
LONG = (LongSampled(4), LongSampled(16), LongSampled(4, switches=True))
FEW = (Sampled("flow-map", (1, 4, 32)),)
CONSISTENCY = (Sampled("consistency"), Sampled("flow-map"))


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        title: Its name in tables.
        command: Command that trains it; None where a model is only measured.
        start: Row whose model it starts from, or measures; None: the teacher.
        changes: Recipe keys, laid over the recipe of the kind.
        sampled: How it is measured.
        long: How it is measured in long videos.
        model: Built-in model, where nothing is trained.
        world: World of the prompts.
        data: Data set that it trains on.
        kinds: Kinds that have the row.
        seeds: Seeds that have the row.
        share: Its cost as a share of what the reference row of the command costs.
    """

    title: str
    command: Command | None = "train-flowmap"
    start: str | None = None
    changes: Overrides = field(default_factory=dict)
    sampled: tuple[Sampled, ...] = OWN
    long: tuple[LongSampled, ...] = ()
    model: str | None = None
    world: str = "shapes"
    data: str = "guided"
    kinds: tuple[Kind, ...] = KINDS
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 1.0


@dataclass(frozen=True)
class Scale:
    """How large everything is: the paper's tables, or a rehearsal of the same code in minutes.

    Attributes:
        prompts: Prompts of a comparison, the same ones for every cell; of long videos an eighth.
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

SOME: tuple[Kind, ...] = ("bidirectional",)


def again(title: str, start: str, *sampled: Sampled, world: str = "shapes") -> Row:
    """The model of another row, measured in another way."""
    return Row(
        title, None, start, sampled=sampled, world=world, seeds=(0,) if world == "shapes" else (0, 1, 2)
    )


MORE_STEPS = (1, 2, 8, 16, 50)
FIGURE_1: Mapping[str, Row] = {
    f"{start}-scaling": again(TABLE_2[start].title, start, *(
        Sampled(sampled.method, MORE_STEPS) for sampled in TABLE_2[start].sampled))
    for start in ("flow-map", "flow-map-simulation", "consistency-simulation")
}  # fmt: skip
FIGURES_7_8: Mapping[str, Row] = {
    "shifted-flow-map": again("flow map, before", "flow-map-simulation", *OWN, world="shapes-shifted"),
    "shifted-consistency": again(
        "consistency, before", "consistency-simulation", *CONSISTENCY, world="shapes-shifted"),
    "finetune-flow-map": Row("flow map, after", "finetune", "flow-map-simulation", world="shapes-shifted"),
    "finetune-consistency": Row("consistency, after", "finetune", "consistency-simulation",
                                sampled=CONSISTENCY, world="shapes-shifted"),
}  # fmt: skip


def weighted(weight: str) -> dict[str, Row]:
    """Both stages with another w(t)."""
    keys = {f"{section}.flow_map.weight": weight for section in ("train_flowmap", "distill")}
    return {
        f"{weight}-weight": Row(f"flow map, w(t) {weight}", changes=keys),
        f"{weight}-weight-simulation": Row(
            f"flow map + flow-map simulation, w(t) {weight}", "distill", f"{weight}-weight", keys
        ),
    }


FIGURE_10 = {**weighted("uniform"), **weighted("normal")}
ZERO_INIT = {"model.conditioning": "zero-init"}
FIGURE_11 = {
    "zero-init": Row("zero-init conditioning", changes=ZERO_INIT, kinds=SOME),
    "zero-init-simulation": Row(
        "zero-init conditioning + flow-map simulation", "distill", "zero-init", ZERO_INIT, kinds=SOME
    ),
}


def stage_1(title: str, data: str = "guided", kinds: tuple[Kind, ...] = SOME, **flow_map: Any) -> Row:
    """Stage 1 with other keys of ``flow_map``."""
    keys = {f"train_flowmap.flow_map.{key}": value for key, value in flow_map.items()}
    return Row(title, changes=keys, data=data, kinds=kinds)


def stage_2(
    title: str,
    start: str = "flow-map",
    joint: Overrides | None = None,
    kinds: tuple[Kind, ...] = SOME,
    **distill: Any,
) -> Row:
    """Stage 2 with other keys of ``distill`` and of its joint loss."""
    keys = {f"distill.{key}": value for key, value in distill.items()}
    keys |= {f"distill.flow_map.{key}": value for key, value in (joint or {}).items()}
    return Row(title, "distill", start, keys, kinds=kinds)


# the data were made with guidance 1.5, and so is the teacher's velocity
TEACHER: dict[str, Any] = {"target": "teacher", "adaptive": "off", "guidance": 1.5}
BEYOND_1: Mapping[str, Row] = {
    "guided-path": stage_1("guided path", guidance_path="guided"),
    "weighted-scale": stage_1("Eq. 7 levels w(t) times the error, as released", loss_scale="weighted"),
    "adaptive-off": stage_1("no Eq. 7", adaptive="off"),
    "adaptive-group": stage_1("Eq. 7 by one factor", adaptive="group"),
    "fp32-derivative": stage_1("difference quotient in fp32", derivative_precision="fp32"),
    "composition": stage_1("composition", objective="composition"),
    "teacher": stage_1("teacher's velocity", **TEACHER),
    "composition-teacher": stage_1("composition, teacher's velocity", objective="composition", **TEACHER),
    "own-states": stage_1("composition, teacher's velocity, own states", objective="composition",
                          states="own", **TEACHER),
    "paired": stage_1("the noise that each video was made from, g = 1", kinds=KINDS, noise="paired",
                      guidance=1.0),
    "unguided-3": stage_1("unguided data, g = 3", "unguided", guidance=3.0),
    "unguided-3-guided-path": stage_1("unguided data, g = 3, guided path", "unguided", guidance=3.0,
                                      guidance_path="guided"),
}  # fmt: skip
COMPOSED = {"objective": "composition", **TEACHER}
BEYOND_2: Mapping[str, Row] = {
    "reuse": stage_2("samples reused", reuse_rollout=True),
    "fixed-steps": stage_2("one gradient step of four fixed ones (FastVideo)", simulation="fixed-steps"),
    "fake-updates-5": stage_2("5 fake updates on reused samples", reuse_rollout=True, fake_updates=5),
    "guided-until-0.7": stage_2("real score guided up to 0.7", real_guidance_until=0.7),
    "guidance-times": stage_2("guidance at times of its own (decoupled DMD)", guidance_times="own"),
    "orthogonal": stage_2("gradient orthogonal to the residual (PDMD)", matching_gradient="orthogonal"),
    "fake-free": stage_2("no fake score (FSF-DMD)", matching="fake-free"),
    "joint-composition": stage_2("joint loss: composition, teacher's velocity", joint=COMPOSED),
    "composition-simulation": stage_2(
        "composition, teacher's velocity in both stages", "composition-teacher", joint=COMPOSED),
    "composition-alone": stage_2(
        "composition, teacher's velocity in both stages, no matching", "composition-teacher",
        joint=COMPOSED, matching="none"),
}  # fmt: skip
ALONE = {"distill.joint": False}
PARTS: Mapping[str, Row] = {  # what separates consistency simulation in Table 2 from flow-map simulation
    "simulation-alone": Row("flow map + flow-map simulation, no joint loss", "distill", "flow-map", ALONE),
    "simulation-alone-0.6": Row(
        "flow map + flow-map simulation, no joint loss, 0.6 of the cost", "distill", "flow-map", ALONE,
        kinds=SOME, share=0.6),
    "ode-simulation-alone": Row(
        "consistency, ODE-init + flow-map simulation, no joint loss", "distill", "consistency-ode", ALONE),
    "ode-few-steps-alone": Row(
        "consistency, ODE-init + flow-map simulation of 1, 2 or 4 steps, no joint loss", "distill",
        "consistency-ode", {**ALONE, "distill.step_budgets": [1, 2, 4]}, FEW, kinds=SOME),
    "consistency-simulation-alone": Row(
        "flow map + consistency simulation, no joint loss", "distill", "flow-map",
        {**ALONE, "distill.simulation": "consistency"}, CONSISTENCY),
    "paired-simulation-alone": Row(
        "flow map on the videos' own noise, g = 1 + flow-map simulation, no joint loss", "distill", "paired",
        ALONE),
    "composition-simulation-alone": Row(
        "composition, teacher's velocity + flow-map simulation, no joint loss", "distill",
        "composition-teacher", ALONE, kinds=SOME),
}  # fmt: skip
BEYOND_CAUSAL: Mapping[str, Row] = {
    "replay": stage_2("self gradient forcing", kinds=("causal",), replay_rollout=True),
    "first-chunk": stage_2("first chunk at 4 or 8 steps", kinds=("causal",), first_chunk_budgets=[4, 8]),
}
LONGER = {"distill.rollout_frames": 129}  # four times the trained length
LONG_VIDEOS: Mapping[str, Row] = {
    "long-as-trained": Row(
        "flow map + flow-map simulation", None, "flow-map-simulation", sampled=(), long=LONG,
        kinds=("causal",)),
    "long-rollouts": Row("rollouts of up to 4 times the length", "distill", "flow-map", LONGER, long=LONG,
                         kinds=("causal",)),
    "long-rollouts-sink": Row(
        "rollouts of up to 4 times the length, the first chunk kept in full", "distill", "flow-map",
        {**LONGER, "model.causal.sink_chunks": 1}, long=LONG, kinds=("causal",)),
}  # fmt: skip

TABLES: Mapping[str, Mapping[str, Row]] = {
    "Table 2": TABLE_2,
    "The teacher": {
        "tiny": Row("teacher", None, sampled=(Sampled("teacher", (4, 50)),), model="tiny",
                    kinds=SOME, seeds=(0,)),
    },
    "Stage 1 beyond the paper": BEYOND_1,
    "Stage 2 beyond the paper": BEYOND_2,
    "The parts of stage 2": PARTS,
    "Causal stage 2 beyond the paper": BEYOND_CAUSAL,
    "Long videos": LONG_VIDEOS,
    "Fig. 10": FIGURE_10,
    "Fig. 11": FIGURE_11,
    "Figs. 7 and 8": FIGURES_7_8,
    "Fig. 1": FIGURE_1,
}  # fmt: skip
ROWS: Mapping[str, Row] = {name: row for table in TABLES.values() for name, row in table.items()}

REHEARSED: Mapping[Kind, tuple[str, ...]] = {  # by --quick: a row of each table, and what it starts from
    "bidirectional": (
        "flow-map", "consistency-ode", "flow-map-simulation", "consistency-simulation", "tiny",
        "composition-teacher", "fake-free", "simulation-alone", "uniform-weight", "zero-init",
        "finetune-flow-map", "flow-map-scaling",
    ),
    "causal": ("flow-map", "flow-map-simulation", "replay", "long-rollouts"),
}  # fmt: skip


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
