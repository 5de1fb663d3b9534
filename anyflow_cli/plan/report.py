"""A plan laid out for people: tables of memory, work and disk, and what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from anyflow_cli.plan.advice import Advice
from anyflow_cli.plan.estimate import CHECKPOINTING, Plan, StagePlan
from anyflow_cli.plan.hardware import RESERVE, Hardware
from anyflow_cli.plan.ladder import EVERYTHING_KEPT, rung_in_words
from anyflow_cli.plan.networks import role_sizes
from anyflow_cli.utils.units import GIB, duration, in_units, memory_size

PARTS = {
    "text encoder": "text encoder", "image encoder": "image encoder", "network": "network", "VAE": "VAE",
    "weights": "weights", "gradients": "gradients", "optimizer": "optimizer", "ema": "EMA", "data": "batch",
    "cache": "key-value cache", "activations": "activations",
}  # fmt: skip
SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FLOPS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"))


def as_table(plan: Plan) -> Table:
    """Everything, one block below another."""
    whole = Table.grid(padding=(0, 0, 1, 0))
    for block in (_head, _roles, _memory, _work, _disk, _needs, _notes):
        whole.add_row(block(plan))
    return whole


def _head(plan: Plan) -> Text:
    target, model = plan.target, plan.target.recipe.model
    text = Text(f"{target.recipe.name} on {target.hardware}", style="bold")
    buckets = len(target.recipe.synthesize.buckets)
    largest = f" (the largest of {buckets + 1} buckets)" if buckets else ""
    size = f"{model.frames} frames of {model.height}x{model.width}{largest}, {target.precision}"
    return text.append(f"\nteacher {model.teacher}; {size}", style="not bold")


def _roles(plan: Plan) -> Table:
    table = _table("Weights of stage 2", "role", "parameters", "trainable", "size")
    for name, size in role_sizes(plan.stages["distill"].setup).items():
        counts = f"{size['parameters']:,}", f"{size['trainable']:,}"
        table.add_row(name, *counts, memory_size(size["bytes"]))
    return table


def _memory(plan: Plan) -> Table:
    stages, kinds = list(plan.stages.values()), [stage.activations for stage in plan.stages.values()]
    unit, name = (GIB, "GiB") if any(stage.peak.total > GIB for stage in stages) else (2**20, "MiB")
    table = _table(f"Peak memory per process, {name}", "", *(stage.name for stage in stages))

    def row(label: str, sizes: Sequence[int | None], style: str = "", *, is_last: bool = False) -> None:
        cells = ("" if size is None else f"{size / unit:,.1f}" for size in sizes)
        table.add_row(label, *cells, style=style, end_section=is_last)

    for part, label in PARTS.items():
        sizes = [stage.peak.parts.get(part, 0) for stage in stages]
        if any(sizes):
            row(label, sizes)
    row("total", [stage.peak.total for stage in stages], "bold", is_last=True)
    yes, no = Text("yes", style="green"), Text("no", style="bold red")
    table.add_row("fits", *(yes if plan.target.fits(stage) else no for stage in stages))
    for label in CHECKPOINTING:
        row(f"activations {label}", [found.get(label) for found in kinds], "dim")
    row("rollout and its graph", [stage.rollout or None for stage in stages], "dim")
    if any(stage.host for stage in stages):
        row("in the host's memory", [stage.host or None for stage in stages], "dim")
    return table


def _work(plan: Plan) -> Table:
    hardware = plan.target.hardware
    table = _table("Work", "", "count", "FLOPs each", "time each", "total time", "command")
    for stage in plan.stages.values():
        seconds, hours = stage.seconds(hardware), stage.hours(hardware)
        times = ["unknown" if time is None else duration(time) for time in (seconds, hours and 3600 * hours)]
        count, flops = f"{stage.repeats:,}", in_units(stage.flops, FLOPS)
        table.add_row(stage.name, count, flops, *times, f"anyflow {stage.command}")
    return table


def _disk(plan: Plan) -> Table:
    table = _table("Disk", "", "size")
    for name, size in {**plan.disk, "total": sum(plan.disk.values())}.items():
        table.add_row(name, in_units(size, SIZES), style="bold" if name == "total" else "")
    return table


def _needs(plan: Plan) -> Table:
    table = _table("Needs", "command", "", "")
    for command, needs in plan.needs.items():
        for number, need in enumerate(needs):
            table.add_row("" if number else command, need.name, Text(str(need)))
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].overflow = "fold"
    return table


def _notes(plan: Plan) -> Text:
    hardware, recipe = plan.target.hardware, plan.target.recipe
    notes = [_advice(plan.stages[key], advice) for key, advice in plan.advice.items()]
    for stage in plan.stages.values():
        if stage.rung is not None and stage.rung != EVERYTHING_KEPT:
            notes.append(f"{stage.name}: {rung_in_words(stage.rung)}.")
        if not plan.target.fits_host(stage):
            has = memory_size(hardware.host or 0)
            notes.append(f"{stage.name}: {memory_size(stage.host)} per process do not fit the host's {has}.")
    if hardware.is_gpu:
        reserve = f"{RESERVE / GIB:.0f} GiB of each GPU are reserved for driver, libraries and fragmentation."
        setup = plan.stages["distill"].setup
        place = ", in the host's memory" if setup.offload else ""
        sharded = f"Weights, gradients and optimizer are sharded over {setup.shards} processes{place}."
        notes.append(f"{reserve} {'Nothing is sharded.' if setup.shards is None else sharded}")
    stage = plan.stages["distill"]
    if (context := stage.setup.context) > 1:
        shared = f"{context} processes share each video: each has {stage.tokens:,} of its tokens"
        notes.append(f"{shared}, and computes 1/{context} of every network evaluation.")
    if recipe.model.compile:
        notes.append("model.compile is not counted: neither its compile time nor the memory that it saves.")
    return Text("\n".join([*notes, _assumptions(hardware)]))


def _assumptions(hardware: Hardware) -> str:
    """What the times rest on."""
    if hardware.seconds(1) is None and not hardware.rates:
        return "Times are unknown: measure them with `anyflow bench`, or state a speed with --peak."
    speed = f"assume {hardware.mfu:.0%} of {(hardware.peak or 0) / 1e12:,.4g} TFLOPS"
    if hardware.rates:
        speed = "follow from the speeds that `anyflow bench` measured"
    return f"Times {speed} and count recomputation, but not reading data, previews, checkpoints and the VAE."


def _advice(stage: StagePlan, advice: Advice) -> str:
    settings = " ".join(map(str, advice.changes))
    prices = "; ".join(dict.fromkeys(change.price for change in advice.changes))
    at = f"{stage.name}: the peak is at {stage.peak.name}."
    if advice.fits:
        return f"{at} It fits with {settings} ({prices}): {memory_size(advice.peak)}."
    least = f" The lowest peak is {memory_size(advice.peak)}, with {settings}." if settings else ""
    return f"{at} No setting makes it fit; it needs larger GPUs.{least}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="cyan", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        is_text = number == 0 or column == "command"
        table.add_column(column, justify="left" if is_text else "right", no_wrap=is_text)
    return table
