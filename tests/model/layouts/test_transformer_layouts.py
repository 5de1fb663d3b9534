"""Every layout opens as the network of diffusers; what is not a plain Wan is refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.export import write_comfyui, write_merged
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.layouts.tensor_files import TensorFiles
from anyflow_cli.model.layouts.transformer import open_transformer
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs import resources
from anyflow_cli.runs.paths import RunPaths
from tests.model.helpers import distance, inputs, ours, theirs, wan_velocity
from tests.model.layouts import written
from tests.model.layouts.written import EXACT, ORIGINAL_CONFIG, QUANTIZED, as_original, originals


@pytest.fixture(scope="module")
def wan() -> Any:
    return written.reference()


def velocity(network: FlowMapTransformer) -> Tensor:
    x = inputs()
    with torch.no_grad():
        u: Tensor = network(x.z, x.t[:, 0], x.r[:, 0], x.text)
    return u


def test_the_names_written_here_are_those_that_diffusers_converts(wan: Any) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(as_original(wan.state_dict()))
    assert {name: tensor.data_ptr() for name, tensor in converted.items()}.keys() == wan.state_dict().keys()
    for name, tensor in wan.state_dict().items():
        assert torch.equal(converted[name], tensor)


@pytest.mark.parametrize("layout", EXACT)
def test_a_layout_computes_what_diffusers_computes(wan: Any, tmp_path: Path, layout: str) -> None:
    address = EXACT[layout](tmp_path, dict(wan.state_dict()))
    network = load_network(resolve_pipeline(str(address)))
    with torch.no_grad():
        assert distance(velocity(network), wan_velocity(wan, inputs())) < 1e-5
    for name, tensor in wan.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in network.parameters())


# Largest error of values near zero, relative to the largest weight. Unscaled fp8 has fixed steps of 2^-9.
ROUNDING = {layout: 2**-8 if "int8" in layout else 2**-15 for layout in QUANTIZED} | {"fp8": 2**-6}


@pytest.mark.parametrize("layout", QUANTIZED)
def test_quantized_weights_are_restored_to_their_rounding(wan: Any, tmp_path: Path, layout: str) -> None:
    network = load_network(QUANTIZED[layout](tmp_path, dict(wan.state_dict())))
    for name, tensor in wan.state_dict().items():
        loaded = network.state_dict()[name]
        assert loaded.dtype == torch.float32
        if written.is_linear(name, tensor):
            assert not torch.equal(loaded, tensor)
            torch.testing.assert_close(loaded, tensor, rtol=2**-4, atol=ROUNDING[layout] * tensor.abs().max())
        else:
            assert torch.equal(loaded, tensor)


def test_quantized_weights_are_bf16_where_no_type_is_named(wan: Any, tmp_path: Path) -> None:
    network = load_network(QUANTIZED["fp8 scaled"](tmp_path, dict(wan.state_dict())), dtype=None)
    kinds = {name: parameter.dtype for name, parameter in network.named_parameters()}
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert kinds["blocks.0.attn1.to_q.bias"] == torch.float32


def test_weights_are_loaded_in_a_type(wan: Any, tmp_path: Path) -> None:
    path = EXACT["Self-Forcing"](tmp_path, dict(wan.state_dict()))
    network = load_network(path, torch.bfloat16)
    assert network.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.bfloat16
    assert network.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert torch.equal(network.proj_out.weight, wan.proj_out.weight.bfloat16())


def test_layouts_are_named(wan: Any, tmp_path: Path) -> None:
    for layout, words in (
        ("original file", "original Wan names"),
        ("ComfyUI checkpoint", "original Wan names, under model.diffusion_model. (ComfyUI checkpoint)"),
        (
            "Self-Forcing",
            "original Wan names, under model. (Self-Forcing family), in the entry generator_ema",
        ),
        ("rCM", "original Wan names, under net. (rCM)"),
    ):
        path = EXACT[layout](tmp_path, dict(wan.state_dict()))
        assert open_transformer(path).tensors.layout == words
    path = QUANTIZED["fp8 scaled"](tmp_path, dict(wan.state_dict()))
    assert open_transformer(path).tensors.layout == "original Wan names, scaled F8_E4M3"


# --- AnyFlow


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("write", [write_merged, write_comfyui], ids=["merged", "comfyui"])
def test_our_own_single_files_open_again(tmp_path: Path, causal: bool, write: Callable[..., None]) -> None:
    kind = {"full_chunk_limit": 3} if causal else {}
    network = ours(
        theirs(f"AnyFlow{'FAR' if causal else ''}Transformer3DModel", deltatime_type="t-r", **kind)
    )
    write(tmp_path / "model.safetensors", network, {})
    again = load_network(tmp_path / "model.safetensors")
    assert again.config == network.config
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def nvlabs_folder(path: Path, **flags: Any) -> Path:
    """A transformer folder as the authors' own class saves it."""
    far, two_time = flags.get("init_far_model", False), flags.get("init_flowmap_model", False)
    kind = (
        "AnyFlowFARTransformer3DModel"
        if far
        else "AnyFlowTransformer3DModel"
        if two_time
        else "WanTransformer3DModel"
    )
    network = theirs(kind)
    own = {
        "_class_name": "FAR_Wan_Transformer3DModel", "added_kv_proj_dim": None, "chunk_partition": None,
        "qk_norm": "rms_norm_across_heads", "compressed_patch_size": [1, 4, 4], "full_chunk_limit": 3,
        "deltatime_type": "r",
    }  # fmt: skip
    kept = {key: value for key, value in network.config.items() if not key.startswith("_") and key not in own}
    kept.pop("gate_value", None)
    written.folder(path, network.state_dict(), json.loads(json.dumps(kept | own | flags)))
    return path


