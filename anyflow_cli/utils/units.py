"""Units of bytes and of time, as people read them."""

from __future__ import annotations

from collections.abc import Sequence

GIB = 2**30


def memory_size(size: int) -> str:
    """Write bytes in GiB or MiB."""
    return f"{size / GIB:,.1f} GiB" if size > GIB else f"{size / 2**20:,.1f} MiB"


def in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Write a value in the first unit, of (size, name), that it reaches."""
    number, name = next(((value / unit, name) for unit, name in units if value >= unit), (value, ""))
    return f"{number:,.1f} {name}" if name else f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Write a time in seconds, minutes, hours or days, with three digits."""
    for unit, name, limit in ((1.0, "s", 120), (60.0, "min", 120), (3600.0, "h", 96)):
        if seconds < limit * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:,.0f} days"
