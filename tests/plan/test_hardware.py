"""What --gpus takes, and what a machine can do."""

from __future__ import annotations

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.plan.hardware import RESERVE, Hardware, parse_hardware, this_machine
from anyflow_cli.utils.units import GIB


@pytest.mark.parametrize(
    ("text", "count", "memory", "peak"),
    [
        ("8x80GB", 8, 80, 989e12),
        ("1 x 24 gb", 1, 24, 989e12),
        ("64xH200", 64, 141, 989e12),
        ("2xa100", 2, 80, 312e12),
        ("4x79.6GB", 4, 79.6, 989e12),
    ],
)
def test_gpus_are_read(text: str, count: int, memory: float, peak: float) -> None:
    cluster = parse_hardware(text)
    assert (cluster.count, cluster.memory, cluster.peak) == (count, int(memory * GIB), peak)
    assert cluster.usable == cluster.memory - RESERVE


@pytest.mark.parametrize(
    "text",
    [
        "", "80GB", "0x80GB", "8x", "8x80", "8xFPGA", "8x80TB", "-1x80GB", "8x0GB", "8x3GB", "8x-1GB",
        f"{'9' * 5000}x80GB", f"8x{'9' * 5000}GB", f"8x{'a' * 5000}", f"8x80.{'1' * 5000}GB", "8x80GB\n\x1b",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_hardware(text)
    assert "8x80GB" in str(caught.value.hint)
    assert len(caught.value.message) < 120
    assert caught.value.message.isprintable()


def test_a_stated_speed_wins() -> None:
    assert parse_hardware("8xA100", teraflops=200).peak == 200e12


def test_time_is_operations_over_what_is_reached() -> None:
    assert Hardware(1, GIB, 100.0, 0.25).seconds(500) == 20.0
    assert Hardware(1, GIB, None).seconds(500) is None


def test_a_cpu_has_memory_and_no_known_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    machine = this_machine()
    assert not machine.is_gpu
    assert machine.peak is None
    assert machine.usable == machine.memory > GIB
    assert this_machine(teraflops=0.5).peak == 0.5e12
