"""A base stored in fp8, int8 or on the host trains its adapters as the plain base does, nearly or exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.base_storage import ReadOnAccess, frozen_matrices, keep_base_on_host, store_base
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import two_time_from
from anyflow_cli.train.trainer import optimizer_class
from tests.model.helpers import inputs, ours, theirs

X = inputs()
CPU = torch.device("cpu")


def trained_gradients(change: Any = None, *, checkpointing: bool = False) -> dict[str, Tensor]:
    """Gradients of the student's adapter after one backward pass; ``change`` is applied to the network."""
    roles = Backbone(two_time_from(ours(theirs("WanTransformer3DModel"))), lora=LoraSize(4, 4))
    draw = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of("student"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    roles.student.gradient_checkpointing = checkpointing
    if change is not None:
        change(roles.student)
    velocity = roles.velocity("student", Condition(X.text))
    torch.autograd.backward(velocity(X.z, X.t[:, 0], X.r[:, 0]).square().mean())
    return {name: p.grad for name, p in roles.named_parameters_of("student").items() if p.grad is not None}


def distance_of(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative norm of the difference of all gradients."""
    pairs = [(found[name], expected[name]) for name in expected]
    change = sum(float((a - b).square().sum()) for a, b in pairs)
    return float((change / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_fp8_trains_its_adapters_nearly_alike(checkpointing: bool) -> None:
    expected = trained_gradients()
    found = trained_gradients(lambda network: store_base(network, "fp8"), checkpointing=checkpointing)
    assert found.keys() == expected.keys()
    assert 0 < distance_of(found, expected) < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_on_the_host_trains_its_adapters_alike_to_the_bit(checkpointing: bool) -> None:
    found = trained_gradients(lambda network: keep_base_on_host(network, CPU), checkpointing=checkpointing)
    for name, gradient in trained_gradients(checkpointing=checkpointing).items():
        assert torch.equal(found[name], gradient), name


def test_a_base_in_fp8_may_also_stay_on_the_host() -> None:
    def change(network: Any) -> None:
        store_base(network, "fp8")
        keep_base_on_host(network, CPU)

    stored = trained_gradients(lambda network: store_base(network, "fp8"))
    assert all(torch.equal(value, stored[name]) for name, value in trained_gradients(change).items())


def test_only_the_frozen_matrices_of_the_blocks_are_stored_in_less() -> None:
    roles = Backbone(two_time_from(ours(theirs("WanTransformer3DModel"))), lora=LoraSize(4, 4))
    store_base(roles.student, "fp8")
    types = {p.dtype for p in roles.parameters_of("student")}
    assert types == {torch.float32}
    stored = [name for name, p in roles.student.named_parameters() if p.dtype == torch.float8_e4m3fn]
    assert len(stored) == len(list(frozen_matrices(roles.student))) == 2 * 10
    assert all("lora_" not in name and name.startswith("blocks.") for name in stored)


def test_a_matrix_is_read_on_the_device_that_computes() -> None:
    read = ReadOnAccess(torch.float32, torch.device("meta"))(torch.zeros(2, dtype=torch.bfloat16))
    assert (read.device.type, read.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize(("setting", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_package_that_is_missing_is_named(
    setting: Any, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyflow_cli.model.base_storage.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=package):
        trained_gradients(lambda network: store_base(network, setting))
    with pytest.raises(UsageError, match="torchao"):
        optimizer_class("8bit")


@pytest.mark.parametrize(
    ("weights", "package", "bound"), [("int8", "torchao", 0.05), ("nf4", "bitsandbytes", 0.2)]
)
def test_a_base_in_fewer_bits_trains_its_adapters_nearly_alike(
    weights: Any, package: str, bound: float
) -> None:
    pytest.importorskip(package)
    found = trained_gradients(lambda network: store_base(network, weights))
    assert 0 < distance_of(found, trained_gradients()) < bound
