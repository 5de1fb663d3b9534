"""Models in the formats that other tools read.

``diffusers``  a pipeline folder, for ``AnyFlowPipeline.from_pretrained`` (or ``WanPipeline`` with one time)
``merged``     the network alone in one safetensors file with diffusers' names, its config in the metadata
``comfyui``    the same with Wan's original names under ComfyUI's prefix, ``model.diffusion_model.``
``adapter``    what LoRA training learnt, as a PEFT adapter for the diffusers class

Original Wan has one time embedder. The second is written as ``delta_embedding.{0,2}``, a name of this
project: a loader that knows Wan alone reports it as unexpected and would sample without it, which is not
this model; a node has to pass the end time of each step to it. Files appear whole or not at all, and none
is overwritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import folded
from anyflow_cli.model.pipeline_io import load_adapter, save_adapter, save_pipeline
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, write_weights
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.checkpoint import is_checkpoint, trained_weights
from anyflow_cli.runs.lineage import run_of
from anyflow_cli.runs.open import describe, locate, weight_source
from anyflow_cli.utils.files import atomic_write

Format = Literal["diffusers", "merged", "comfyui", "adapter"]
ADAPTER = "adapter"  # where a finished run keeps its own
COMFYUI_PREFIX = "model.diffusion_model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# diffusers' names -> original Wan 2.1, the inverse of diffusers' convert_wan_transformer_to_diffusers.
COMFYUI_NAMES: tuple[tuple[str, str], ...] = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.delta_embedder\.linear_1\.",       r"delta_embedding.0."),  # ours
    (r"^condition_embedder\.delta_embedder\.linear_2\.",       r"delta_embedding.2."),  # ours
    (r"^condition_embedder\.time_proj\.",                      r"time_projection.1."),
    (r"^proj_out\.",                                           r"head.head."),
    (r"^scale_shift_table$",                                   r"head.modulation"),
    (r"^(blocks\.\d+)\.scale_shift_table$",                    r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.",                               r"\1.norm3."),
    (r"^(blocks\.\d+)\.attn1\.",                               r"\1.self_attn."),
    (r"^(blocks\.\d+)\.attn2\.",                               r"\1.cross_attn."),
    (r"(_attn)\.to_([qkv])\.",                                 r"\1.\2."),
    (r"(_attn)\.to_out\.0\.",                                  r"\1.o."),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.",                   r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.",                         r"\1.ffn.2."),
)  # fmt: skip


def export_model(address: str, recipe: Recipe, kind: Format, out: Path, dtype: str | None = None) -> Path:
    """Write the model at ``address`` as ``kind``; gives the folder or file that was made."""
    target = destination(kind, out)
    if kind == "adapter":
        _write_adapter(target, address)
        return target
    info = describe(address, recipe)
    network, lineage = weight_source(info), info.lineage | {"exported_from": address}
    if kind == "diffusers":
        as_type = DTYPES[dtype] if dtype else None
        save_pipeline(target, network, info.pipeline, lineage, shift=info.shift, dtype=as_type)
    else:
        write = write_merged if kind == "merged" else write_comfyui
        write(target, network, lineage, dtype)
    return target


def destination(kind: Format, out: Path) -> Path:
    """What an export makes, ``out`` or a file in it; nothing that is there is written over."""
    single = kind in ("merged", "comfyui")
    target = out / "model.safetensors" if single and out.suffix != ".safetensors" else out
    if target.exists():
        raise UsageError(f"{target} exists already.", "Choose another --out, or remove it.")
    return target


def _write_adapter(target: Path, address: str) -> None:
    """A finished run's own adapter, or that of a checkpoint."""
    path = locate(address)
    if is_checkpoint(path):
        run = run_of(path)
        if run.recipe.model.lora is not None:
            size = LoraSize(run.recipe.model.lora.rank, run.recipe.model.lora.alpha)
            return save_adapter(target, trained_weights(path), size, str(run.base))
    elif (path.parent / ADAPTER).is_dir():
        return save_adapter(target, *load_adapter(path.parent / ADAPTER))
    raise UsageError(
        f"{address} has no adapter: it was trained whole, or is no training run.",
        "Use --format diffusers, merged or comfyui.",
    )


def original_name(name: str) -> str:
    """The name of a parameter in the original Wan code."""
    for pattern, replacement in COMFYUI_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def write_merged(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """One safetensors file with diffusers' names; its metadata holds the class's config and the lineage."""
    config, weights = folded(network.config, network.lazy_weights())
    metadata = {"config": json.dumps(config.to_diffusers()), "lineage": json.dumps(lineage)}
    _write(path, weights, metadata, dtype)


def write_comfyui(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """One safetensors file with the original names under ComfyUI's prefix."""
    config, weights = folded(network.config, network.lazy_weights())
    renamed = {COMFYUI_PREFIX + original_name(name): weight for name, weight in weights.items()}
    # What shapes do not tell. The key "config" would change how ComfyUI detects the model.
    facts = {"gate": str(config.gate), "delta": config.delta, "head_dim": str(config.head_dim)}
    _write(path, renamed, facts | {"lineage": json.dumps(lineage)}, dtype)


def _write(
    path: Path, weights: Mapping[str, LazyWeight], metadata: Mapping[str, str], dtype: str | None
) -> None:
    stored = {name: weight.to(DTYPES[dtype] if dtype else weight.dtype) for name, weight in weights.items()}
    with atomic_write(path) as temporary:
        write_weights(temporary, stored, {"format": "pt", **metadata})
