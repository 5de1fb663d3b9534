"""VAEs and text encoders in original files compute what the classes of diffusers and transformers compute."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.layouts.components import STATISTICS_21, STATISTICS_22, open_component
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import component, load_network, read_config, read_shift, save_pipeline
from anyflow_cli.model.pipeline_sizes import pipeline_sizes
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.open import describe, open_model
from tests.model.helpers import distance
from tests.model.layouts import written
from tests.tiny_pipeline import WAN21_SIZES, make_wan_folder

Weights = dict[str, Tensor]


def vae(**changes: Any) -> Any:
    """Diffusers' VAE with random weights; its small sizes have the published proportions."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderKLWan(base_dim=4, **changes).eval()


def vae_22() -> Any:
    return vae(
        decoder_base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2,
        scale_factor_spatial=16, **STATISTICS_22,
    )  # fmt: skip


UP = r"decoder\.up_blocks"


def original_vae(weights: Weights) -> Weights:
    """Wan's own names, written out from ``wan/modules/vae.py`` and ``vae2_2.py``."""
    rows = [
        (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."),
        (r"^(\w+)\.conv_in\.", r"\1.conv1."), (r"^(\w+)\.norm_out\.", r"\1.head.0."),
        (r"^(\w+)\.conv_out\.", r"\1.head.2."),
        (r"\.norm1\.", ".residual.0."), (r"\.conv1\.(?=\w+$)(?<!coder\.conv1\.)", ".residual.2."),
        (r"\.norm2\.", ".residual.3."), (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.mid_block\.resnets\.0\.", ".middle.0."), (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    ]  # fmt: skip
    flat = "encoder.down_blocks.2.resample.1.weight" in weights
    if flat:
        rows += [
            (r"^encoder\.down_blocks\.", "encoder.downsamples."),
            *(
                (rf"^{UP}\.{n // 3}\.resnets\.{n % 3}\.", f"decoder.upsamples.{n + n // 3}.")
                for n in range(12)
            ),
            *((rf"^{UP}\.{k}\.upsamplers\.0\.", f"decoder.upsamples.{4 * k + 3}.") for k in range(3)),
        ]
    else:
        rows += [
            (r"^encoder\.down_blocks\.(\d)\.resnets\.(\d)\.", r"encoder.downsamples.\1.downsamples.\2."),
            (r"^encoder\.down_blocks\.(\d)\.downsampler\.", r"encoder.downsamples.\1.downsamples.2."),
            (r"^decoder\.up_blocks\.(\d)\.resnets\.(\d)\.", r"decoder.upsamples.\1.upsamples.\2."),
            (r"^decoder\.up_blocks\.(\d)\.upsampler\.", r"decoder.upsamples.\1.upsamples.3."),
        ]
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in rows:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.clone()
    assert len(renamed) == len(weights)
    return renamed


def test_the_names_written_here_are_those_that_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    weights = vae(z_dim=16).state_dict()
    converted = convert_wan_vae_to_diffusers(original_vae(weights))
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("make", [lambda: vae(z_dim=16), vae_22], ids=["Wan 2.1", "Wan 2.2"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_original_vae_encodes_and_decodes_as_diffusers_does(
    tmp_path: Path, make: Callable[[], Any], suffix: str
) -> None:
    reference = make()
    weights = original_vae(reference.state_dict())
    path = tmp_path / f"vae{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    loaded = open_component(path).load(torch.float32)
    ours, theirs = VideoVAE(loaded), VideoVAE(reference)
    assert (ours.spatial_factor, ours.channels) == (theirs.spatial_factor, theirs.channels)
    video = torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    latents = theirs.encode(video)
    assert distance(ours.encode(video), latents) < 1e-5
    assert distance(ours.decode(latents), theirs.decode(latents)) < 1e-5


def test_the_statistics_are_the_published_ones() -> None:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        config = AutoencoderKLWan().config
    assert list(config.latents_mean) == STATISTICS_21["latents_mean"]
    assert list(config.latents_std) == STATISTICS_21["latents_std"]
    assert [len(values) for values in STATISTICS_22.values()] == [48, 48]


def text_encoder() -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 3}
        return UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


def original_text_encoder(weights: Weights) -> Weights:
    """Wan's own names, written out from ``wan/modules/t5.py``."""
    bias = "relative_attention_bias"
    names = {"shared.weight": "token_embedding.weight", "encoder.final_layer_norm.weight": "norm.weight"}
    for n in {int(name.split(".")[2]) for name in weights if name.startswith("encoder.block.")}:
        block = f"encoder.block.{n}.layer"
        names |= {f"{block}.0.SelfAttention.{x}.weight": f"blocks.{n}.attn.{x}.weight" for x in "qkvo"}
        names |= {
            f"{block}.0.SelfAttention.{bias}.weight": f"blocks.{n}.pos_embedding.embedding.weight",
            f"{block}.0.layer_norm.weight": f"blocks.{n}.norm1.weight",
            f"{block}.1.layer_norm.weight": f"blocks.{n}.norm2.weight",
            f"{block}.1.DenseReluDense.wi_0.weight": f"blocks.{n}.ffn.gate.0.weight",
            f"{block}.1.DenseReluDense.wi_1.weight": f"blocks.{n}.ffn.fc1.weight",
            f"{block}.1.DenseReluDense.wo.weight": f"blocks.{n}.ffn.fc2.weight",
        }
    return {names[name]: t.clone() for name, t in weights.items() if name != "encoder.embed_tokens.weight"}


def comfy_text_encoder(weights: Weights) -> Weights:
    """ComfyUI's file: the names of transformers, the tokenizer as a tensor, scaled fp8."""
    own = {name: t.clone() for name, t in weights.items() if name != "encoder.embed_tokens.weight"}
    for name in [name for name in own if ".SelfAttention." in name and "bias" not in name]:
        scale = own[name].abs().max() / 448
        own[name] = (own[name] / scale).to(torch.float8_e4m3fn)
        own[name.replace(".weight", ".scale_weight")] = scale
    return own | {"spiece_model": torch.zeros(3, dtype=torch.uint8), "scaled_fp8": written.FP8_MARKER.clone()}


def test_an_original_text_encoder_computes_what_transformers_computes(tmp_path: Path) -> None:
    reference = text_encoder()
    torch.save(original_text_encoder(reference.state_dict()), tmp_path / "t5.pth")
    loaded = open_component(tmp_path / "t5.pth").load(torch.float32)
    ids = torch.tensor([[3, 8, 20, 1, 0], [5, 1, 0, 0, 0]])
    with torch.no_grad():
        theirs = reference(ids, (ids != 0).long()).last_hidden_state
        assert distance(loaded(ids, (ids != 0).long()).last_hidden_state, theirs) < 1e-5
    assert loaded.encoder.embed_tokens.weight is loaded.shared.weight


def test_a_scaled_text_encoder_of_comfyui_opens(tmp_path: Path) -> None:
    reference = text_encoder()
    save_file(comfy_text_encoder(reference.state_dict()), tmp_path / "t5.safetensors")
    loaded = open_component(tmp_path / "t5.safetensors").load(torch.bfloat16)
    ids = torch.tensor([[3, 8, 20, 1]])
    with torch.no_grad():
        theirs = reference(ids).last_hidden_state
        assert distance(loaded(ids).last_hidden_state, theirs) < 0.2


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="neither a Wan VAE nor a UMT5 encoder"):
        open_component(tmp_path / "x.safetensors")
    torch.save(
        original_vae(vae(z_dim=8, latents_mean=[0.0] * 8, latents_std=[1.0] * 8).state_dict()),
        tmp_path / "8.pth",
    )
    with pytest.raises(UsageError, match="8 latent channels instead of 16 or 48"):
        open_component(tmp_path / "8.pth")


# --- a whole original folder


class Folders(NamedTuple):
    """The same weights as a diffusers folder and as an original one."""

    diffusers: Path
    original: Path


def write_both(place: Path) -> Folders:
    """Write the same random weights in both layouts, in sizes that original files may have."""
    from transformers import UMT5EncoderModel

    both = Folders(make_wan_folder(place / "diffusers", **WAN21_SIZES), place / "original")
    autoencoder = vae(z_dim=16)
    autoencoder.save_pretrained(both.diffusers / "vae")
    config = written.ORIGINAL_CONFIG | {"in_dim": 16, "out_dim": 16}
    written.folder(both.original, written.as_original(load_network(both.diffusers).state_dict()), config)
    torch.save(original_vae(autoencoder.state_dict()), both.original / "Wan2.1_VAE.pth")
    encoder = UMT5EncoderModel.from_pretrained(both.diffusers / "text_encoder")
    text = original_text_encoder(encoder.state_dict())
    torch.save(text, both.original / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(both.diffusers / "tokenizer", both.original / "google" / "umt5-xxl")
    return both


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return write_both(tmp_path_factory.mktemp("folders"))


PROMPT = "a small red circle moving left"


def test_the_encoders_of_an_original_folder_are_those_of_diffusers(folders: Folders) -> None:
    ours, theirs = TextEncoder.load(folders.original), TextEncoder.load(folders.diffusers)
    assert distance(ours.encode([PROMPT], 16), theirs.encode([PROMPT], 16)) < 1e-5
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    decoded = VideoVAE.load(folders.original).decode(latents)
    assert distance(decoded, VideoVAE.load(folders.diffusers).decode(latents)) < 1e-5


def test_an_original_folder_is_a_model_by_itself(folders: Folders) -> None:
    opened = open_model(str(folders.original), load_recipe("tiny"))
    assert opened.pipeline == folders.original
    assert opened.shift == read_shift(folders.original) == 5.0
    sizes = pipeline_sizes(str(folders.original))
    assert sizes.network == read_config(folders.diffusers)
    assert sizes.latent_shape(5, 32, 32) == (2, 16, 4, 4)
    assert sizes.text_parameters == pipeline_sizes(str(folders.diffusers)).text_parameters
    info = describe(str(folders.original / written.SINGLE), load_recipe("tiny"))
    assert len(info.sources) == 4


@pytest.mark.parametrize("two_time", [False, True], ids=["Wan", "AnyFlow"])
def test_a_model_made_from_an_original_folder_opens_in_diffusers(
    folders: Folders, tmp_path: Path, two_time: bool
) -> None:
    from diffusers import DiffusionPipeline

    network = load_network(folders.original)
    network = two_time_from(network) if two_time else network
    target = save_pipeline(tmp_path / "model", network, folders.original, {})
    pipeline = DiffusionPipeline.from_pretrained(target)
    assert type(pipeline).__name__ == ("AnyFlowPipeline" if two_time else "WanPipeline")
    shift = pipeline.scheduler.config.shift if two_time else pipeline.scheduler.config.flow_shift
    assert shift == 5.0
    ours, theirs = TextEncoder.load(target), TextEncoder.load(folders.diffusers)
    assert distance(ours.encode([PROMPT], 16), theirs.encode([PROMPT], 16)) < 1e-5
    latents = torch.randn(1, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    decoded = VideoVAE.load(target).decode(latents)
    assert distance(decoded, VideoVAE.load(folders.diffusers).decode(latents)) < 1e-5


def test_a_folder_without_a_text_encoder_says_which_file_it_lacks(folders: Folders, tmp_path: Path) -> None:
    shutil.copy(folders.original / "Wan2.1_VAE.pth", tmp_path)
    assert component(tmp_path, "vae").name == "Wan2.1_VAE.pth"
    with pytest.raises(UsageError, match=r"has no text_encoder directory, nor models_t5\S+\.pth"):
        component(tmp_path, "text_encoder")


def test_an_original_folder_is_checked_whole(folders: Folders, tmp_path: Path) -> None:
    assert check_folder(folders.original) == []
    folder = shutil.copytree(folders.original, tmp_path / "original")
    os.truncate(folder / "Wan2.1_VAE.pth", 1000)
    (folder / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    problems = "\n".join(check_folder(folder))
    assert "Wan2.1_VAE.pth is damaged" in problems
    assert "models_t5_umt5-xxl-enc-bf16.pth is damaged" in problems
