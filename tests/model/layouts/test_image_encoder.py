"""CLIP's vision tower in Wan's own file and in ComfyUI's computes what the class of transformers computes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.inspection import inspect_address
from anyflow_cli.model.encoders import PictureEncoder
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.layouts.components import IMAGE_ENCODER_FILES, open_component
from anyflow_cli.model.pipeline_io import load_network, read_shift, save_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.synthesize.job import prepare_synthesis
from tests.model.helpers import distance
from tests.model.layouts import written
from tests.model.layouts.test_components import original_text_encoder, original_vae, vae
from tests.tiny_pipeline import make_i2v_folder

Weights = dict[str, Tensor]
WIDTH = 160  # two heads of CLIP's width
WAN_FILE, COMFY_FILE = IMAGE_ENCODER_FILES


def tower() -> Any:
    """The class of transformers with random weights, in small proportions of ViT-H/14."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=14, hidden_act="gelu",
        )  # fmt: skip
        model = CLIPVisionModel(config).eval()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        return model


def bare(model: Any) -> Weights:
    """Weights under the names of the tower itself, whatever the version of transformers."""
    return {name.removeprefix("vision_model."): t.clone() for name, t in model.state_dict().items()}


def original(weights: Weights) -> Weights:
    """Wan's own names, written out from ``wan/modules/clip.py``, the text tower included."""
    own = {
        "visual.patch_embedding.weight": weights["embeddings.patch_embedding.weight"],
        "visual.cls_embedding": weights["embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": weights["embeddings.position_embedding.weight"][None],
        "visual.head": torch.zeros(WIDTH, 8), "textual.token_embedding.weight": torch.zeros(3, 4),
        "log_scale": torch.zeros(()),
    }  # fmt: skip
    modules = {"pre_norm": "pre_layrnorm", "post_norm": "post_layernorm"}
    for n in range(3):
        for theirs, ours in (
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"),
            ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"),
        ):  # fmt: skip
            modules[f"transformer.{n}.{theirs}"] = f"encoder.layers.{n}.{ours}"
    for last in ("weight", "bias"):
        own |= {f"visual.{theirs}.{last}": weights[f"{ours}.{last}"] for theirs, ours in modules.items()}
        for n in range(3):
            parts = [weights[f"encoder.layers.{n}.self_attn.{x}_proj.{last}"] for x in "qkv"]
            own[f"visual.transformer.{n}.attn.to_qkv.{last}"] = torch.cat(parts)
    return own


def comfy(weights: Weights) -> Weights:
    """ComfyUI's file: the names of transformers, with the projection and the buffer of older versions."""
    named = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    named["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    return named | {"visual_projection.weight": torch.zeros(8, WIDTH)}


FILES: dict[str, Callable[[Weights], Weights]] = {WAN_FILE: original, COMFY_FILE: comfy}


def write(folder: Path, name: str, weights: Weights) -> Path:
    (save_file if name.endswith("safetensors") else torch.save)(weights, folder / name)
    return folder / name


@pytest.mark.parametrize("name", FILES)
def test_the_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    reference = tower()
    write(tmp_path, name, FILES[name](bare(reference)))
    encoder = PictureEncoder.load(tmp_path)
    picture = (torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)  # Wan's own transform
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        hidden = reference((picture - mean) / std, output_hidden_states=True).hidden_states
    assert distance(encoder.encode(picture), hidden[-2]) < 1e-5
    assert distance(hidden[-1], hidden[-2]) > 0.1


def test_the_whole_picture_is_resized_without_a_crop(tmp_path: Path) -> None:
    write(tmp_path, WAN_FILE, original(bare(tower())))
    encoder = PictureEncoder.load(tmp_path)
    wide = torch.zeros(1, 3, 28, 84)
    with_edge = wide.clone()
    with_edge[..., :14] = 1  # a crop to the center would lose it
    assert distance(encoder.encode(with_edge), encoder.encode(wide)) > 1e-2


def test_incomplete_and_other_towers_are_refused(tmp_path: Path) -> None:
    weights = original(bare(tower()))
    for lost in ("visual.pos_embedding", "visual.transformer.0.mlp.0.weight"):
        path = write(tmp_path, WAN_FILE, {n: t for n, t in weights.items() if n != lost})
        with pytest.raises(UsageError, match="is incomplete"):
            open_component(path)
    path = write(tmp_path, WAN_FILE, {n: t for n, t in weights.items() if "1.attn.to_qkv" not in n})
    with pytest.raises(UsageError, match=r"encoder\.layers\.1\.self_attn"):
        open_component(path).load(torch.float32)
    narrow = weights | {"visual.patch_embedding.weight": torch.zeros(100, 3, 14, 14)}
    with pytest.raises(UsageError, match="is not CLIP ViT-H/14: its width is 100"):
        open_component(write(tmp_path, WAN_FILE, narrow))


# --- a whole original folder of Wan 2.1 I2V


class Folders(NamedTuple):
    """The same weights as a diffusers folder and as an original one."""

    diffusers: Path
    original: Path


def make_folders(place: Path) -> Folders:
    from transformers import UMT5EncoderModel

    sizes: dict[str, Any] = {"in_channels": 36, "out_channels": 16, "attention_head_dim": 128}
    clip: dict[str, Any] = {"image_dim": WIDTH, "added_kv_proj_dim": 256}
    both = Folders(make_i2v_folder(place / "diffusers", **sizes, **clip), place / "original")
    autoencoder = vae(z_dim=16)
    autoencoder.save_pretrained(both.diffusers / "vae")
    config = written.ORIGINAL_CONFIG | {"in_dim": 36, "out_dim": 16, "model_type": "i2v"}
    weights = load_network(both.diffusers).state_dict()
    written.folder(both.original, written.as_original(weights), config)
    torch.save(original_vae(autoencoder.state_dict()), both.original / "Wan2.1_VAE.pth")
    encoder = UMT5EncoderModel.from_pretrained(both.diffusers / "text_encoder")
    torch.save(original_text_encoder(encoder.state_dict()), both.original / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(both.diffusers / "tokenizer", both.original / "google" / "umt5-xxl")
    write(both.original, WAN_FILE, original(bare(tower())))
    return both


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("folders"))


SMALL = ["--set=model.pictures=first", "--set=model.precision=fp32", "--set=model.height=32",
         "--set=model.width=32", "--set=model.frames=5", "--nfe=1"]  # fmt: skip


def test_an_original_folder_samples_from_a_picture_by_itself(folders: Folders, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 24), "red").save(picture)
    command = ["sample", "-r", "tiny", "--teacher", "--model", str(folders.original), "-p", "a red circle"]
    for out in ("one", "two"):
        said = [*command, "--image", str(picture), "--out", str(tmp_path / out), *SMALL]
        assert main([*said, *(["--dry-run"] if out == "one" else [])]) == 0
    assert json.loads((tmp_path / "two" / "samples.json").read_text())["samples"]


def test_a_model_made_from_it_opens_in_diffusers(folders: Folders, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline

    saved = save_pipeline(tmp_path / "saved", load_network(folders.original), folders.original, {})
    pipeline = WanImageToVideoPipeline.from_pretrained(saved)
    picture = torch.rand(1, 3, 30, 50, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    array = (picture[0].permute(1, 2, 0) * 255).byte().numpy()
    ours = PictureEncoder.load(folders.original).encode(picture)
    with torch.no_grad():
        theirs = pipeline.encode_image(Image.fromarray(array), "cpu")
    assert distance(PictureEncoder.load(saved).encode(picture), ours) < 1e-6
    assert distance(theirs, ours) < 1e-2  # diffusers resizes with torchvision
    assert check_folder(saved) == check_folder(folders.original) == []


def test_inspect_says_what_it_lacks(folders: Folders, tmp_path: Path) -> None:
    facts = inspect_address(str(folders.original))
    assert facts["image_encoder"] == str(folders.original / WAN_FILE)
    assert facts["missing"] == facts["problems"] == []
    assert inspect_address(str(folders.original / WAN_FILE))["kind"] == "image encoder (CLIP)"
    folder = shutil.copytree(folders.original, tmp_path / "copy")
    (folder / WAN_FILE).unlink()
    assert inspect_address(str(folder))["missing"] == ["image_encoder", "image_processor"]
    assert any(re.search(r"no image_encoder directory, nor models_clip", one) for one in check_folder(folder))
    torch.save(original(bare(tower())) | {"visual.patch_embedding.weight": torch.zeros(80, 3, 14, 14)},
               folder / WAN_FILE)  # fmt: skip
    assert any("has the width 80, and the network takes tokens of 160" in one for one in check_folder(folder))


def test_the_shift_of_an_original_first_last_frame_folder_is_its_own(
    folders: Folders, tmp_path: Path
) -> None:
    assert read_shift(folders.original) == 5.0
    folder = shutil.copytree(folders.original, tmp_path / "flf")
    weights = written.as_original(load_network(folders.diffusers).state_dict())
    save_file(weights | {"img_emb.emb_pos": torch.zeros(1, 10, WIDTH)}, folder / written.SINGLE)
    assert read_shift(folder) == 16.0


def test_a_data_set_knows_the_transformer_of_an_original_folder(folders: Folders, tmp_path: Path) -> None:
    def hashes(folder: Path) -> tuple[str, str]:
        recipe = load_recipe("tiny", [f"model.teacher={folder}", "model.vae_scale=8"])
        provenance = prepare_synthesis(recipe, tmp_path / "data").provenance
        return provenance["encoder_files"], provenance["transformer_files"]

    folder = shutil.copytree(folders.original, tmp_path / "copy")
    assert hashes(folder) == hashes(folders.original)
    weights = load_file(folder / written.SINGLE)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / written.SINGLE)
    there, now = hashes(folders.original), hashes(folder)
    assert (there[0] == now[0], there[1] == now[1]) == (True, False)


def test_components_without_clip_are_refused_by_a_dry_run(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = shutil.copy(folders.original / written.SINGLE, tmp_path)
    components = shutil.copytree(folders.original, tmp_path / "components")
    command = ["synthesize", "-r", "tiny", "--dry-run", "--runs", str(tmp_path / "runs"), SMALL[0]]
    command += [f"--set=model.teacher={file}", f"--set=model.components={components}"]
    assert main(command) == 0
    (components / WAN_FILE).unlink()
    assert main(command) == 2
    assert "components has no image_encoder directory" in " ".join(capsys.readouterr().err.split())
