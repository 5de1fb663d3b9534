"""A condition travels with its samples, and the text's keys are made once and never out of date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.velocity import guided
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.network import FlowMapTransformer
from tests.model.helpers import distance, inputs, ours, theirs

X = inputs(batch=3)


@pytest.fixture
def network() -> FlowMapTransformer:
    return ours(theirs("AnyFlowTransformer3DModel"))


@pytest.fixture
def made(network: FlowMapTransformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the texts whose keys were computed, in order."""
    sizes: list[int] = []
    original = network.condition_keys

    def watched(text: torch.Tensor, picture: None) -> object:
        sizes.append(len(text))
        return original(text, picture)

    monkeypatch.setattr(network, "condition_keys", watched)
    return sizes


def test_it_is_the_network_under_its_text(network: FlowMapTransformer) -> None:
    expected = network(X.z, X.t, X.r, X.text)
    torch.testing.assert_close(
        Conditioned(network, Condition(X.text))(X.z, X.t, X.r), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("trained", [False, True])
def test_select_and_concat_carry_the_text(network: FlowMapTransformer, trained: bool) -> None:
    network.requires_grad_(trained)
    whole = network(X.z, X.t, X.r, X.text)
    index = torch.tensor([2, 0, 2])
    model = Conditioned(network, Condition(X.text))
    joined = model.select(index).concat(model.select(torch.tensor([1])))
    order = torch.tensor([2, 0, 2, 1])
    assert distance(joined(X.z[order], X.t[order], X.r[order]), whole[order]) < 1e-6


def test_keys_are_computed_once_for_all_steps(network: FlowMapTransformer, made: list[int]) -> None:
    model = guided(
        Conditioned(network, Condition(X.text)),
        Conditioned(network, Condition(torch.zeros_like(X.text))),
        3.0,
    )
    for _ in range(4):
        model(X.z, X.t, X.r)
    assert made == [3, 3]  # the prompts', the negative prompt's


def test_keys_that_are_trained_are_recomputed(network: FlowMapTransformer, made: list[int]) -> None:
    """Otherwise a velocity used after an optimizer step would have stale keys, and free a graph twice."""
    network.requires_grad_(True)
    model = Conditioned(network, Condition(X.text))
    with torch.no_grad():
        before = model(X.z, X.t, X.r)
        network.blocks[0].attn2.to_v.weight.mul_(2)  # type: ignore[union-attr, operator]
        assert distance(model(X.z, X.t, X.r), before) > 1e-4
    for _ in range(2):
        torch.autograd.backward(model(X.z, X.t, X.r).square().sum())
    assert made == []
    assert network.condition_embedder.text_embedder.linear_1.weight.grad is not None


def test_keys_of_a_frozen_text_path_let_gradients_through(network: FlowMapTransformer) -> None:
    trained = network.blocks[0].attn1.to_q.weight  # type: ignore[union-attr]
    trained.requires_grad_(True)
    model = Conditioned(network, Condition(X.text))
    with torch.inference_mode():
        model(X.z, X.t, X.r)
    z = X.z.clone().requires_grad_(True)
    torch.autograd.backward(model(z, X.t, X.r).square().sum())
    assert z.grad is not None
    assert trained.grad is not None


def test_keys_from_autocast_can_be_used_outside_it(network: FlowMapTransformer) -> None:
    model = Conditioned(network, Condition(X.text))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(X.z, X.t, X.r)
    assert 0 < distance(model(X.z, X.t, X.r), half) < 0.05
    model = Conditioned(network, Condition(X.text))
    model(X.z, X.t, X.r)
    with torch.autocast("cpu", torch.bfloat16):
        assert distance(model(X.z, X.t, X.r), half) < 0.05


def test_the_scope_is_entered_for_every_call(network: FlowMapTransformer) -> None:
    entered: list[str] = []

    @contextmanager
    def scope() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    model = Conditioned(network, Condition(X.text), scope)
    model.select(torch.tensor([0]))(X.z[:1], X.t[:1], X.r[:1])
    assert entered == ["in", "out", "in", "out"]  # for the keys, for the call


def test_two_networks_cannot_be_concatenated(network: FlowMapTransformer) -> None:
    other = ours(theirs("AnyFlowTransformer3DModel"))
    with pytest.raises(AssertionError, match="differ in network"):
        Conditioned(network, Condition(X.text)).concat(Conditioned(other, Condition(X.text)))
