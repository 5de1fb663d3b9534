"""Text and video go through the encoders exactly as they go through diffusers' pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.encoders import TOGETHER, TextEncoder, VideoVAE, clean_prompt
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.pipeline_io import load_network
from tests.model.helpers import distance

PROMPTS = ["a small red circle", "", "a  large\n blue &amp;lt; square moving right on white background"]


@pytest.fixture(scope="module")
def text_encoder(wan_folder: Path) -> TextEncoder:
    return TextEncoder.load(wan_folder)


@pytest.fixture(scope="module")
def vae(wan_folder: Path) -> VideoVAE:
    return VideoVAE.load(wan_folder)


@pytest.mark.parametrize("max_tokens", [6, 24])  # the first cuts the longest prompt
@pytest.mark.parametrize("batch", [1, 32])
def test_text_equals_the_pipelines(
    wan_folder: Path, text_encoder: TextEncoder, max_tokens: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOGETHER, "kept", batch)
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(wan_folder)
    expected, _ = pipeline.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, max_sequence_length=max_tokens
    )
    text = text_encoder.encode(PROMPTS, max_tokens)
    assert text.shape == (3, max_tokens, text_encoder.dim)
    assert distance(text, expected) < 1e-6


def test_text_is_zero_after_its_end(text_encoder: TextEncoder) -> None:
    text = text_encoder.encode(PROMPTS, 24)
    for embedding, count in zip(text, text_encoder.tokens(PROMPTS), strict=True):
        assert embedding[count:].abs().sum() == 0
        assert (embedding[:count].abs().sum(-1) > 0).all()


def test_token_counts_are_of_the_whole_prompt(text_encoder: TextEncoder) -> None:
    assert text_encoder.tokens(["", "a red circle", "red " * 1000]) == [1, 4, 1001]


@pytest.mark.parametrize("text", ["it&amp;#39;s", "  two\t words ", "schÃ¶n", "&lt;b&gt;"])
def test_prompts_are_cleaned_as_in_the_pipelines(text: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_prompt(text) == prompt_clean(text)


def test_encoding_is_the_normalized_mode(wan_folder: Path, vae: VideoVAE) -> None:
    from diffusers import AnyFlowPipeline, FlowMapEulerDiscreteScheduler

    video = torch.rand(2, 5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    pipeline = AnyFlowPipeline(None, None, None, vae._model, FlowMapEulerDiscreteScheduler())
    expected = pipeline.encode_video(video, 16, 24)
    latents = vae.encode(video)
    assert latents.shape == (2, 2, 8, 2, 3)
    assert latents.shape[1:] == vae.latent_shape(5, 16, 24)
    assert distance(latents, expected) < 1e-5
    assert distance(vae.encode(video, batch=2), latents) < 1e-5


def test_decoding_undoes_the_normalization(vae: VideoVAE) -> None:
    latents = torch.randn(2, 2, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    video = vae.decode(latents)
    config = vae._model.config
    scaled = latents * torch.tensor(config.latents_std).view(-1, 1, 1) + torch.tensor(
        config.latents_mean
    ).view(-1, 1, 1)
    with torch.no_grad():
        expected = vae._model.decode(scaled.transpose(1, 2)).sample.transpose(1, 2) / 2 + 0.5
    assert video.shape == (2, 5, 3, 16, 24)
    assert distance(video, expected) < 1e-5
    assert video.min() >= 0
    assert video.max() <= 1
    assert video.std() > 0.01


@pytest.mark.parametrize("parts", [[1, 3, 3], [7], [3, 4]])
def test_a_video_decoded_in_parts_is_the_same_to_the_bit(vae: VideoVAE, parts: list[int]) -> None:
    latents = torch.randn(2, 7, 8, 2, 3, generator=torch.Generator().manual_seed(0))
    decode = vae.decoding()
    other = vae.decoding()  # decoded in turn: neither disturbs the other
    decoded = []
    for part in torch.split(latents, parts, dim=1):
        decoded.append(decode(part))
        other(part + 1)
    torch.testing.assert_close(torch.cat(decoded, dim=1), vae.decode(latents, batch=2), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "words"), [((5, 16, 20), "16x20"), ((6, 16, 16), "6 frames"), ((0, 8, 8), "0 frames")]
)
def test_sizes_that_do_not_fit_are_refused(vae: VideoVAE, shape: tuple[int, int, int], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        vae.latent_shape(*shape)
    assert caught.value.hint


def test_a_broken_component_is_named(wan_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no vae directory"):
        VideoVAE.load(tmp_path)
    shutil.copytree(wan_folder / "vae", tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        VideoVAE.load(tmp_path)
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        TextEncoder.load(tmp_path)


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A pipeline folder whose component ``target`` has other weights."""
    shutil.copytree(folder, target.parent, dirs_exist_ok=True)
    file = next(target.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target.parent


@pytest.mark.parametrize("name", ["shared.weight", "encoder.final_layer_norm.weight"])
def test_a_text_encoder_loaded_in_part_is_refused(wan_folder: Path, tmp_path: Path, name: str) -> None:
    """The library would fill what is missing with random values, and warn at most."""
    folder = changed(wan_folder, tmp_path / "text_encoder", lambda weights: weights.pop(name))
    with pytest.raises(UsageError, match="missing"):
        TextEncoder.load(folder)


def test_a_vae_loaded_in_part_is_refused(wan_folder: Path, tmp_path: Path) -> None:
    name = "decoder.conv_in.bias"
    folder = changed(wan_folder, tmp_path / "vae", lambda weights: weights.pop(name))
    with pytest.raises(UsageError, match=rf"{name} is missing"):
        VideoVAE.load(folder)
    folder = changed(wan_folder, tmp_path / "vae", lambda weights: weights.update(more=torch.ones(1)))
    with pytest.raises(UsageError, match="more is unexpected"):
        VideoVAE.load(folder)


def test_weights_that_are_not_finite_are_refused(wan_folder: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights[max(weights)].view(-1)[0] = torch.nan

    loads: dict[str, Callable[[Path], Any]] = {
        "vae": VideoVAE.load, "text_encoder": TextEncoder.load, "transformer": load_network,
    }  # fmt: skip
    for component, load in loads.items():
        folder = changed(wan_folder, tmp_path / component / component, spoil)
        with pytest.raises(UsageError, match=r"1 values of .* that are NaN or infinite"):
            load(folder)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_an_embedding_that_is_stored_once_is_loaded_whatever_the_configuration_says(
    wan_folder: Path, tmp_path: Path, name: str
) -> None:
    """Published folders say that word embeddings are not tied, and store one of two names."""
    folder = changed(
        wan_folder,
        tmp_path / "text_encoder",
        lambda weights: weights.update({name: weights.pop("shared.weight")}),
    )
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    text, expected = (TextEncoder.load(path).encode(PROMPTS, 16) for path in (folder, wan_folder))
    assert torch.equal(text, expected)
    assert check_folder(folder) == []
