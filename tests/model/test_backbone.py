"""Roles: each computes and trains its own weights, and a backward pass keeps the role of its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.precision import autocast
from tests.model.helpers import distance, inputs, ours, theirs

X = inputs()
T, R = X.t[:, 0], X.r[:, 0]
LORA = LoraSize(rank=4, alpha=8)
ALL: tuple[Role, ...] = ("student", "real", "fake")


def wan() -> FlowMapTransformer:
    return ours(theirs("WanTransformer3DModel"))


def backbone(lora: LoraSize | None = LORA, roles: tuple[Role, ...] = ALL, **options: Any) -> Backbone:
    return Backbone(two_time_from(wan()), roles, lora=lora, **options)


def disturb(made: Backbone, *roles: Role) -> None:
    """Perturb the weights of roles, each role differently."""
    for seed, role in enumerate(roles):
        draw = torch.Generator().manual_seed(seed)
        for parameter in made.named_parameters_of(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)


def evaluate(made: Backbone, role: Role, r: Tensor = R) -> Tensor:
    return made.velocity(role, Condition(X.text))(X.z, T, r)


BOTH = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])


@BOTH
def test_every_role_starts_as_the_pretrained_network(lora: LoraSize | None) -> None:
    made = backbone(lora)
    expected = wan()(X.z, T, T, X.text)
    for role in ALL:
        torch.testing.assert_close(evaluate(made, role, T), expected, rtol=0, atol=0)


@BOTH
def test_roles_differ_once_trained_and_come_back(lora: LoraSize | None) -> None:
    made = backbone(lora)
    start = evaluate(made, "real")
    disturb(made, "student", "fake")
    student, fake = evaluate(made, "student"), evaluate(made, "fake")
    assert distance(student, start) > 1e-3
    assert distance(fake, student) > 1e-3
    torch.testing.assert_close(evaluate(made, "real"), start, rtol=0, atol=0)
    torch.testing.assert_close(evaluate(made, "student"), student, rtol=0, atol=0)


def test_roles_nest() -> None:
    made = backbone()
    disturb(made, "student", "fake")
    network = made.network_of("student")
    student, fake = evaluate(made, "student"), evaluate(made, "fake")
    with made.role("student"):
        with made.role("fake"):
            torch.testing.assert_close(network(X.z, T, R, X.text), fake, rtol=0, atol=0)
        torch.testing.assert_close(network(X.z, T, R, X.text), student, rtol=0, atol=0)
    torch.testing.assert_close(network(X.z, T, R, X.text), evaluate(made, "real"), rtol=0, atol=0)


@BOTH
def test_switching_never_changes_what_trains(lora: LoraSize | None) -> None:
    """peft's switch would: it freezes every adapter except the active one."""
    made = backbone(lora)
    before = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    for role in (*ALL, "student"):
        with made.role(role):
            assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == before
    trained = [*made.parameters_of("student"), *made.parameters_of("fake")]
    assert made.parameters_of("real") == []
    assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in trained}


