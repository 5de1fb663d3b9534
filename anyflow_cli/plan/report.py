"""A plan laid out for people: tables of memory, work and disk, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from anyflow_cli.plan.estimate import Plan, Planned
from anyflow_cli.plan.hardware import RESERVE
from anyflow_cli.plan.setup import Setup
from anyflow_cli.plan.stages import Stage, activations
from anyflow_cli.utils.units import GIB

PARTS = ("weights", "gradients", "optimizer", "average", "data", "cache", "activations")
LONG = {"average": "moving average", "data": "batch", "cache": "cache of keys"}
DECIMAL = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
OPERATIONS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def as_table(plan: Plan) -> Table:
    """Everything, one block under another."""
    whole = Table.grid(padding=(0, 0, 1, 0))
    blocks = (_head, _roles, _memory, _work, _disk, _needs, _notes)
    for block in blocks:
        whole.add_row(block(plan))
    return whole


def _head(plan: Plan) -> Text:
    target, model = plan.target, plan.target.recipe.model
    text = Text(f"{target.recipe.name} on {target.cluster}", style="bold")
    size = f"{model.frames} frames of {model.height}x{model.width}, {target.precision}"
    text.append(f"\nteacher {model.teacher}; {size}", style="not bold")
    return text


def _roles(plan: Plan) -> Table:
    table = _table("Weights of stage 2", "role", "parameters", "trainable", "size")
    for name, size in plan.roles.items():
        table.add_row(name, f"{size.parameters:,}", f"{size.trainable:,}", _memory_of(size.bytes))
    return table


def _memory(plan: Plan) -> Table:
    stages = [planned.stage for planned in plan.stages.values()]
    unit = GIB if max(stage.peak.total for stage in stages) > GIB else 2**20
    name = "GiB" if unit == GIB else "MiB"
    table = _table(f"Memory of a process at its peak, {name}", "", *(stage.name for stage in stages))

    def row(label: str, sizes: Sequence[int | None], style: str = "", *, last: bool = False) -> None:
        cells = ("" if size is None else f"{size / unit:,.1f}" for size in sizes)
        table.add_row(label, *cells, style=style, end_section=last)

    for part in PARTS:
        sizes = [stage.peak.parts.get(part, 0) for stage in stages]
        if any(sizes) or part != "cache":
            row(LONG.get(part, part), sizes)
    row("in all", [stage.peak.total for stage in stages], "bold", last=True)
    table.add_row("fits", *(_fits(planned) for planned in plan.stages.values()))
    both = [activations(stage) for stage in stages]
    for label in ("with checkpointing", "without checkpointing"):
        row(f"activations {label}", [found.get(label) for found in both], "dim")
    row("rollout and its graph", [stage.rollout or None for stage in stages], "dim")
    if any(stage.host for stage in stages):
        row("in the CPU's memory", [stage.host or None for stage in stages], "dim")
    return table


def _fits(planned: Planned) -> Text:
    return Text("yes", style="green") if planned.fits else Text("no", style="bold red")


def _work(plan: Plan) -> Table:
    table = _table("Work", "", "count", "operations each", "time each", "time in all", "command")
    for planned in plan.stages.values():
        stage, work = planned.stage, planned.stage.work
        times = [None if time is None else _duration(time) for time in (work.seconds, _seconds(stage))]
        table.add_row(
            stage.name, f"{work.repeats:,}", _scaled(work.operations, OPERATIONS),
            *(time or "unknown" for time in times), f"anyflow {stage.command}",
        )  # fmt: skip
    return table


def _seconds(stage: Stage) -> float | None:
    return None if stage.work.hours is None else 3600 * stage.work.hours


def _disk(plan: Plan) -> Table:
    table = _table("Disk", "", "size")
    for name, size in plan.disk.items():
        table.add_row(name, _scaled(size, DECIMAL))
    table.add_row("in all", _scaled(sum(plan.disk.values()), DECIMAL), style="bold")
    return table


def _needs(plan: Plan) -> Table:
    table = _table("Needs", "command", "", "")
    for command, needs in plan.needs.items():
        for number, need in enumerate(needs):
            table.add_row(command if number == 0 else "", need.name, Text(str(need)))
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].overflow = "fold"
    return table


def _notes(plan: Plan) -> Text:
    cluster = plan.target.cluster
    notes = [
        f"{planned.stage.name}: the peak is at {planned.stage.peak.name}. {_advice(planned)}"
        for planned in plan.stages.values()
        if not planned.fits
    ]
    if cluster.is_gpu:
        notes.append(
            f"Of each GPU {RESERVE / GIB:.0f} GiB are left to the driver, the libraries and fragmentation. "
            + _division(plan.stages["distill"].stage.setup)
        )
    if plan.target.recipe.model.compile:
        notes.append(
            "model.compile is not counted: neither the time it takes, nor what fused operators save."
        )
    if cluster.peak is None:
        notes.append("Times are not known: state the speed of this machine with --peak.")
    else:
        notes.append(
            f"Times are those of {cluster.utilisation:.0%} of {cluster.peak / 1e12:,.4g} TFLOPS, "
            "recomputation counted; without reading data, previews, checkpoints and the VAE."
        )
    return Text("\n".join(notes))


def _division(setup: Setup) -> str:
    if setup.shards is None:
        return "Every process holds a whole copy: nothing is sharded."
    place = ", in the CPU's memory" if setup.offload else ""
    return f"Weights, gradients and optimizer are divided among {setup.shards} processes{place}."


def _advice(planned: Planned) -> str:
    advice = planned.advice
    assert advice is not None
    settings = " ".join(str(change) for change in advice.changes)
    prices = "; ".join(dict.fromkeys(change.price for change in advice.changes))
    if advice.fits:
        return f"It fits with {settings} ({prices}): {_memory_of(advice.peak)}."
    least = f" The least it can be brought to is {_memory_of(advice.peak)}, with {settings}."
    return f"No setting makes it fit; it needs larger GPUs.{least if settings else ''}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="cyan", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        left = number == 0 or column == "command"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    return table


def _memory_of(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size > GIB else f"{size / 2**20:,.1f} MiB"


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    for unit, name in units:
        if value >= unit:
            return f"{value / unit:,.1f} {name}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    for unit, name, limit in ((1.0, "s", 120), (60.0, "min", 120), (3600.0, "h", 96)):
        if seconds < limit * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:,.0f} days"