def test_folders_of_the_authors_own_class_open(tmp_path: Path) -> None:
    flags = {"init_far_model": False, "init_flowmap_model": True, "gate_value": 0.25}
    bidirectional = load_network(nvlabs_folder(tmp_path / "a", **flags))
    assert (bidirectional.config.two_time, bidirectional.config.causal) == (True, None)
    assert bidirectional.config.gate == 0.25
    causal = load_network(nvlabs_folder(tmp_path / "b", init_far_model=True, init_flowmap_model=True))
    assert causal.config.causal == CausalConfig()
    assert causal.config.gate == 0.0  # the default of that class
    plain = load_network(nvlabs_folder(tmp_path / "c"))
    assert not plain.config.two_time
    with pytest.raises(UsageError, match="causal model with one time"):
        open_transformer(nvlabs_folder(tmp_path / "d", init_far_model=True))


def test_a_partition_that_is_null_or_absent_is_the_default(tmp_path: Path) -> None:
    network = theirs("AnyFlowFARTransformer3DModel")
    for number, change in enumerate(({"chunk_partition": None}, {})):
        config = dict(network.config) | {"_class_name": "AnyFlowFARTransformer3DModel"} | change
        if not change:
            config.pop("chunk_partition")
        path = written.folder(tmp_path / str(number), network.state_dict(), config)
        assert load_network(path).config.causal == CausalConfig()


def test_a_causal_folder_of_fastvideo_opens_as_the_wan_that_it_is(wan: Any, tmp_path: Path) -> None:
    config = dict(wan.config) | {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3}
    network = load_network(written.folder(tmp_path / "SFWan2.1", wan.state_dict(), config))
    assert (network.config.two_time, network.config.causal) == (False, None)
    assert network.state_dict().keys() == wan.state_dict().keys()


# --- what is not a plain Wan