@BOTH
@pytest.mark.parametrize("role", ["student", "fake"])
def test_gradients_reach_the_role_alone(lora: LoraSize | None, role: Role) -> None:
    made = backbone(lora)
    disturb(made, "student", "fake")
    torch.autograd.backward(evaluate(made, role).square().sum())
    own = {id(parameter) for parameter in made.parameters_of(role)}
    reached = {id(p) for p in made.parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == own


def test_lora_targets_are_the_papers() -> None:
    made = backbone()

    def layers(role: Role) -> set[str]:
        return {name.split(".lora_")[0] for name in made.named_parameters_of(role)}

    block = {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"}
    blocks = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    times = {f"condition_embedder.{which}_embedder.linear_{i}" for which in ("time", "delta") for i in (1, 2)}
    assert layers("fake") == blocks
    assert layers("student") == blocks | times


def test_the_embedders_of_a_tuned_teacher_stay_untouched() -> None:
    made = Backbone(wan(), lora=LORA)
    assert not [name for name in made.named_parameters_of("student") if "embedder" in name]


@pytest.mark.parametrize("reused_rank", [True, False])
def test_a_tuned_teachers_adapter_is_the_real_score_and_the_fake_ones_start(reused_rank: bool) -> None:
    teacher = Backbone(wan(), lora=LORA)
    disturb(teacher, "student")
    tuned = evaluate(teacher, "student")
    if not reused_rank:
        with pytest.raises(UsageError, match="rank"):
            raise_hint(lambda: backbone(LoraSize(2, 4), real_adapter=teacher.state_dict_of("student")))
        return
    made = backbone(real_adapter=teacher.state_dict_of("student"))
    for role in ("real", "fake"):  # evaluated at r = t, where the two-time network is the one-time one
        torch.testing.assert_close(evaluate(made, role, T), tuned, rtol=0, atol=0)
    assert made.parameters_of("real") == []
    with made.role("student"):  # which has no adapter in effect yet
        untuned = made.network_of("student")(X.z, T, T, X.text)
    torch.testing.assert_close(untuned, wan()(X.z, T, T, X.text), rtol=0, atol=0)
    disturb(made, "fake")
    torch.testing.assert_close(evaluate(made, "real", T), tuned, rtol=0, atol=0)


def raise_hint(call: Any) -> None:
    """Put the hint into the message."""
    try:
        call()
    except UsageError as error:
        raise UsageError(f"{error.message} {error.hint}") from error


@BOTH
def test_a_teacher_of_its_own_gives_the_scores(lora: LoraSize | None) -> None:
    teacher = ours(theirs("WanTransformer3DModel", num_layers=1))
    expected = teacher(X.z, T, T, X.text)
    made = backbone(lora, teacher=teacher)
    assert distance(evaluate(made, "student", T), expected) > 1e-3
    for role in ("real", "fake"):
        torch.testing.assert_close(evaluate(made, role), expected, rtol=0, atol=0)
    disturb(made, "fake")
    assert distance(evaluate(made, "fake"), expected) > 1e-3
    torch.testing.assert_close(evaluate(made, "real"), expected, rtol=0, atol=0)


@BOTH
def test_a_checkpointed_backward_runs_under_the_role_of_its_forward(lora: LoraSize | None) -> None:
    """Recomputed under another adapter, the student's blocks would have the fake score's activations."""
    gradients: list[list[Tensor]] = []
    for checkpointed in (False, True):
        made = backbone(lora)
        disturb(made, "student", "fake")
        for role in ("student", "fake"):
            made.network_of(role).gradient_checkpointing = checkpointed
        student, fake = evaluate(made, "student"), evaluate(made, "fake")
        with made.role("fake"):
            torch.autograd.backward(student.square().sum())
        torch.autograd.backward(fake.square().sum())
        trained = [*made.parameters_of("student"), *made.parameters_of("fake")]
        gradients.append([p.grad for p in trained if p.grad is not None])
        assert len(gradients[-1]) == len(trained)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_a_checkpointed_graph_can_be_walked_twice() -> None:
    made = backbone()
    disturb(made, "student", "fake")
    made.network_of("student").gradient_checkpointing = True
    loss = evaluate(made, "student").square().sum()
    first = torch.autograd.grad(loss, made.parameters_of("student"), retain_graph=True)
    second = torch.autograd.grad(loss, made.parameters_of("student"))
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("role", ["student", "fake"])
def test_state_dicts_round_trip(lora: LoraSize | None, role: Role) -> None:
    made, other = backbone(lora), backbone(lora, seed=1)
    disturb(made, role)
    other.load_state_dict_of(role, made.state_dict_of(role))
    torch.testing.assert_close(evaluate(other, role), evaluate(made, role), rtol=0, atol=0)


def test_weights_that_do_not_fit_are_refused() -> None:
    state = backbone().state_dict_of("student")
    with pytest.raises(UsageError, match=r"has shape .* instead of"):
        backbone(LoraSize(2, 4)).load_state_dict_of("student", state)
    with pytest.raises(UsageError, match=r"(missing|unexpected)"):
        backbone().load_state_dict_of("fake", state)


def test_adapters_are_the_same_whatever_was_drawn_before() -> None:
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(backbone().state_dict_of("student"))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)
        assert value.abs().sum() > 0 or ".lora_B." in name


def test_roles_share_one_base() -> None:
    made = backbone()
    base = sum(p.numel() for p in two_time_from(wan()).parameters())
    trained = [*made.parameters_of("student"), *made.parameters_of("fake")]
    adapters = sum(parameter.numel() for parameter in trained)
    assert sum(p.numel() for p in made.parameters()) == base + adapters


def test_adapters_on_a_bf16_base_are_fp32() -> None:
    made = Backbone(two_time_from(wan()).store_as(torch.bfloat16), ("student",), lora=LORA)
    assert {parameter.dtype for parameter in made.parameters_of("student")} == {torch.float32}
    with autocast("bf16", "cpu"):
        loss = evaluate(made, "student").square().sum()
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in made.parameters_of("student"))


def test_stage_one_alone_in_full_mode_holds_one_network() -> None:
    network = two_time_from(wan())
    made = Backbone(network)
    assert made.network_of("student") is network
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in network.parameters())


def test_an_adapter_keeps_no_input_of_its_own_for_the_backward_pass() -> None:
    """It shares the layer's input, under autocast on a bf16 base; at 14B each copy is a third of a GiB."""
    made = Backbone(two_time_from(wan()).store_as(torch.bfloat16), ("student",), lora=LORA)
    x = torch.randn(1, 7, made.student.config.dim, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    layer = made.student.get_submodule("blocks.0.attn1.to_q")
    with made.role("student"), autocast("bf16", "cpu"), hooks:
        layer(x)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() == x.numel()}
    assert inputs == {x.untyped_storage().data_ptr()}
