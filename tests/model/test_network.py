"""The network computes what diffusers' classes compute, forward and backward, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer, folded, on_meta, two_time_from
from tests.model.helpers import anyflow_velocity, distance, inputs, ours, theirs, wan_velocity

SHAPES = [  # batch, frames, height, width, text tokens
    (1, 1, 2, 2, 1),
    (2, 3, 4, 6, 7),
    (3, 5, 6, 2, 4),
]
SHAPE_NAMES = ("batch", "frames", "height", "width", "text")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "changes", [{}, {"deltatime_type": "t-r", "gate_value": 0.4}, {"cross_attn_norm": False}]
)
def test_equals_the_anyflow_class(shape: tuple[int, ...], changes: dict[str, Any]) -> None:
    reference = theirs("AnyFlowTransformer3DModel", **changes)
    x = inputs(**dict(zip(SHAPE_NAMES, shape, strict=True)))
    with torch.no_grad():
        assert distance(ours(reference)(x.z, x.t, x.r, x.text), anyflow_velocity(reference, x)) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_wan_class_and_ignores_r_with_one_time(shape: tuple[int, ...]) -> None:
    reference = theirs("WanTransformer3DModel", cross_attn_norm=True)
    x = inputs(**dict(zip(SHAPE_NAMES, shape, strict=True)))
    t = x.t[:, 0]
    with torch.no_grad():
        assert distance(ours(reference)(x.z, t, t / 3, x.text), wan_velocity(reference, x)) < 1e-5


def test_gradients_equal_those_of_the_anyflow_class() -> None:
    reference = theirs("AnyFlowTransformer3DModel")
    network = ours(reference).requires_grad_(True)
    x = inputs()
    weight = torch.randn(x.z.shape, generator=torch.Generator().manual_seed(3))
    torch.autograd.backward((network(x.z, x.t, x.r, x.text) * weight).sum())
    torch.autograd.backward((anyflow_velocity(reference, x) * weight).sum())
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert distance(parameter.grad, expected[name]) < 2e-5, name


def test_several_channel_counts_in_and_out() -> None:
    reference = theirs("WanTransformer3DModel", in_channels=5, out_channels=3)
    x = inputs()
    z = x.z[:, :, :5]
    with torch.no_grad():
        expected = reference(z.transpose(1, 2), 1000 * x.t[:, 0], x.text, return_dict=False)[0].transpose(
            1, 2
        )
        assert distance(ours(reference)(z, x.t[:, 0], x.t[:, 0], x.text), expected) < 1e-5


def mean_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact.double()).abs().mean().item()


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Diffusers' class in fp32, and in bf16 as its loader casts it."""
    import diffusers

    folder = tmp_path_factory.mktemp("half")
    reference = theirs("AnyFlowTransformer3DModel", num_layers=4)
    reference.save_pretrained(folder)
    half = diffusers.AnyFlowTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    return reference, half.eval()


@pytest.mark.parametrize("how", ["weights", "autocast"])
@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_the_class_is(half_precision: tuple[Any, Any], how: str) -> None:
    reference, half = half_precision
    network = ours(reference)
    if how == "weights":
        network.store_as(torch.bfloat16)
    mine = yours = 0.0
    for seed in range(6):
        x = inputs(seed=seed)
        exact = anyflow_velocity(reference, x)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            u = network(x.z, x.t, x.r, x.text)
            theirs_in_autocast = anyflow_velocity(reference, x)
        assert u.dtype == torch.float32
        mine += mean_error(u, exact)
        if how == "weights":
            x.z.data, x.text.data = x.z.bfloat16(), x.text.bfloat16()
            theirs_in_autocast = anyflow_velocity(half, x)
        yours += mean_error(theirs_in_autocast, exact)
    assert 0 < mine <= 1.05 * yours


@pytest.mark.parametrize("gate", [0.25, 0.7])
def test_a_wan_start_is_the_wan_network_at_r_equal_t(gate: float) -> None:
    wan = ours(theirs("WanTransformer3DModel"))
    x = inputs()
    t = x.t[:, 0]
    with torch.no_grad():
        expected = wan(x.z, t, t, x.text)
        flow_map = two_time_from(wan, gate)
        torch.testing.assert_close(flow_map(x.z, t, t, x.text), expected, rtol=0, atol=0)
        assert distance(flow_map(x.z, t, t / 2, x.text), expected) > 1e-3
    assert flow_map.config.gate == gate


def test_a_zero_init_start_is_the_wan_network_at_every_r() -> None:
    wan = ours(theirs("WanTransformer3DModel"))
    x = inputs()
    t = x.t[:, 0]
    with torch.no_grad():
        flow_map = two_time_from(wan, conditioning="zero-init")
        torch.testing.assert_close(flow_map(x.z, t, t / 2, x.text), wan(x.z, t, t, x.text), rtol=0, atol=0)


def test_the_new_embedder_is_a_copy_and_all_else_is_shared() -> None:
    wan = ours(theirs("WanTransformer3DModel"))
    flow_map = two_time_from(wan)
    old, new = dict(wan.named_parameters()), dict(flow_map.named_parameters())
    shared = {name for name in new if name in old and new[name].data_ptr() == old[name].data_ptr()}
    assert shared == set(old)
    copied = new["condition_embedder.delta_embedder.linear_1.weight"]
    assert copied.data_ptr() != old["condition_embedder.time_embedder.linear_1.weight"].data_ptr()


