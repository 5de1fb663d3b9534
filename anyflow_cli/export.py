"""Export of a model in the formats of other tools.

``diffusers``  a pipeline folder, for ``AnyFlowPipeline.from_pretrained`` (``WanPipeline`` with one time)
``merged``     the network in one safetensors file with diffusers' names, its configuration in the metadata
``comfyui``    the same with Wan's original names under ComfyUI's prefix, ``model.diffusion_model.``
``adapter``    the result of LoRA training as a PEFT adapter for the diffusers class

Original Wan has one time embedder. The second is written as ``delta_embedding.{0,2}``, a name of this
project: a loader for plain Wan reports it as unexpected and would sample without it, which is another model;
a node has to pass the end time of each step to it. Weights are written one at a time; what was not trained is
written as it was read. Files are complete or absent, and none is replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
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
ADAPTER = "adapter"  # directory of a finished run with its adapter
COMFYUI_PREFIX = "model.diffusion_model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_model(address: str, recipe: Recipe, kind: Format, out: Path, dtype: str | None = None) -> Path:
    """Export a model.

    Args:
        address: Model, training run or checkpoint.
        recipe: Recipe, whose teacher supplies text encoder and VAE where the model has none.
        kind: Format.
        out: Folder or file to write.
        dtype: Type of all weights (``fp32``, ``bf16``, ``fp16``); None: as they are.

    Returns:
        The folder or file that was written.
    """
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
    """Folder or file that an export writes, ``out`` or a file in it; refused if it exists."""
    single = kind in ("merged", "comfyui")
    target = out / "model.safetensors" if single and out.suffix != ".safetensors" else out
    if target.exists():
        raise UsageError(f"{target} exists already.", "Choose another --out, or remove it.")
    return target


def _write_adapter(target: Path, address: str) -> None:
    """Write the adapter of a finished run or of a checkpoint."""
    path = locate(address)
    if is_checkpoint(path):
        run = run_of(path)
        if run.recipe.model.lora is not None:
            size = LoraSize(run.recipe.model.lora.rank, run.recipe.model.lora.alpha)
            return save_adapter(target, trained_weights(path), size, str(run.base))
    elif (path.parent / ADAPTER).is_dir():
        return save_adapter(target, *load_adapter(path.parent / ADAPTER))
    raise UsageError(
        f"{address} has no adapter: all its weights were trained, or it is not a training run.",
        "Use --format diffusers, merged or comfyui.",
    )


def write_merged(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write one safetensors file with diffusers' names, configuration and lineage in its metadata."""
    config, weights = folded(network.config, network.lazy_weights())
    metadata = {"config": json.dumps(config.to_diffusers()), "lineage": json.dumps(lineage)}
    _write(path, weights, metadata, dtype)


def write_comfyui(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write one safetensors file with the original names under ComfyUI's prefix."""
    config, weights = folded(network.config, network.lazy_weights())
    renamed = {
        COMFYUI_PREFIX + TRANSFORMER_NAMES.to_original(name): weight for name, weight in weights.items()
    }
    # What shapes do not tell. The key "config" would change how ComfyUI detects the model.
    facts = {"gate": str(config.gate), "delta": config.delta, "head_dim": str(config.head_dim)}
    _write(path, renamed, facts | {"lineage": json.dumps(lineage)}, dtype)


def _write(
    path: Path, weights: Mapping[str, LazyWeight], metadata: Mapping[str, str], dtype: str | None
) -> None:
    stored = {name: weight.to(DTYPES[dtype] if dtype else weight.dtype) for name, weight in weights.items()}
    with atomic_write(path) as temporary:
        write_weights(temporary, stored, {"format": "pt", **metadata})
