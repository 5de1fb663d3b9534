"""VAE, text and image encoder, in a pipeline's folder or in the files of Wan's own releases and of ComfyUI.

They become the classes of diffusers and transformers, read tensor by tensor. The sizes of single files are
inferred from the tensors; they are found by the names under which they are published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.named_weights import NamedWeights
from anyflow_cli.model.layouts.names import (
    IMAGE_ENCODER_NAMES,
    TEXT_ENCODER_NAMES,
    VAE_21_NAMES,
    VAE_22_NAMES,
    substituted,
)
from anyflow_cli.model.layouts.quantized import is_quantization
from anyflow_cli.model.layouts.tensor_files import TensorFiles
from anyflow_cli.model.weights_io import (
    FETCH,
    TEXT_ENCODER_STEM,
    TRANSFORMER_STEM,
    check_names_and_shapes,
    component_files,
    fill_module,
    read_headers,
    write_weights,
)
from anyflow_cli.utils.files import read_json, write_json

IMAGE_ENCODER_FILES = (
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth", "clip_vision_h.safetensors",
)  # fmt: skip
ORIGINAL_FILES = {
    "vae": ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth", "wan_2.1_vae.safetensors", "wan2.2_vae.safetensors"),
    "text_encoder": (
        "models_t5_umt5-xxl-enc-bf16.pth", "umt5_xxl_fp16.safetensors",
        "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    ),
    "tokenizer": ("google/umt5-xxl",),
    "image_encoder": IMAGE_ENCODER_FILES,
    "image_processor": IMAGE_ENCODER_FILES,  # its settings follow from the encoder's sizes
}  # fmt: skip
EMBED_TOKENS = "encoder.embed_tokens.weight"
REST_OF_UMT5 = ("decoder.", "lm_head.")  # a whole model is more than its encoder
STEMS = {"vae": TRANSFORMER_STEM, "text_encoder": TEXT_ENCODER_STEM, "image_encoder": "model"}
VISION = "vision_model."  # before the names of an image encoder on disk
CLIP_HEAD = 80  # channels of a head of CLIP ViT-H/14
DIM_MULT = (1, 2, 4, 4)  # widths of the VAE's levels, relative to the first; the same in both VAEs

# Mean and standard deviation of each latent channel: vae/config.json of the published folders.
STATISTICS_21 = {
    "latents_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517,
        -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latents_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579,
        1.6382, 1.1253, 2.8251, 1.9160,
    ],
}  # fmt: skip
STATISTICS_22 = {
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
        0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
        -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
        -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
        0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}  # fmt: skip


# What Wan's own code does with a picture before CLIP: resize the whole of it, without a crop.
IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
    "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


# vae/config.json of Wan 2.2 TI2V-5B, where it differs from the defaults of diffusers' class.
VAE_22: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12,
    "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16, "scale_factor_temporal": 4,
    **STATISTICS_22,
}  # fmt: skip


@dataclass(frozen=True)
class ComponentFiles:
    """A VAE, a text encoder or an image encoder on disk.

    Attributes:
        name: Component of a pipeline that it is, a key of ``STEMS``.
        path: A folder, or an original file.
        weights: Its tensors under the names of the class.
        config: Configuration of the class.
    """

    name: str
    path: Path
    weights: NamedWeights
    config: Mapping[str, Any]

    def load(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """Load the component with weights of a type, straight onto a device."""
        with torch.device("meta"):
            model = self._build()
        model = getattr(model, "vision_model", model)  # CLIP's tower is inside the class in some versions
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        reference = "config.json" if self.path.is_dir() else "each other"
        check_names_and_shapes(expected, self.weights.shapes, self.path, reference)
        fill_module(model, self.weights.lazy(), lambda name: dtype, device)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        if self.name == "image_encoder":  # a buffer that is not stored
            positions = torch.arange(expected["embeddings.position_embedding.weight"][0], device=device)
            model.embeddings.position_ids = positions[None]
        return model.eval()

    def _build(self) -> Any:
        from diffusers import AutoencoderKLWan
        from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

        if self.name == "text_encoder":
            return UMT5EncoderModel(UMT5Config(**self.config))
        if self.name == "image_encoder":
            return CLIPVisionModel(CLIPVisionConfig(**self.config))
        return AutoencoderKLWan.from_config(self.config)

    def write(self, folder: Path) -> None:
        """Write the component as a folder of a diffusers pipeline, with its type kept."""
        folder.mkdir(parents=True)
        write_json(folder / "config.json", self.config)
        prefix = VISION if self.name == "image_encoder" else ""
        stored = {prefix + name: weight for name, weight in self.weights.lazy().items()}
        write_weights(folder / f"{STEMS[self.name]}.safetensors", stored, {"format": "pt"})

    @property
    def processor(self) -> dict[str, Any]:
        """Settings of ``CLIPImageProcessor`` for the pictures of an image encoder in an original file."""
        size = self.config["image_size"]
        return IMAGE_PROCESSOR | {"size": {"height": size, "width": size}}


def original_place(pipeline: Path, name: str) -> Path | None:
    """Find a component among the files of an original folder, or beside a file of transformer weights."""
    folder = pipeline if pipeline.is_dir() else pipeline.parent
    return next((folder / file for file in ORIGINAL_FILES.get(name, ()) if (folder / file).exists()), None)


def tokenizer_class(folder: Path) -> str:
    """Class that a tokenizer's folder states; the fast one of T5, whose slow one Wan's folder states."""
    file = folder / "tokenizer_config.json"
    stated = read_json(file).get("tokenizer_class", "T5Tokenizer") if file.is_file() else "T5Tokenizer"
    return "T5TokenizerFast" if stated == "T5Tokenizer" else str(stated)


def component_config(place: Path) -> dict[str, Any]:
    """Configuration of a VAE or a text encoder: that of its folder, or inferred from its file's headers."""
    if place.is_dir():
        return read_json(place / "config.json")
    return dict(open_component(place).config)


