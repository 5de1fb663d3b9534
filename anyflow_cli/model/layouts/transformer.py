"""A Wan or AnyFlow transformer in any layout, opened as this package's network.

=========================  ==========================================================================
diffusers                  a folder with ``config.json``, or one file with the names of diffusers
original Wan               a folder of Wan's own release, or one file with its names
wrapped                    either names behind a prefix (ComfyUI, rCM, Self-Forcing, FSDP), or one
                           entry of a pickled training state
quantized                  either names with fp8 or int8 weights
=========================  ==========================================================================

Sizes come from ``config.json`` where there is one, else from the shapes of the tensors. Weights are read one
at a time, into the type and onto the device where they are used.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch.nn.functional as nnf
from pydantic import BaseModel, Field, Json
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import (
    ANYFLOW,
    ANYFLOW_FAR,
    ANYFLOW_IMAGE,
    CLASSES,
    NVLABS,
    WAN,
    WAN_LIKE,
    NetworkConfig,
    Size,
)
from anyflow_cli.model.layouts.families import refuse_foreign, refuse_type
from anyflow_cli.model.layouts.named_weights import NamedWeights
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.layouts.quantized import is_quantization
from anyflow_cli.model.layouts.tensor_files import WEIGHT_SUFFIXES, TensorFiles
from anyflow_cli.model.network import on_meta
from anyflow_cli.model.weights_io import (
    FETCH,
    LazyWeight,
    check_names_and_shapes,
    component_files,
)
from anyflow_cli.utils.records import parse_record, read_bytes

log = logging.getLogger(__name__)

HEAD_DIM = 128  # of every published Wan
MASK_CHANNELS = 4  # of image-to-video models: one per video frame of a latent frame
WRAPPER_PARTS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# Prefix of the names in a file, and who writes it.
PREFIXES = {
    "": "", "model.diffusion_model.": "ComfyUI checkpoint", "diffusion_model.": "ComfyUI", "net.": "rCM",
    "model.": "Self-Forcing family", "model.model.": "wrapped twice", "module.": "DataParallel",
    "transformer.": "pipeline", "generator.": "generator",
}  # fmt: skip
ANCHORS = {"head.modulation": "original Wan", "condition_embedder.time_proj.weight": "diffusers"}
# What training left that the network does without: heads of a classifier and a GAN, registers, step counters,
# the gate of sparse attention (the weights also run dense), a norm that diffusers ignores, too.
UNUSED_PARTS = re.compile(
    r"^(_cls_pred_branch|_register_tokens|_gan_ca_blocks)\b|^accum_|\.to_gate_compress\.|\.norm_added_q\.|^freqs$"
)
# SkyReels-V2's embeddings of 16 and 24 fps, and the layers from them to the modulation.
FRAME_RATE_PARTS = (
    "fps_embedding.weight",
    *(f"fps_projection.net.{layer}.{part}" for layer in ("0.proj", "2") for part in ("weight", "bias")),
)


@dataclass(frozen=True)
class TransformerFiles:
    """A transformer on disk.

    Attributes:
        path: Folder or file.
        weight_files: The files with its tensors.
        stated: Sizes that a ``config.json`` states; None: only the tensors know them.
        config_file: That file.
    """

    path: Path
    weight_files: tuple[Path, ...]
    stated: NetworkConfig | None = None
    config_file: Path | None = None

    @cached_property
    def config(self) -> NetworkConfig:
        """Sizes and kind of the network.

        Raises:
            UsageError: The network takes other channels than noise, and those of image-to-video models.
        """
        config = self.stated or inferred_config(self.tensors)
        if config.in_channels == config.out_channels:
            return config
        if config.in_channels != 2 * config.out_channels + MASK_CHANNELS:
            raise UsageError(
                f"{self.path} takes {config.in_channels} channels, of which {config.out_channels} are noise.",
                "Use the text-to-video or image-to-video model of the same family.",
            )
        # an original config.json does not tell whether the network takes CLIP's tokens
        image_dim, tokens = _picture_sizes(self.tensors)
        return replace(config, image_dim=image_dim, image_tokens=tokens)

    @property
    def reference(self) -> str:
        """What states the shapes that its tensors must have, in words."""
        return "config.json" if self.stated else "each other"

    @property
    def transformers(self) -> tuple[TransformerFiles, ...]:
        """This one; a model of two experts has two."""
        return (self,)

    @cached_property
    def tensors(self) -> NamedWeights:
        """Its tensors under our names; only headers are read."""
        return transformer_weights(TensorFiles.open(self.weight_files), self.path)

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name, bf16 where they are quantized; see ``WeightSource``."""
        network, source = on_meta(self.config), self.tensors
        expected = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        check_names_and_shapes(expected, source.shapes, self.path, self.reference)
        return source.lazy()