FOREIGN = {
    "vace_blocks.0.before_proj.weight": "VACE",
    "face_adapter.fuser_blocks.0.linear1_q.weight": "Animate",
    "casual_audio_encoder.weights": "S2V",
    "audio_proj.proj1.weight": "HuMo",
    "ref_conv.weight": "Fun control",
    "control_adapter.conv.weight": "Fun control",
    "time_embedding_r.0.weight": "MeanFlow",
    "blocks.0.self_attn.attn_op.local_attn.proj_l.weight": "TurboWan",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_other_models_are_refused_by_name(wan: Any, tmp_path: Path, name: str, prefix: str) -> None:
    weights = as_original(wan.state_dict()) | {name: torch.zeros(1)}
    save_file(written.prefixed(weights, prefix), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=FOREIGN[name]) as caught:
        load_network(tmp_path / "model.safetensors")
    assert caught.value.hint


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name, tensors, words in (
        ("magi", {"videodit_blocks.layers.0.x.weight": torch.zeros(1)}, "MAGI-1"),
        ("lora", {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.zeros(1)}, "LoRA file"),
        ("vae", {"decoder.middle.0.residual.0.gamma": torch.zeros(1)}, "is a Wan VAE"),
        ("text", {"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}, "is a text encoder"),
        ("other", {"x": torch.zeros(1)}, "holds no Wan transformer"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(UsageError, match=words):
            load_network(tmp_path / f"{name}.safetensors")


def test_gguf_and_text_files_are_refused(tmp_path: Path) -> None:
    for name, words in (("wan.gguf", "GGUF"), ("wan.txt", "not of model weights")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(UsageError, match=words):
            load_network(tmp_path / name)


@pytest.mark.parametrize(("model_type", "words"), [("animate", "Animate"), ("vace", "VACE"), ("s2v", "S2V")])
def test_original_folders_of_other_models_are_refused(tmp_path: Path, model_type: str, words: str) -> None:
    path = written.folder(
        tmp_path / "wan", {"x": torch.zeros(1)}, ORIGINAL_CONFIG | {"model_type": model_type}
    )
    with pytest.raises(UsageError, match=words):
        open_transformer(path)


def test_a_model_with_other_channels_is_refused(tmp_path: Path) -> None:
    network = theirs("WanTransformer3DModel", in_channels=24, attention_head_dim=128)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="takes 24 channels, of which 8 are noise"):
        load_network(tmp_path / "model.safetensors")


@pytest.mark.parametrize("form", ["nvfp4", "mxfp8"])
def test_formats_that_a_scale_does_not_undo_are_refused(wan: Any, tmp_path: Path, form: str) -> None:
    weights = written.comfy_quantized(as_original(wan.state_dict()), form)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"as {form}, which anyflow cannot read"):
        load_network(tmp_path / "model.safetensors")


def test_a_pickled_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"x": print}, protocol=2))
    with pytest.raises(UsageError, match="objects besides tensors"):
        load_network(tmp_path / "model.pt")
    torch.save({"generator": print}, tmp_path / "zip.pt")
    with pytest.raises(UsageError, match="objects besides tensors"):
        load_network(tmp_path / "zip.pt")


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        with pytest.raises(UsageError, match="is damaged") as caught:
            load_network(tmp_path / name)
        assert "\n" not in caught.value.message
    torch.save({"step": 3}, tmp_path / "no-tensors.pt")
    with pytest.raises(UsageError, match="no tensors by name"):
        load_network(tmp_path / "no-tensors.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [("head_dim", "x"), ("head_dim", "0"), ("gate", "much"), ("config", "{"), ("config", "1")],
)
def test_a_header_of_another_type_is_refused(wan: Any, tmp_path: Path, key: str, value: str) -> None:
    save_file(as_original(wan.state_dict()), tmp_path / "model.safetensors", {key: value})
    with pytest.raises(UsageError, match=rf"The header of .*model\.safetensors is damaged: {key}"):
        load_network(tmp_path / "model.safetensors")


def test_blocks_without_a_number_are_unexpected(wan: Any, tmp_path: Path) -> None:
    save_file(as_original(wan.state_dict()) | {"blocks.x.y": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"blocks\.x\.y is unexpected"):
        load_network(tmp_path / "model.safetensors")


def test_pickled_files_that_are_cut_or_hold_themselves_are_refused(wan: Any, tmp_path: Path) -> None:
    file, looped = tmp_path / "model.pth", dict[str, Any]()
    looped["ema"] = looped
    torch.save(looped, file)
    with pytest.raises(UsageError, match="holds no tensors by name"):
        load_network(file)
    torch.save(as_original(wan.state_dict()), file, _use_new_zipfile_serialization=False)
    for size in range(0, 2000, 50):
        (tmp_path / "cut.pth").write_bytes(file.read_bytes()[: size + 100_000])
        with pytest.raises(UsageError, match="is damaged"):
            load_network(tmp_path / "cut.pth")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_pipe_is_not_read(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UsageError, match="not a regular file"):
        TensorFiles.open((tmp_path / name,))


def test_missing_and_extra_tensors_are_named(wan: Any, tmp_path: Path) -> None:
    weights = as_original(wan.state_dict())
    lacking = {name: tensor for name, tensor in weights.items() if name != "blocks.1.self_attn.o.bias"}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(
        UsageError, match=r"do not fit each other: blocks\.1\.attn1\.to_out\.0\.bias is missing"
    ):
        load_network(tmp_path / "model.safetensors")
    save_file(weights | {"blocks.0.surprise.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"blocks\.0\.surprise\.weight is unexpected"):
        load_network(tmp_path / "model.safetensors")


def test_every_module_of_the_table_is_a_module_of_wan() -> None:
    from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES

    for theirs_name, our_name in originals().items():
        assert TRANSFORMER_NAMES.to_original(our_name) == theirs_name
        assert TRANSFORMER_NAMES.from_original(f"{theirs_name}.weight") == f"{our_name}.weight"


def test_the_page_on_models_names_every_layout_family() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    for words in ("original Wan file", "ComfyUI", "fp8", "Self-Forcing", "rCM", "FAR_Wan_Transformer3DModel"):
        assert words in page
    assert all(words.split()[-1] in page for words in set(FOREIGN.values()))


def test_a_bare_transformer_is_refused_where_its_parts_are_needed(wan: Any, tmp_path: Path) -> None:
    file = EXACT["original file"](tmp_path, dict(wan.state_dict()))
    recipe = load_recipe("tiny", [f"model.teacher={file}"])
    found = {one.name: one for one in resources.inputs(recipe, RunPaths(tmp_path, "tiny"), "train-flowmap")}
    assert found["teacher"].state == "unusable"
    assert "no VAE, text encoder and tokenizer" in found["teacher"].problem
    assert f"anyflow export --model {file}" in found["teacher"].how_to_get_it
