"""Two processes (gloo) train as one: the same losses, gradients and weights, in one batch or cut.

The tolerance is that of fp32 sums in another order: gradients are averaged over processes instead of summed
over samples, and AdamW divides small gradients by their own size.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.train import checkpoint
from tests.train.small import Kind, rows, trainer

STEPS = 4
SETTINGS: dict[str, Any] = {"steps": STEPS, "batch": 6, "log_every": 1, "checkpoint_every": STEPS}


def process(
    rank: int, ranks: int, port: int, directory: Path, cases: list[tuple[Kind, bool, int | None]]
) -> None:
    """One of several; all cases in turn, since starting processes is what takes the time."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for kind, lora, micro in cases:
        trainer(directory / name(kind, lora, micro), kind, lora=lora, micro_batch=micro, **SETTINGS).run()
    torch.distributed.destroy_process_group()


def name(kind: Kind, lora: bool, micro: int | None) -> str:
    return f"{kind}-{'lora' if lora else 'full'}-{micro}"


CASES: list[tuple[Kind, bool, int | None]] = [
    ("flow-map", False, None), ("flow-map", False, 1), ("flow-map", True, 1), ("flow-matching", False, 3),
    ("on-policy", False, None), ("on-policy", True, 1),
    ("causal-flow-map", False, 1), ("causal-flow-map", True, None), ("causal-on-policy", True, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=process, args=(rank, 2, port, directory, CASES)) for rank in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    return directory


@pytest.mark.parametrize("case", CASES, ids=lambda case: name(*case))
def test_two_processes_are_one(tmp_path: Path, two: Path, case: tuple[Kind, bool, int | None]) -> None:
    kind, lora, micro = case
    trainer(tmp_path, kind, lora=lora, **SETTINGS).run()
    there = two / name(kind, lora, micro)
    for one, several in zip(rows(tmp_path), rows(there), strict=True):
        assert several == pytest.approx(one, rel=2e-3, abs=1e-5)
    alone, shared = (weights(directory) for directory in (tmp_path, there))
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-2, atol=1e-3)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All that was trained, and its averages."""
    state = checkpoint.load(directory / f"checkpoints/step-{STEPS:06d}")
    return {f"{part} {key}": value for part, named in state.tensors.items() for key, value in named.items()}


def test_the_first_losses_are_equal_to_rounding(tmp_path: Path, two: Path) -> None:
    """Before any update only the order of sums differs: a wrong share of times or mean would be far off."""
    trainer(tmp_path, "flow-map", **SETTINGS).run()
    for micro in (None, 1):
        first = rows(two / name("flow-map", False, micro))[0]
        assert first == pytest.approx(rows(tmp_path)[0], rel=1e-5)
