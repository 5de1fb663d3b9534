"""A benchmark as a table for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from anyflow_cli.bench.record import ITERATIONS, VIDEO_STEPS, WHOLE_VIDEO, Bench, Row
from anyflow_cli.utils.units import GIB, memory_size


def bench_table(bench: Bench) -> Table:
    """Head, measurements, and what the columns mean."""
    table = Table(title=_head(bench), title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    has_peaks = any(row.peak for row in bench.rows.values())
    columns = ["seconds", "of the limit", "TFLOPS", "diffusers", "ratio"]
    for column in columns + ["peak", "planned"] * has_peaks:
        table.add_column(column, justify="right")
    for name, row in bench.rows.items():
        cells = _cells(row) + [_size(row.peak), _size(row.planned)] * has_peaks
        label = f"{name}, batch {bench.batches[name]}" if name in ITERATIONS else name
        table.add_row(label, *cells)
    whole = Table.grid(padding=(0, 0, 1, 0))
    whole.add_row(table)
    whole.add_row(_notes(bench))
    return whole


def _head(bench: Bench) -> Text:
    machine = bench.machine
    threads = f", {machine.threads} threads" if machine.threads else ""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    text = Text(f"{bench.recipe} on {machine.device}{threads}", style="bold")
    return text.append(f"\n{bench.precision}, {versions}", style="not bold")


def _cells(row: Row) -> list[str]:
    share = f"{row.floor / row.seconds:.0%}" if row.floor else ""
    speed = f"{row.flops / row.seconds / 1e12:.3g}" if row.flops else ""
    theirs, ratio = (
        (f"{row.diffusers:.4g}", f"{row.diffusers / row.seconds:.2f}x") if row.diffusers else ("", "")
    )
    return [f"{row.seconds:.4g}", share, speed, theirs, ratio]


def _size(size: int | None) -> str:
    return "" if size is None else memory_size(size)


def _notes(bench: Bench) -> Text:
    machine = bench.machine
    product, copy = f"{machine.flops / 1e12:.4g} TFLOPS", f"{machine.bandwidth / GIB:.4g} GiB per second"
    lines = [
        f"A matrix product reaches {product} here, and a copy {copy}. The limit is the longer of two times:",
        "what the necessary FLOPs take at the first speed, and the necessary bytes at the second.",
    ]
    if WHOLE_VIDEO in bench.rows:
        speed = bench.frames / bench.rows[WHOLE_VIDEO].seconds
        lines.append(
            f"{speed:.3g} frames per second: {bench.frames} frames in {VIDEO_STEPS} steps, decoding included."
        )
    return Text("\n".join(lines))
