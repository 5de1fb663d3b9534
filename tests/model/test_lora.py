"""A merged network computes what its role does, keeps what was not trained, and is saved tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.lora import LoraSize, MergedNetwork
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.model.weights_io import LazyWeight, read_tensors, write_weights
from tests.model.helpers import distance, inputs, ours, theirs
from tests.plan.small import Live

X = inputs()
T, R = X.t[:, 0], X.r[:, 0]
LORA = LoraSize(rank=4, alpha=8)


def base(dtype: torch.dtype = torch.float32) -> FlowMapTransformer:
    return two_time_from(ours(theirs("WanTransformer3DModel"))).store_as(dtype)


def trained(scale: float = 0.1) -> Backbone:
    backbone = Backbone(base(), ("student", "fake"), lora=LORA)
    draw = torch.Generator().manual_seed(0)
    for role in ("student", "fake"):
        for parameter in backbone.parameters_of(role):
            parameter.data += scale * torch.randn(parameter.shape, generator=draw)
    return backbone


@pytest.mark.parametrize("role", ["student", "fake"])
def test_it_computes_what_the_role_does(role: Role) -> None:
    backbone = trained()
    plain = network_from(MergedNetwork(base(), backbone.state_dict_of(role), LORA))
    assert plain.state_dict().keys() == base().state_dict().keys()
    assert distance(plain(X.z, T, R, X.text), backbone.velocity(role, Condition(X.text))(X.z, T, R)) < 1e-5


def test_weights_trained_in_full_replace_the_base() -> None:
    network = base()
    weights = {name: torch.randn_like(value) for name, value in network.state_dict().items()}
    result = network_from(MergedNetwork(base(), weights)).state_dict()
    assert all(torch.equal(result[name], value) for name, value in weights.items())


def test_what_was_not_trained_stays_as_it_was_stored() -> None:
    """Adapters train on a base rounded to bf16; what is saved is the base before it was rounded."""
    adapter = trained().state_dict_of("student")
    merged = MergedNetwork(base(), adapter, LORA).lazy_weights()
    for name, value in base().state_dict().items():
        is_adapted = name.removesuffix(".weight") + ".lora_A.weight" in adapter
        assert torch.equal(merged[name].load(), value) is not is_adapted
        assert merged[name].dtype == torch.float32
    half = MergedNetwork(base(torch.bfloat16), adapter, LORA).lazy_weights()
    assert half["blocks.0.attn2.to_q.weight"].dtype == torch.bfloat16
    assert half["blocks.0.attn1.to_q.weight"].dtype == torch.float32


def test_a_small_adapter_survives_a_base_in_bf16() -> None:
    name = "blocks.0.attn1.to_q"
    pair = {
        f"{name}.lora_A.weight": torch.full((4, 32), 1e-3),
        f"{name}.lora_B.weight": torch.full((32, 4), 1e-3),
    }
    stored = base(torch.bfloat16)
    added = MergedNetwork(stored, pair, LORA).lazy_weights()[f"{name}.weight"].load()
    added = added - stored.state_dict()[f"{name}.weight"]
    # rank 4 of 1e-3 times 1e-3, scaled by alpha / rank = 2; a step of bf16 is 200 times as large
    torch.testing.assert_close(added, torch.full_like(added, 8e-6), rtol=0.01, atol=0)
    half = network_from(MergedNetwork(stored, pair, LORA), torch.bfloat16).state_dict()
    assert half[f"{name}.weight"].dtype == torch.bfloat16
    assert half["condition_embedder.time_proj.weight"].dtype == torch.float32


BLOCK = "blocks.0.attn1.to_q"
MISFITS = {
    "unexpected": {"blocks.9.attn1.to_q.lora_A.weight": torch.ones(4, 32)},
    "beside a weight": {
        f"{BLOCK}.lora_A.weight": torch.ones(4, 31),
        f"{BLOCK}.lora_B.weight": torch.ones(32, 4),
    },
    "not one of a pair": {f"{BLOCK}.lora_A.weight": torch.ones(4, 32)},
    "has shape": {f"{BLOCK}.lora_A.weight": torch.ones(3, 32), f"{BLOCK}.lora_B.weight": torch.ones(32, 3)},
    "missing": {f"{BLOCK}.weight": torch.ones(32, 32)},
    "instead of": {f"{BLOCK}.weight": torch.ones(3)},
}


@pytest.mark.parametrize("words", MISFITS)
def test_weights_of_another_model_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match=words):
        MergedNetwork(base(), MISFITS[words], LORA)


def test_saving_a_merged_network_holds_one_tensor_beside_what_stays(wan_folder: Path, tmp_path: Path) -> None:
    """In bytes of live tensors: the base is mapped from its file, merged weights come one by one."""
    network = two_time_from(load_network(wan_folder, None))
    adapter = trained().state_dict_of("student")
    largest = max(value.nbytes for value in network.state_dict().values())
    live = Live([*network.state_dict().values(), *adapter.values()])
    before = live.now
    with live:
        save_pipeline(tmp_path / "model", MergedNetwork(network, adapter, LORA), wan_folder, {})
    # base in fp32, the product of the pair, and their sum
    assert live.peak - before <= 3 * largest
    assert live.peak - before < sum(value.nbytes for value in network.state_dict().values()) / 4


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "b": (3, 4),
        "a.x": (2, 2),
        "c": (),
        "h": (5,),
        "d": (3,),
        "e": (0, 2),
    }
    types = {"a.x": torch.bfloat16, "h": torch.float16, "d": torch.float64}
    return {n: torch.randn(s, generator=draw).to(types.get(n, torch.float32)) for n, s in shapes.items()}


def test_files_are_those_of_the_safetensors_library_to_the_byte(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "theirs", metadata={"format": "pt"})
    lazy = {name: LazyWeight.of(value) for name, value in tensors().items()}
    write_weights(tmp_path / "ours", lazy, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    back = read_tensors(tmp_path / "ours")
    assert all(torch.equal(back[name], value) for name, value in tensors().items())
