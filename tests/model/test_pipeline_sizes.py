"""Known sizes against published parameter counts, and read sizes against real folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.pipeline_sizes import PipelineSizes, pipeline_sizes
from anyflow_cli.plan.networks import Setup, role_sizes
from anyflow_cli.recipe import schema
from tests.tiny_pipeline import CHANNELS, TEXT_DIM, make_i2v_folder, make_wan_folder

PUBLISHED = {  # of the safetensors of the transformers on the Hub
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_418_996_800,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288_491_584,
}
UMT5_XXL = 5_680_910_336


@pytest.mark.parametrize("address", PUBLISHED)
def test_parameters_are_the_published_ones(address: str) -> None:
    network = KNOWN_MODELS[address].network
    shapes = (21, 16, 60, 104), (512, network.text_dim)
    wan = Setup(schema.ModelSection(), None, network, *shapes, "bf16", True, two_time=False)
    assert role_sizes(wan)["student"]["parameters"] == PUBLISHED[address]


@pytest.mark.parametrize("address", PUBLISHED)
def test_the_sizes_are_those_of_the_diffusers_class(address: str) -> None:
    """The same count from diffusers' own network, by two depths of it; it knows nothing of ours."""
    import torch
    from diffusers import WanTransformer3DModel

    network = KNOWN_MODELS[address].network
    sizes = {"num_attention_heads": network.heads, "attention_head_dim": 128, "ffn_dim": network.ffn_dim}
    with torch.device("meta"):
        one, two = (
            sum(p.numel() for p in WanTransformer3DModel(**sizes, num_layers=layers).parameters())
            for layers in (1, 2)
        )
    assert one + (network.layers - 1) * (two - one) == PUBLISHED[address]


def test_the_text_encoder_is_umt5_xxl() -> None:
    network = KNOWN_MODELS[next(iter(PUBLISHED))].network
    assert PipelineSizes(network).text_parameters == UMT5_XXL


def test_the_image_encoder_is_clip_h(tmp_path: Path) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    }
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14))
    counted = pipeline_sizes("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers").image_parameters
    assert counted == sum(p.numel() for p in model.parameters())
    assert pipeline_sizes("Wan-AI/Wan2.1-T2V-14B-Diffusers").image_parameters == 0
    own = CLIPVisionModel.from_pretrained(make_i2v_folder(tmp_path / "i2v") / "image_encoder")
    read = pipeline_sizes(str(tmp_path / "i2v")).image_parameters
    assert read == sum(p.numel() for p in own.parameters())


def test_a_local_folder_says_its_own_sizes(tmp_path: Path) -> None:
    from transformers import UMT5EncoderModel

    folder = make_wan_folder(tmp_path / "wan")
    pipeline = pipeline_sizes(str(folder))
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    assert pipeline.text_parameters == sum(p.numel() for p in encoder.parameters())
    assert (pipeline.network.in_channels, pipeline.network.text_dim) == (CHANNELS, TEXT_DIM)


@pytest.mark.parametrize("address", ["someone/else", "no/such/folder"])
def test_other_models_are_not_guessed(address: str) -> None:
    with pytest.raises(UsageError, match="not known without its files"):
        pipeline_sizes(address)