def open_component_folder(folder: Path, component: str) -> ComponentFiles:
    """Open the folder of a VAE or a text encoder; only headers are read."""
    stem = STEMS[component]
    read_headers(folder, stem)  # refuses a damaged file in words
    files = TensorFiles.open(component_files(folder, stem))
    names = {name: name for name in files.tensors}
    if component == "text_encoder":
        names = {name: name for name in names if not name.startswith(REST_OF_UMT5)}
        table = names.pop(EMBED_TOKENS, None)  # the same embeddings, stored under either name or both
        if table is not None:
            names.setdefault("shared.weight", table)
    weights = NamedWeights(files, names, "names of diffusers and transformers")
    return ComponentFiles(component, folder, weights, read_json(folder / "config.json"))


def open_component(path: Path) -> ComponentFiles:
    """Open a file with a VAE, a text encoder or an image encoder; only headers are read.

    Raises:
        UsageError: It holds none of them.
    """
    files = TensorFiles.open((path,))
    if "encoder.conv1.weight" in files.tensors:
        return _open_vae(path, files)
    if files.tensors.keys() & {"token_embedding.weight", "shared.weight"}:
        return _open_text_encoder(path, files)
    if files.tensors.keys() & {f"{VISION}pre_layrnorm.weight", "visual.pre_norm.weight"}:
        return _open_image_encoder(path, files)
    raise UsageError(f"{path} holds neither a Wan VAE nor a UMT5 encoder nor CLIP's vision tower.", FETCH)


def _size(path: Path, weights: NamedWeights, name: str, axis: int) -> int:
    """Length of an axis of a tensor, which an incomplete file lacks."""
    if name not in weights.stored_names:
        raise UsageError(f"{path} is incomplete: {name} is missing.", FETCH)
    return weights.shape(name)[axis]