def transformer_weights(files: TensorFiles, place: Path) -> NamedWeights:
    """Find the layout of a transformer by its names.

    Raises:
        UsageError: It is another model, or none.
    """
    refuse_foreign(files.tensors, place)
    bare = {WRAPPER_PARTS.sub("", name): name for name in files.tensors}
    prefix, anchor = _prefix_of(bare, place)
    original = ANCHORS[anchor] == "original Wan"
    named: dict[str, str] = {}
    for name, stored in bare.items():
        inner = name.removeprefix(prefix)
        if not name.startswith(prefix) or is_quantization(inner) or UNUSED_PARTS.search(inner):
            continue
        named[TRANSFORMER_NAMES.from_original(inner) if original else inner] = stored
    if any(".to_gate_compress." in name for name in bare):
        log.warning("%s was trained with sparse attention; it runs with full attention here.", place)
    words = [f"{ANCHORS[anchor]} names"]
    if prefix:
        words.append(f"under {prefix} ({PREFIXES[prefix]})")
    if files.wrapper:
        words.append(f"in the entry {files.wrapper}")
    patch = "patch_embedding.weight"
    linear = patch in named and len(files.tensors[named[patch]].shape) == 2  # rCM's; kernels of (1, 2, 2)
    rows, columns = files.tensors[named[patch]].shape[:2] if linear else (0, 0)
    reshaped = {patch: (rows, columns // 4, 1, 2, 2)} if linear else {}
    parts = {name: named.pop(name) for name in FRAME_RATE_PARTS if name in named}
    added = {"condition_embedder.time_proj.bias": partial(_frame_rate_bias, files, parts)} if parts else {}
    return NamedWeights(files, named, ", ".join(words), reshaped, added)


def _frame_rate_bias(files: TensorFiles, parts: Mapping[str, str]) -> Tensor:
    """What SkyReels-V2's input of the frame rate adds to the modulation, at 24 fps: a constant."""
    rates, *layers = (files.read(parts[name]).float() for name in FRAME_RATE_PARTS)
    weight_1, bias_1, weight_2, bias_2 = layers
    return weight_2 @ nnf.silu(weight_1 @ rates[1] + bias_1) + bias_2


def _prefix_of(names: Iterable[str], place: Path) -> tuple[str, str]:
    """What precedes the names of the network, and the name that shows it."""
    for name in names:
        for anchor in ANCHORS:
            prefix = name.removesuffix(anchor)
            if name.endswith(anchor) and prefix in PREFIXES:
                return prefix, anchor
    raise UsageError(
        f"{place} holds no Wan transformer.{_what_it_is(names)}", "Name a file of transformer weights."
    )


def _what_it_is(names: Iterable[str]) -> str:
    joined = "\n".join(names)
    for pattern, what in (
        (r"lora_|\.diff(_b)?$", "It is a LoRA file: pass it with --lora."),
        (r"^decoder\.middle\.0\.residual", "It is a Wan VAE."),
        (r"^(encoder\.block\.0|blocks\.0\.pos_embedding)\.", "It is a text encoder."),
    ):
        if re.search(pattern, joined, re.MULTILINE):
            return f" {what}"
    return ""


# --- finding files


def open_transformer(path: Path) -> TransformerFiles:
    """Find the transformer in a pipeline folder, a transformer folder, an original folder, or a file.

    Raises:
        UsageError: There is none, or it is another architecture; the message names it.
    """
    if path.is_file():
        return _open_file(path)
    if (path / "model_index.json").is_file():
        return _open_folder(_transformer_of(path))
    return _open_folder(path)


def _open_file(path: Path) -> TransformerFiles:
    if path.suffix == ".gguf":
        raise UsageError(
            f"{path} is a GGUF file, which anyflow does not read.",
            "Use the same model as safetensors in bf16, fp16 or fp8.",
        )
    if path.suffix not in WEIGHT_SUFFIXES:
        raise UsageError(
            f"{path} is a file, but not of model weights.",
            f"Give a directory with model_index.json, or a file of {', '.join(WEIGHT_SUFFIXES)}.",
        )
    return TransformerFiles(path, (path,))


def _transformer_of(pipeline: Path) -> Path:
    if not (pipeline / "transformer").is_dir():
        raise UsageError(
            f"{pipeline} has no transformer directory.",
            "Give a whole pipeline folder, with transformer, vae, text_encoder and tokenizer.",
        )
    return pipeline / "transformer"


def _open_folder(path: Path) -> TransformerFiles:
    config_file = path / "config.json"
    if config_file.is_file():
        return TransformerFiles(path, tuple(component_files(path)), _stated_config(config_file), config_file)
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if len(files) == 1:
        return TransformerFiles(path, (files[0],))
    hint = "Give a diffusers pipeline folder, or its transformer directory."
    if files:
        hint = f"Name one of its files ({', '.join(file.name for file in files[:4])})."
    raise UsageError(
        f"{path} is not a model folder: it holds neither model_index.json nor config.json.", hint
    )


# --- sizes


class OriginalConfig(BaseModel):
    """``config.json`` of Wan's own folders."""

    dim: Size
    num_heads: Size
    num_layers: Size
    ffn_dim: Size
    in_dim: Size = 16
    out_dim: Size = 16
    text_dim: Size = 4096
    freq_dim: Size = 256
    eps: float = 1e-6
    model_type: str = "t2v"


def _stated_config(file: Path) -> NetworkConfig:
    """The sizes in a ``config.json`` of diffusers or of an original folder."""
    content = read_bytes(file, FETCH)
    if b'"num_heads"' not in content:
        return NetworkConfig.read(file)
    stated = parse_record(content, OriginalConfig, str(file), FETCH)
    refuse_type(stated.model_type, file.parent)
    return NetworkConfig(
        heads=stated.num_heads,
        head_dim=stated.dim // stated.num_heads,
        layers=stated.num_layers,
        ffn_dim=stated.ffn_dim,
        in_channels=stated.in_dim,
        out_channels=stated.out_dim,
        text_dim=stated.text_dim,
        freq_dim=stated.freq_dim,
        eps=stated.eps,
    )


class StatedSizes(BaseModel):
    """What a file's header may state besides the shapes, as text; ``config`` is that of diffusers."""

    config: Json[dict[str, Any]] = Field(default_factory=dict)
    head_dim: Json[Size] = HEAD_DIM
    gate: Json[float] = NetworkConfig.gate
    delta: str = NetworkConfig.delta


def _picture_sizes(weights: NamedWeights) -> tuple[int | None, int | None]:
    """Width of CLIP's tokens, and how many have learned positions; None without them."""
    names = {"norm1.weight": 0, "pos_embed": 1}
    full = {f"condition_embedder.image_embedder.{name}": axis for name, axis in names.items()}
    width, tokens = (
        weights.shape(name)[axis] if name in weights.stored_names else None for name, axis in full.items()
    )
    return width, tokens


def inferred_config(weights: NamedWeights) -> NetworkConfig:
    """The sizes of a network, from the shapes of its tensors and what the file's header adds.

    A header may state what shapes cannot: the configuration of diffusers, or the gate of the second time.
    """
    place = weights.files.files[0]
    header = json.dumps(dict(weights.files.metadata)).encode()
    stated = parse_record(header, StatedSizes, f"The header of {place}", FETCH)
    if stated.config.get("_class_name") in (*CLASSES, ANYFLOW_IMAGE, NVLABS, *WAN_LIKE):
        return NetworkConfig.from_diffusers(stated.config)

    def size(name: str, axis: int) -> int:
        if name not in weights.stored_names:
            raise UsageError(f"The weights of {place} lack {name}.", FETCH)
        return weights.shape(name)[axis]

    dim, head_dim = size("patch_embedding.weight", 0), stated.head_dim
    if dim % head_dim:
        raise UsageError(
            f"{place} is {dim} wide, not a multiple of {head_dim}, the size of Wan's heads.",
            "Put its config.json beside it, in a directory with nothing else, and name the directory.",
        )
    patch = (size("patch_embedding.weight", 3), size("patch_embedding.weight", 4))
    numbered = (re.match(r"blocks\.(\d{1,6})\.", name) for name in weights.stored_names)
    blocks = {int(match[1]) for match in numbered if match}
    far = "far_patch_embedding.weight"
    causal = far in weights.stored_names
    two_time = any("delta_embedder" in name for name in weights.stored_names)
    image_dim, image_tokens = _picture_sizes(weights)
    two_time_class = ANYFLOW if image_dim is None else ANYFLOW_IMAGE
    return NetworkConfig.from_diffusers(
        {
            "_class_name": ANYFLOW_FAR if causal else two_time_class if two_time else WAN,
            "num_attention_heads": dim // head_dim,
            "attention_head_dim": head_dim,
            "num_layers": 1 + max(blocks, default=-1),
            "ffn_dim": size("blocks.0.ffn.net.0.proj.weight", 0),
            "in_channels": size("patch_embedding.weight", 1),
            "out_channels": size("proj_out.weight", 0) // math.prod(patch),
            "text_dim": size("condition_embedder.text_embedder.linear_1.weight", 1),
            "freq_dim": size("condition_embedder.time_embedder.linear_1.weight", 1),
            "patch_size": (1, *patch),
            "cross_attn_norm": "blocks.0.norm2.weight" in weights.stored_names,
            "gate_value": stated.gate,
            "deltatime_type": stated.delta,
            "image_dim": image_dim,
            "pos_embed_seq_len": image_tokens,
            "added_kv_proj_dim": None if image_dim is None else dim,
            **({"compressed_patch_size": (1, size(far, 3), size(far, 4))} if causal else {}),
        }
    )
