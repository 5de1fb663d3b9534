"""Several processes (gloo) train as one: the same losses and weights, in one batch or cut, sharded or not.

The tolerance is that of fp32 sums in another order: gradients are averaged over processes instead of summed
over samples, and AdamW divides small gradients by their own size, so that a rounding error can turn a step
of one weight around. Losses are those of every step; weights may part by a few of the last steps.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint
from tests.train.ranks import start
from tests.train.small import Kind, rows, trainer

STEPS = 4
LAST = f"checkpoints/step-{STEPS:06d}"
SETTINGS: dict[str, Any] = {"steps": STEPS, "global_batch": 6, "log_every": 1, "checkpoint_every": STEPS}


@dataclass(frozen=True)
class Case:
    kind: Kind
    lora: bool = False
    micro: int | None = None
    sharding: Literal["none", "full", "hybrid"] = "none"
    checkpointing: bool = False
    waits: bool = True
    context: int | None = None

    def __str__(self) -> str:
        parts = [self.kind, "lora" if self.lora else "full", str(self.micro), self.sharding]
        return "-".join(
            parts
            + ["ckpt"] * self.checkpointing
            + ["async"] * (not self.waits)
            + [f"context{self.context}"] * bool(self.context)
        )

    def run(self, directory: Path, **changes: Any) -> None:
        launch = schema.LaunchSection(
            sharding=self.sharding, async_checkpoint=not self.waits, context_parallel=self.context
        )
        settings = SETTINGS | {"micro_batch": self.micro} | changes
        trainer(
            directory / str(self), self.kind, lora=self.lora, hooks={"launch": launch},
            checkpointing=self.checkpointing, **settings,
        ).run()  # fmt: skip


SHARDED = Case("flow-map", micro=1, sharding="full", waits=False)
CASES = [
    Case("flow-map"), Case("flow-map", micro=1), Case("flow-map", lora=True, micro=1),
    Case("flow-matching", micro=3), Case("on-policy"), Case("on-policy", lora=True, micro=1),
    Case("causal-flow-map", micro=1), Case("causal-flow-map", lora=True),
    Case("causal-on-policy", lora=True, micro=1),
    SHARDED,
    Case("causal-on-policy", lora=True, micro=1, sharding="full"),
    Case("on-policy", lora=True, micro=2, context=2), Case("causal-flow-map", lora=True, context=2),
    Case("causal-on-policy", lora=True, sharding="full", checkpointing=True, context=2),
    Case("on-policy", lora=True, sharding="full", checkpointing=True),
    Case("experts-flow-map", micro=1), Case("experts-on-policy", lora=True, micro=1, sharding="full"),
]  # fmt: skip


def run_all(directory: Path, cases: list[Case], changes: dict[str, Any]) -> None:
    """All cases in turn, since starting processes is what takes the time."""
    for case in cases:
        case.run(directory, **changes)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    assert start(2, run_all, directory, CASES, {}) == [0, 0]
    return directory


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one(tmp_path: Path, two: Path, case: Case) -> None:
    alone = Case(case.kind, case.lora)
    alone.run(tmp_path)
    same_training(tmp_path / str(alone), two / str(case))


def same_training(one: Path, other: Path, last: str = LAST) -> None:
    for row, same in zip(rows(one), rows(other), strict=True):
        assert same == pytest.approx(row, rel=2e-3, abs=1e-5)
    first, second = weights(one / last), weights(other / last)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-2, atol=1e-3)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All that was trained, and its averages."""
    state = checkpoint.load(path)
    return {f"{part} {key}": value for part, named in state.tensors.items() for key, value in named.items()}


def test_the_first_losses_are_equal_to_rounding(tmp_path: Path, two: Path) -> None:
    """Before any update only the order of sums differs: a wrong share of times or mean would be far off."""
    alone = Case("flow-map")
    alone.run(tmp_path)
    for case in (Case("flow-map"), Case("flow-map", micro=1), SHARDED):
        assert rows(two / str(case))[0] == pytest.approx(rows(tmp_path / str(alone))[0], rel=1e-5)


def go_on(directory: Path, cases: list[Case]) -> None:
    run_all(directory, cases, {"steps": 6})


def test_a_run_continues_on_another_number_of_processes_sharded_or_not(tmp_path: Path, two: Path) -> None:
    """Half the steps in two processes, half in one, and the other way round."""
    alone = Case("on-policy", lora=True)
    sharded = Case("on-policy", lora=True, sharding="full", checkpointing=True)
    alone.run(tmp_path / "whole", steps=6)
    alone.run(tmp_path / "first alone")
    for name, source, case in (
        ("then alone", two / str(sharded), alone),
        ("then sharded", tmp_path / "first alone" / str(alone), sharded),
    ):
        shutil.copytree(source, tmp_path / name / str(case))
    alone.run(tmp_path / "then alone", steps=6)
    assert start(2, go_on, tmp_path / "then sharded", [sharded]) == [0, 0]
    for name, case in (("then alone", alone), ("then sharded", sharded)):
        same_training(tmp_path / "whole" / str(alone), tmp_path / name / str(case), "checkpoints/step-000006")


LONG = {"steps": 20, "global_batch": 8, "checkpoint_every": 4, "keep_checkpoints": 9}
IN_BOTH = [
    Case("flow-map", micro=1), Case("on-policy", lora=True, micro=1),
    Case("causal-flow-map", micro=1), Case("causal-on-policy", lora=True, micro=1),
    Case("causal-on-policy"), Case("causal-on-policy", lora=True, sharding="full"),
]  # fmt: skip
IN_FOUR = [
    *IN_BOTH,
    Case("flow-map", sharding="full"), Case("on-policy", sharding="full", checkpointing=True),
    Case("on-policy", lora=True, sharding="hybrid"),
    Case("flow-map", lora=True, sharding="hybrid", waits=False),
    Case("on-policy", lora=True, micro=1, context=2), Case("causal-flow-map", context=4),
    Case("causal-on-policy", lora=True, sharding="full", context=2),
    Case("on-policy", lora=True, sharding="hybrid", checkpointing=True, context=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two processes, and four on two pretended machines."""
    places = {ranks: tmp_path_factory.mktemp(f"long-{ranks}") for ranks in (2, 4)}
    assert start(2, run_all, places[2], IN_BOTH, LONG) == [0] * 2
    assert start(4, run_all, places[4], IN_FOUR, LONG, machines=2) == [0] * 4
    return places


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_FOUR, ids=str)
def test_twenty_losses_of_two_and_four_processes_are_those_of_one(
    tmp_path: Path, long: dict[int, Path], case: Case
) -> None:
    alone = Case(case.kind, case.lora)
    alone.run(tmp_path, **LONG)
    for ranks in (2, 4) if case in IN_BOTH else (4,):
        assert len(rows(long[ranks] / str(case))) == 20
        same_training(tmp_path / str(alone), long[ranks] / str(case), "checkpoints/step-000020")
