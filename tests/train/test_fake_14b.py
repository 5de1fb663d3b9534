"""Stage 2 of the 14B model without its memory: roles, adapters, FSDP2's units and a step, on fake tensors.

One of eight processes, of a process group that does nothing. What this cannot tell is numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.parallelize import apply_fsdp
from anyflow_cli.model.precision import autocast
from anyflow_cli.plan.estimate import target_of, training_setup
from anyflow_cli.plan.hardware import parse_hardware
from anyflow_cli.plan.networks import Setup, fake_backbone, fake_tensors
from anyflow_cli.recipe import schema
from anyflow_cli.recipe.load import load_recipe

RANKS = 8


@pytest.fixture
def group() -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def setup() -> Setup:
    recipe = load_recipe("bidirectional14b")
    return training_setup(target_of(recipe, parse_hardware("8x80GB")), "distill")


def test_all_roles_of_14b_are_adapters_on_one_base(setup: Setup) -> None:
    backbone = fake_backbone(setup, setup.network.layers)
    assert len(backbone.networks()) == 1
    assert sum(parameter.numel() for parameter in backbone.student.parameters()) > 14e9
    assert {role: len(backbone.named_parameters_of(role)) for role in backbone.roles} == {
        "student": (40 * 6 + 4) * 2, "real": 40 * 6 * 2, "fake": 40 * 6 * 2,
    }  # fmt: skip


@pytest.mark.parametrize("layers", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_stage_two_of_14b_is_sharded_and_stepped_without_memory(
    group: None, setup: Setup, layers: int
) -> None:
    """All blocks are equal: two of them are enough for the fast tests."""
    backbone = fake_backbone(setup, layers)
    sizes = {name: parameter.numel() for name, parameter in backbone.named_parameters()}
    apply_fsdp(backbone.networks(), schema.LaunchSection(sharding="full"), torch.device("cpu"))
    units = [module for module in backbone.modules() if isinstance(module, FSDPModule)]
    assert len(units) == layers + 1
    for name, parameter in backbone.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.numel() == sizes[name]
        assert parameter.to_local().numel() <= -(-sizes[name] // RANKS) + sizes[name] // parameter.shape[0]
    for role in ("student", "fake"):
        trained = backbone.parameters_of(role)
        assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert not backbone.parameters_of("real")
    with fake_tensors():
        _step(backbone, setup, backbone.parameters_of("student"))


def _step(backbone: Backbone, setup: Setup, trained: list[nn.Parameter]) -> None:
    z, t = torch.randn(1, *setup.latent), torch.ones(1)
    text = torch.randn(1, *setup.text)
    with autocast("bf16", "cpu", keeps_casts=False):
        u = backbone.velocity("student", Condition(text))(z, t, t / 2)
        with torch.no_grad():
            scores: tuple[Role, ...] = ("fake", "real")
            for role in scores:
                assert backbone.velocity(role, Condition(text))(u, t, t).shape == z.shape
    assert u.shape == z.shape
    u.square().mean().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in trained)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert all(isinstance(optimizer.state[parameter]["exp_avg"], DTensor) for parameter in trained)
