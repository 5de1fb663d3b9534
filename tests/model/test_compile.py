"""Compiled blocks train as eager ones do, under adapter roles, checkpointing and sharding.

Most cases stop before code is made (``aot_eager``): what may go wrong is what is traced, and when it is run
again. Losses agree to fp32 sums in another order.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.model.parallelize import parallelize
from anyflow_cli.recipe import schema
from anyflow_cli.train.trainer import Trainer, make_accelerator
from tests.tiny_pipeline import make_wan_folder
from tests.train.ranks import start
from tests.train.small import Kind, RandomData, backbone, objective, rows, training
from tests.train.stage import LORA, inputs_of, make_data, make_recipe, paths, train

# Both are torch's own, raised while it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

STEPS = 4
eager_kernels = functools.partial(torch.compile, backend="aot_eager")


def run(directory: Path, kind: Kind, lora: bool, launch: schema.LaunchSection | None, compiled: bool) -> None:
    directory.mkdir(exist_ok=True)
    settings, roles = (
        training(steps=STEPS, global_batch=4, log_every=1, checkpoint_every=STEPS),
        backbone(kind, lora),
    )
    accelerator, launch = make_accelerator(), launch or schema.LaunchSection()
    model = schema.ModelSection(gradient_checkpointing=True, compile=compiled)
    parallelize(roles.networks(), model, launch, accelerator.device)
    Trainer(
        directory, objective(kind, roles), RandomData(4), settings, accelerator=accelerator, launch=launch
    ).run()  # fmt: skip


def same_losses(one: Path, other: Path) -> None:
    assert len(rows(one)) == STEPS
    for row, same in zip(rows(one), rows(other), strict=True):
        assert same == pytest.approx(row, rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "kernels"),
    [
        ("flow-map", False, torch.compile),
        ("on-policy", True, eager_kernels),
        ("on-policy", False, eager_kernels),
        ("causal-on-policy", True, eager_kernels),
    ],
)
def test_losses_are_those_of_eager_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, lora: bool, kernels: Any
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(tmp_path / "eager", kind, lora, None, compiled=False)
    assert not torch._dynamo.utils.counters["frames"]
    monkeypatch.setattr(torch, "compile", kernels)
    run(tmp_path / "compiled", kind, lora, None, compiled=True)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    same_losses(tmp_path / "eager", tmp_path / "compiled")


def sharded(directory: Path, compiled: bool) -> None:
    torch.compile = eager_kernels
    run(directory, "on-policy", True, schema.LaunchSection(sharding="full"), compiled)


@pytest.mark.slow
def test_sharded_blocks_are_compiled_inside(tmp_path: Path) -> None:
    run(tmp_path / "eager", "on-policy", True, None, compiled=False)
    assert start(2, sharded, tmp_path / "compiled", True) == [0, 0]
    for row, same in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert same == pytest.approx(row, rel=2e-3, abs=1e-5)


def test_the_recipe_says_whether(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that a run may change; the finished model is a plain one."""
    made: list[Any] = []

    def note(forward: Any, **_: Any) -> Any:
        made.append(forward)
        return forward

    monkeypatch.setattr(torch, "compile", note)
    teacher, data = make_wan_folder(tmp_path / "wan"), make_data(tmp_path / "data")
    recipe = make_recipe(teacher, data, model={"lora": LORA})
    train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
    assert not made
    compiled = make_recipe(teacher, data, model={"lora": LORA, "compile": True}, train_flowmap={"steps": 3})
    assert train(compiled, inputs_of("train-flowmap", compiled, paths(tmp_path))).steps == 3
    assert len(made) == 2  # blocks