def test_a_trained_zero_init_network_folds_into_the_parameters_of_the_class() -> None:
    network = two_time_from(ours(theirs("WanTransformer3DModel")), conditioning="zero-init")
    torch.nn.init.normal_(network.condition_embedder.delta_proj.weight, std=0.1)
    config, weights = folded(network.config, network.lazy_weights())
    plain = on_meta(config)
    plain.load_state_dict({name: weight.load() for name, weight in weights.items()}, assign=True)
    x = inputs()
    with torch.no_grad():
        assert distance(plain(x.z, x.t, x.r, x.text), network(x.z, x.t, x.r, x.text)) < 1e-6
    assert NetworkConfig.from_diffusers(config.to_diffusers()) == config


def test_one_time_for_all_frames_equals_the_same_time_in_each() -> None:
    network = ours(theirs("AnyFlowTransformer3DModel"))
    x = inputs()
    t, r = x.t[:, 0], x.r[:, 0]
    per_frame = network(x.z, t[:, None].expand(2, 3), r[:, None].expand(2, 3), x.text)
    assert distance(network(x.z, t, r, x.text), per_frame) < 1e-6


def test_condition_keys_can_be_shared() -> None:
    network = ours(theirs("AnyFlowTransformer3DModel"))
    x = inputs()
    keys = network.condition_keys(x.text)
    torch.testing.assert_close(network(x.z, x.t, x.r, keys), network(x.z, x.t, x.r, x.text), rtol=0, atol=0)
    index = torch.tensor([1, 0, 1])
    taken = network(x.z[index], x.t[index], x.r[index], keys.select(index))
    assert distance(taken, network(x.z, x.t, x.r, x.text)[index]) < 1e-6


def test_key_parameters_are_those_that_the_keys_depend_on() -> None:
    network = ours(theirs("AnyFlowTransformer3DModel")).requires_grad_(True)
    keys = network.condition_keys(inputs().text)
    sum(part.square().sum() for layer in keys.layers for part in layer).backward()  # type: ignore[union-attr]
    reached = {id(parameter) for parameter in network.parameters() if parameter.grad is not None}
    assert reached == {id(parameter) for parameter in network.key_parameters()}


def test_checkpointing_changes_no_gradient() -> None:
    network = ours(theirs("AnyFlowTransformer3DModel")).requires_grad_(True)
    x = inputs()
    gradients = []
    for checkpointed in (False, True):
        network.zero_grad()
        network.gradient_checkpointing = checkpointed
        torch.autograd.backward(network(x.z, x.t, x.r, x.text).square().mean())
        gradients.append(
            [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
        )
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def largest_held(forward: Any) -> int:
    """Elements of the largest tensor that a forward saves for its backward."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return max(sizes)


def test_no_modulation_is_held_per_token() -> None:
    """Rows of 6 D per token would be the largest saved tensor: those of the feed-forward have 2 D here."""
    reference = theirs("AnyFlowTransformer3DModel")
    network = ours(reference).requires_grad_(True)
    x = inputs(batch=2, frames=3, height=16, width=16, text=2)
    per_token = 2 * 3 * 64 * 6 * network.config.dim
    assert largest_held(lambda: anyflow_velocity(reference, x)) >= per_token  # what this test would catch
    assert largest_held(lambda: network(x.z, x.t, x.r, x.text)) < per_token


def test_a_network_built_on_meta_runs_with_assigned_weights() -> None:
    """Anything outside of the state dict, such as a buffer, would still have no storage."""
    reference = ours(theirs("AnyFlowTransformer3DModel"))
    network = on_meta(reference.config)
    network.load_state_dict(reference.state_dict(), assign=True)
    x = inputs()
    torch.testing.assert_close(
        network(x.z, x.t, x.r, x.text), reference(x.z, x.t, x.r, x.text), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"]
)
def test_parameters_have_the_names_and_shapes_of_the_class(name: str) -> None:
    reference = theirs(name)
    expected = {key: value.shape for key, value in reference.state_dict().items()}
    config = NetworkConfig.from_diffusers(dict(reference.config) | {"_class_name": name})
    assert {key: value.shape for key, value in FlowMapTransformer(config).state_dict().items()} == expected


def test_storing_as_bf16_keeps_times_and_norms_in_fp32(tmp_path: Path) -> None:
    network = ours(theirs("AnyFlowTransformer3DModel")).store_as(torch.bfloat16)
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == kinds["patch_embedding.weight"] == torch.bfloat16
    for part in ("time_embedder.linear_1", "delta_embedder.linear_2", "time_proj"):
        assert kinds[f"condition_embedder.{part}.weight"] == torch.float32
    assert kinds["blocks.0.norm2.weight"] == kinds["blocks.0.scale_shift_table"] == torch.float32


@pytest.mark.parametrize(("every", "recomputed"), [(1, [0, 1, 2, 3]), (2, [0, 2]), (3, [0, 3])])
def test_every_nth_block_is_recomputed(every: int, recomputed: list[int]) -> None:
    config = NetworkConfig(
        heads=2, head_dim=8, layers=4, ffn_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
    )
    network = FlowMapTransformer(config)
    network.gradient_checkpointing, network.checkpoint_every_n_blocks = True, every
    calls: list[int] = []
    for number, block in enumerate(network.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    loss = network(torch.randn(1, 2, 4, 4, 4), torch.ones(1), torch.ones(1), torch.randn(1, 3, 8)).sum()
    assert calls == [0, 1, 2, 3]
    torch.autograd.backward(loss)
    assert sorted(calls[4:]) == recomputed