def _open_vae(path: Path, files: TensorFiles) -> ComponentFiles:
    is_residual = any(".downsamples.0.downsamples." in name for name in files.tensors)
    table = VAE_22_NAMES if is_residual else VAE_21_NAMES
    weights = NamedWeights(
        files, {substituted(name, table): name for name in files.tensors}, "original Wan names"
    )
    size = partial(_size, path, weights)

    channels = size("post_quant_conv.weight", 0)
    statistics = {16: STATISTICS_21, 48: STATISTICS_22}.get(channels)
    if statistics is None:
        raise UsageError(f"{path} is a VAE with {channels} latent channels instead of 16 or 48.", FETCH)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLWan", "base_dim": size("encoder.conv_in.weight", 0), "z_dim": channels,
        "dim_mult": list(DIM_MULT), "num_res_blocks": 2, "attn_scales": [], "dropout": 0.0,
        "temperal_downsample": [False, True, True], **statistics,
    }  # fmt: skip
    if is_residual:
        pixels = size("encoder.conv_in.weight", 1)
        config |= {
            "decoder_base_dim": size("decoder.conv_in.weight", 0) // DIM_MULT[-1], "is_residual": True,
            "in_channels": pixels, "out_channels": pixels, "patch_size": 2, "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
        }  # fmt: skip
    return ComponentFiles("vae", path, weights, config)


def _open_text_encoder(path: Path, files: TensorFiles) -> ComponentFiles:
    original = "token_embedding.weight" in files.tensors
    unused = ("spiece_model", EMBED_TOKENS)  # the tokenizer, and another name of shared.weight
    weights = NamedWeights(
        files,
        {
            TEXT_ENCODER_NAMES.from_original(name) if original else name: name
            for name in files.tensors
            if name not in unused and not is_quantization(name)
        },
        "original Wan names" if original else "names of transformers",
    )
    size = partial(_size, path, weights)

    attention = "encoder.block.0.layer.0.SelfAttention"
    heads = size(f"{attention}.relative_attention_bias.weight", 1)
    blocks = {int(name.split(".")[2]) for name in weights.stored_names if name.startswith("encoder.block.")}
    config = {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
        "vocab_size": size("shared.weight", 0), "d_model": size("shared.weight", 1), "num_heads": heads,
        "d_kv": size(f"{attention}.q.weight", 0) // heads, "num_layers": 1 + max(blocks),
        "d_ff": size("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
        "relative_attention_num_buckets": size(f"{attention}.relative_attention_bias.weight", 0),
    }  # fmt: skip
    return ComponentFiles("text_encoder", path, weights, config)


def _open_image_encoder(path: Path, files: TensorFiles) -> ComponentFiles:
    """CLIP's vision tower; the text tower of Wan's own file and the projections are not used."""
    original = "visual.pre_norm.weight" in files.tensors
    names: dict[str, str] = {}
    parts: dict[str, tuple[int, int]] = {}
    for stored in files.tensors:
        if original and stored.startswith("visual.") and stored != "visual.head":
            name = IMAGE_ENCODER_NAMES.from_original(stored)
            fused = [name.replace("to_qkv", f"{one}_proj") for one in "qkv"] if "to_qkv" in name else [name]
            names |= dict.fromkeys(fused, stored)
            parts |= {one: (n, 3) for n, one in enumerate(fused) if len(fused) > 1}
        elif stored.startswith(VISION) and not stored.endswith("position_ids"):
            names[stored.removeprefix(VISION)] = stored
    kernel, table = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
    reshaped = {}
    if original and {"visual.cls_embedding", "visual.pos_embedding"} <= files.tensors.keys():
        reshaped = {
            "embeddings.class_embedding": files.tensors["visual.cls_embedding"].shape[-1:],
            table: files.tensors["visual.pos_embedding"].shape[-2:],
        }
    naming = "original Wan names" if original else "names of transformers"
    weights = NamedWeights(files, names, naming, reshaped, parts=parts)
    size = partial(_size, path, weights)
    dim, patch = size(kernel, 0), size(kernel, -1)
    if dim % CLIP_HEAD:
        raise UsageError(f"{path} is not CLIP ViT-H/14: its width is {dim}.", FETCH)
    config = {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu",
        "hidden_size": dim, "num_attention_heads": dim // CLIP_HEAD, "patch_size": patch,
        "intermediate_size": size("encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in names if ".layers." in name),
        "image_size": patch * math.isqrt(size(table, 0) - 1), "projection_dim": 1024,
    }  # fmt: skip
    return ComponentFiles("image_encoder", path, weights, config)
