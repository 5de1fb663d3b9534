"""The student of a causal model trains the compressed patch embedding in full, beside its adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.causal import FAR, TeacherForced, causal_from
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.lora import LoraSize, MergedNetwork
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.pipeline_io import load_adapter, save_adapter
from anyflow_cli.model.precision import autocast
from tests.model.helpers import distance, inputs, ours, theirs

X = inputs(frames=4, height=8, width=8)
T, R = X.t[:, 0], X.r[:, 0]
LORA = LoraSize(rank=4, alpha=8)
PARTITION = (1, 2, 1)


def network() -> FlowMapTransformer:
    wan = ours(theirs("WanTransformer3DModel"))
    return causal_from(two_time_from(wan), CausalConfig(full_chunks=2, partition=PARTITION))


def forced(made: Backbone, role: Role) -> Tensor:
    """Velocity of the last two chunks by teacher forcing; the first is compressed."""
    model = TeacherForced(made.velocity(role, Condition(X.text)), X.z, PARTITION)
    return model(X.z[:, model.window].flip(1), T, R)


def trained(seed: int = 0) -> Backbone:
    made = Backbone(network(), ("student", "fake"), lora=LORA)
    draw = torch.Generator().manual_seed(seed)
    for parameter in made.parameters_of("student"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return made


def test_gradients_reach_the_students_adapter_and_the_compressed_embedding() -> None:
    made = trained()
    torch.autograd.backward(forced(made, "student").square().sum())
    reached = {name for name, p in made.named_parameters_of("student").items() if p.grad is not None}
    assert reached == made.named_parameters_of("student").keys()
    assert {name for name in reached if ".lora_" not in name} == {f"{FAR}.weight", f"{FAR}.bias"}
    others = {id(p) for p in made.parameters()} - {id(p) for p in made.parameters_of("student")}
    assert all(p.grad is None for p in made.parameters() if id(p) in others)


def test_the_other_roles_do_not_own_it_nor_change_with_it() -> None:
    made = trained()
    assert not [name for name in made.named_parameters_of("fake") if FAR in name]
    expected = network()(X.z, T, T, X.text)  # bidirectional: what the scores see
    for role in ("fake", "real"):
        torch.testing.assert_close(
            made.velocity(role, Condition(X.text))(X.z, T, T), expected, rtol=0, atol=0
        )


def test_a_state_and_a_merged_network_hold_it() -> None:
    made, other = trained(), Backbone(network(), lora=LORA)
    other.load_state_dict_of("student", made.state_dict_of("student"))
    expected = forced(made, "student")
    torch.testing.assert_close(forced(other, "student"), expected, rtol=0, atol=0)
    plain = Backbone(network_from(MergedNetwork(network(), made.state_dict_of("student"), LORA)))
    assert distance(forced(plain, "student"), expected) < 1e-5
    assert distance(expected, forced(Backbone(network(), lora=LORA), "student")) > 1e-3


def test_on_a_bf16_base_it_is_fp32_and_the_stream_is_not() -> None:
    made = Backbone(network().store_as(torch.bfloat16), lora=LORA)
    assert {parameter.dtype for parameter in made.parameters_of("student")} == {torch.float32}
    with autocast("bf16", "cpu"):
        loss = forced(made, "student").square().sum()
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in made.parameters_of("student"))


def test_a_saved_adapter_holds_it_and_opens_in_peft(tmp_path: Path) -> None:
    from diffusers import AnyFlowFARTransformer3DModel
    from peft import PeftModel

    made = trained()
    save_adapter(tmp_path / "adapter", made.state_dict_of("student"), LORA, "base")
    read = load_adapter(tmp_path / "adapter")
    assert read.weights.keys() == made.state_dict_of("student").keys()
    base = AnyFlowFARTransformer3DModel.from_config(network().config.to_diffusers())
    base.load_state_dict(network().state_dict())
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    expected = network_from(MergedNetwork(network(), made.state_dict_of("student"), LORA)).state_dict()
    for name, value in opened.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
