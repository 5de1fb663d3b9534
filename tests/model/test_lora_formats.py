"""LoRA files in every spelling merge to the same network as diffusers' own loader; others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.lora_formats import LoraMerged, LoraRequest, read_lora, split_loras, with_loras
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.open import describe, open_model
from tests.model.helpers import distance, inputs, ours, theirs, wan_velocity
from tests.tiny_pipeline import make_wan_folder

RANK, ALPHA = 4, 2.0
LAYERS = [
    f"blocks.{n}.{part}"
    for n in range(2)
    for part in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")
]


def pairs(network: FlowMapTransformer) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each layer."""
    draw = torch.Generator().manual_seed(3)
    made = {}
    for layer in LAYERS:
        rows, columns = network.get_parameter(f"{layer}.weight").shape
        made[layer] = (
            0.3 * torch.randn(RANK, columns, generator=draw), 0.3 * torch.randn(rows, RANK, generator=draw)
        )  # fmt: skip
    return made


def spelled(
    name: Callable[[str], str], down: str = "lora_A.weight", up: str = "lora_B.weight", alpha: bool = False
) -> Callable[[dict[str, tuple[Tensor, Tensor]]], dict[str, Tensor]]:
    def write(made: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for layer, (a, b) in made.items():
            stored |= {f"{name(layer)}.{down}": a, f"{name(layer)}.{up}": b}
            if alpha:
                stored[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
        return stored

    return write


def original(layer: str) -> str:
    return TRANSFORMER_NAMES.to_original(layer)


def flat(prefix: str, name: Callable[[str], str]) -> Callable[[str], str]:
    return lambda layer: prefix + name(layer).replace(".", "_")


KOHYA = ("lora_down.weight", "lora_up.weight", True)
FAMILIES = {
    "diffusers": (spelled(lambda x: f"transformer.{x}"), 1.0),
    "ComfyUI": (spelled(lambda x: f"diffusion_model.{original(x)}"), 1.0),
    "kijai": (spelled(lambda x: f"diffusion_model.{original(x)}", *KOHYA), ALPHA / RANK),
    "musubi": (spelled(flat("lora_unet_", original), *KOHYA), ALPHA / RANK),
    "musubi without alpha": (spelled(flat("lora_unet_", original), *KOHYA[:2]), 1 / RANK),
    "Fun": (spelled(flat("lora_unet__", original), *KOHYA), ALPHA / RANK),
    "LyCORIS": (spelled(flat("lycoris_", lambda x: x), *KOHYA), ALPHA / RANK),
    "bare": (spelled(original, "lora_A.default.weight", "lora_B.default.weight"), 1.0),
}


@pytest.fixture
def network() -> FlowMapTransformer:
    return ours(theirs("WanTransformer3DModel"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_merges_at_its_scale(network: FlowMapTransformer, tmp_path: Path, family: str) -> None:
    write, scale = FAMILIES[family]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    save_file(write(pairs(network)), tmp_path / "lora.safetensors")
    network = network_from(LoraMerged.of(network, [LoraRequest(tmp_path / "lora.safetensors", 0.5)]))
    for name, tensor in network.state_dict().items():
        expected = before[name]
        if name.removesuffix(".weight") in LAYERS:
            a, b = pairs(network)[name.removesuffix(".weight")]
            expected = expected + 0.5 * scale * (b @ a)
        torch.testing.assert_close(tensor, expected)


def test_a_folder_of_peft_merges_at_its_alpha(network: FlowMapTransformer, tmp_path: Path) -> None:
    write = spelled(lambda x: f"base_model.model.{x}")
    save_file(write(pairs(network)), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    found = read_lora(tmp_path / "adapter_model.safetensors", network)
    assert {scale for _, _, scale in found.pairs.values()} == {ALPHA / RANK}


@pytest.mark.parametrize("family", ["diffusers", "ComfyUI", "kijai"])
def test_the_merged_network_is_that_of_diffusers_loader(tmp_path: Path, family: str) -> None:
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    reference: Any = theirs("WanTransformer3DModel")
    network = ours(reference)
    save_file(FAMILIES[family][0](pairs(network)), tmp_path / "lora.safetensors")
    network = network_from(LoraMerged.of(network, [LoraRequest(tmp_path / "lora.safetensors")]))
    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path / "lora.safetensors"))
    reference.load_lora_adapter(state, prefix="transformer")
    x = inputs()
    with torch.no_grad():
        u = network(x.z, x.t[:, 0], x.r[:, 0], x.text)
        assert distance(u, wan_velocity(reference, x)) < 1e-5


def test_differences_and_replacements_are_merged(network: FlowMapTransformer, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    block = "diffusion_model.blocks.0"
    stored = {
        f"{block}.norm3.diff": torch.ones(32), f"{block}.self_attn.q.diff_b": torch.ones(32),
        f"{block}.diff_m": torch.ones(1, 6, 32), "diffusion_model.head.diff_m": torch.ones(1, 2, 32),
        "diffusion_model.patch_embedding.diff": torch.ones(32, 8, 1, 2, 2),
        f"{block}.ffn.2.set_weight": torch.zeros(32, 64),
    }  # fmt: skip
    save_file(stored, tmp_path / "lora.safetensors")
    network = network_from(LoraMerged.of(network, [LoraRequest(tmp_path / "lora.safetensors", 0.25)]))
    after = network.state_dict()
    for name in ("blocks.0.norm2.weight", "blocks.0.attn1.to_q.bias", "blocks.0.scale_shift_table",
                 "scale_shift_table", "patch_embedding.weight"):  # fmt: skip
        torch.testing.assert_close(after[name], before[name] + 0.25)
    torch.testing.assert_close(after["blocks.0.ffn.net.2.weight"], 0.75 * before["blocks.0.ffn.net.2.weight"])


@pytest.mark.parametrize(
    "extra",
    [
        {"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.zeros(4, 32)},
        {"transformer.blocks.0.attn1.to_k.lora_A.weight": torch.zeros(4, 16),
         "transformer.blocks.0.attn1.to_k.lora_B.weight": torch.zeros(32, 4)},
        {"transformer.blocks.0.attn1.to_q.dora_scale": torch.zeros(32)},
    ],
    ids=["another layer", "another width", "DoRA"],
)  # fmt: skip
def test_a_file_of_which_a_part_does_not_fit_is_refused(
    network: FlowMapTransformer, tmp_path: Path, extra: dict[str, Tensor]
) -> None:
    save_file(FAMILIES["diffusers"][0](pairs(network)) | extra, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match=next(iter(extra))):
        read_lora(tmp_path / "lora.safetensors", network)


def test_an_address_carries_its_lora_files(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = open_model("tiny-anyflow", load_recipe("tiny")).network
    name = "blocks.0.attn1.to_q"
    rows, columns = network.get_parameter(f"{name}.weight").shape
    save_file({f"transformer.{name}.lora_A.weight": torch.ones(1, columns),
               f"transformer.{name}.lora_B.weight": torch.ones(rows, 1)}, file)  # fmt: skip
    address = with_loras("tiny-anyflow", [f"{file}:0.5", str(file)])
    assert split_loras(address) == ("tiny-anyflow", (LoraRequest(file, 0.5), LoraRequest(file, 1.0)))
    merged = open_model(address, load_recipe("tiny")).network
    changed = merged.get_parameter(f"{name}.weight") - network.get_parameter(f"{name}.weight")
    torch.testing.assert_close(changed, torch.full_like(changed, 1.5))
    info = describe(address, load_recipe("tiny"))
    assert file in info.sources
    assert info.lineage["loras"] == [[str(file), 0.5], [str(file), 1.0]]
    with pytest.raises(UsageError, match="no LoRA file"):
        split_loras(f"tiny-anyflow+{tmp_path / 'gone.safetensors'}")


@pytest.mark.parametrize(
    ("name", "changed"), [("a_high_noise", {"high"}), ("low-noise", {"low"}), ("style", {"high", "low"})]
)
def test_a_file_is_for_the_expert_that_its_name_states(tmp_path: Path, name: str, changed: set[str]) -> None:
    """Wan 2.2 has one file per expert; one for Wan 2.1 14B fits both."""
    for expert in ("high", "low"):
        make_wan_folder(tmp_path / expert)
    network = load_network(tmp_path / "high")
    file = tmp_path / f"{name}.safetensors"
    save_file(FAMILIES["ComfyUI"][0](pairs(network)), file)
    pair = resolve_pipeline(f"{tmp_path}/high,{tmp_path}/low+{file}:0.5")
    merged = dict(load_network(pair).named_parameters())
    plain = dict(load_network(Path(f"{tmp_path}/high,{tmp_path}/low")).named_parameters())
    moved = {key.partition(".")[0] for key, value in merged.items() if not torch.equal(value, plain[key])}
    assert moved == changed
