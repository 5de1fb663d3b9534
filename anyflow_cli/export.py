"""Export of a model in the formats of other tools.

``diffusers``  a pipeline folder, for ``AnyFlowPipeline.from_pretrained`` (``WanPipeline`` with one time)
``merged``     the network in one safetensors file with diffusers' names, its configuration in the metadata
``comfyui``    the same with Wan's original names under ComfyUI's prefix, ``model.diffusion_model.``
``adapter``    a LoRA, of a run trained with one or extracted from full weights against a base: a directory
               that PEFT, ``pipe.load_lora_weights`` of diffusers and ComfyUI load, each its own file

Original Wan has one time embedder. The second is written as ``delta_embedding.{0,2}``, a name of this
project: a loader for plain Wan reports it as unexpected and would sample without it, which is another model;
a node has to pass the end time of each step to it. Weights are written one at a time; what was not trained is
written as it was read. Files are complete or absent, and none is replaced.

Of a model with two experts each format has one file per expert. A model can be written with its change in
another base (``model.transplant``).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.experts import EXPERTS
from anyflow_cli.model.experts import ExpertWeights, by_expert, each_expert
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.lora_formats import split_loras
from anyflow_cli.model.network import folded, stored_as, two_time_from
from anyflow_cli.model.pipeline_io import (
    Adapter,
    load_adapter,
    refusal_of_diffusers,
    save_adapter,
    save_pipeline,
)
from anyflow_cli.model.transplant import Transplanted
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, write_weights
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.checkpoint import is_checkpoint, trained_weights
from anyflow_cli.runs.lineage import run_of
from anyflow_cli.runs.open import ModelInfo, describe, locate, open_model, weight_source
from anyflow_cli.runs.paths import LINEAGE
from anyflow_cli.utils.files import atomic_write, read_json
from anyflow_cli.utils.hub import is_hub_name

log = logging.getLogger(__name__)

Format = Literal["diffusers", "merged", "comfyui", "adapter"]
DIFFUSERS_LORA, COMFYUI_LORA = "pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"
NUMBER = re.compile(r"-?\d*\.?\d+")
ADAPTER = "adapter"  # directory of a finished run with its adapter
COMFYUI_PREFIX = "model.diffusion_model."
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn
}  # fmt: skip


def export_model(
    address: str,
    recipe: Recipe,
    kind: Format,
    out: Path,
    dtype: str | None = None,
    extraction: Extraction | None = None,
    onto: Transplant | None = None,
) -> Path:
    """Export a model.

    Args:
        address: Model, training run or checkpoint.
        recipe: Recipe, whose teacher supplies text encoder and VAE where the model has none.
        kind: Format.
        out: Folder or file to write.
        dtype: Type of the weights: a key of ``DTYPES``, see ``stored_as``; None: as they are.
        extraction: For ``adapter``: extract it from full weights.
        onto: Write another base with the model's change in it.

    Returns:
        The folder or file that was written.
    """
    target = destination(kind, out)
    if kind == "adapter":
        adapter = _adapter_of_run(address) if extraction is None else _extracted(address, recipe, extraction)
        save_adapter(target, *adapter)
        write_lora_files(target, adapter)
        return target
    info = describe(address, recipe)
    network, lineage = weight_source(info), info.lineage | {"exported_from": address}
    pipeline = info.pipeline
    if onto is not None:
        network, other = transplanted(address, onto, recipe)
        pipeline, lineage = other.pipeline, lineage | {"transplant": onto._asdict()}
    if kind == "diffusers":
        if refusal := refusal_of_diffusers(network.config):
            log.info(refusal)
        as_type = DTYPES[dtype] if dtype else None
        return save_pipeline(target, network, pipeline, lineage, shift=info.shift, dtype=as_type)
    if kind == "comfyui" and network.config.two_time:
        log.info("ComfyUI's own Wan nodes pass one time; this file needs a node that passes two.")
    write = write_merged if kind == "merged" else write_comfyui
    if network.config.boundary is None:
        write(target, network, lineage, dtype)
        return target
    if out.suffix == ".safetensors":
        raise UsageError("The model has two experts, which are two files.", "Give a directory with --out.")
    lineage |= {"boundary": network.config.boundary}
    for expert in EXPERTS:
        write(out / f"{expert}_noise.safetensors", ExpertWeights(network, expert), lineage, dtype)
    return out


class Transplant(NamedTuple):
    """Where a model's change is added: the base that it was trained from, another one, and how much."""

    base: str
    other: str
    strength: float

    @property
    def models(self) -> dict[str, str]:
        """Addresses by their part."""
        return {"base": self.base, "other base": self.other}


def transplant_of(text: str, model: str, base: str | None) -> Transplant:
    """Read ADDRESS[:STRENGTH], and find the base that a model was trained from where none is given."""
    other, found, strength = text.rpartition(":")
    if Path(text).expanduser().exists() or not found or not NUMBER.fullmatch(strength):
        other, strength = text, "1"
    start = base or _start_of(model)
    if start is None:
        raise UsageError(
            f"The files of {model} do not tell what it was trained from.", "Name that model with --base."
        )
    return Transplant(start, other, float(strength))


def _start_of(model: str) -> str | None:
    """The teacher behind a run, as its lineage names it, else the model that it was trained from."""
    if is_hub_name(model):
        return None
    path = locate(split_loras(model)[0])
    if is_checkpoint(path):
        lineage = run_of(path).lineage.as_dict()
    else:
        lineage = read_json(path / LINEAGE) if (path / LINEAGE).is_file() else {}
    start = lineage.get("inputs", {}).get("teacher", {}).get("path") or lineage.get("base")
    return None if start is None else str(start)


def transplanted(address: str, onto: Transplant, recipe: Recipe) -> tuple[Transplanted, ModelInfo]:
    """Another base with a model's change in it, and the description of that base.

    Raises:
        UsageError: The models differ in their shapes, or one has two experts and another does not.
    """
    info = describe(address, recipe)
    base, other = (describe(one, recipe) for one in onto.models.values())
    sources = weight_source(info), weight_source(base), weight_source(other)
    names = (address, onto.base, onto.other)
    boundaries = {name: one.config.boundary for name, one in zip(names, sources, strict=True)}
    if len(set(boundaries.values())) > 1:
        found = ", ".join(f"{name}: {b or 'none'}" for name, b in boundaries.items())
        raise UsageError(
            f"The models differ in the boundary between two experts ({found}).",
            "Name models of the same family; two places of experts take HIGH,LOW@BOUNDARY.",
        )
    result = Transplanted(*sources, onto.strength, names)
    result.lazy_weights()
    return result, other


def destination(kind: Format, out: Path) -> Path:
    """Folder or file that an export writes, ``out`` or a file in it; refused if it exists."""
    single = kind in ("merged", "comfyui")
    target = out / "model.safetensors" if single and out.suffix != ".safetensors" else out
    if target.exists():
        raise UsageError(f"{target} exists already.", "Choose another --out, or remove it.")
    return target


def _adapter_of_run(address: str) -> Adapter:
    """The adapter of a finished run or of a checkpoint."""
    path = locate(address)
    if is_checkpoint(path):
        run = run_of(path)
        if run.recipe.model.lora is not None:
            size = LoraSize(run.recipe.model.lora.rank, run.recipe.model.lora.alpha)
            return Adapter(trained_weights(path), size, str(run.base))
    elif (path.parent / ADAPTER).is_dir():
        return load_adapter(path.parent / ADAPTER)
    raise UsageError(
        f"{address} has no adapter: all its weights were trained, or it is not a training run.",
        "Extract one with --base ADDRESS --rank R, or use --format diffusers, merged or comfyui.",
    )


class Extraction(NamedTuple):
    """Base and rank of a LoRA that is extracted from full weights."""

    base: str
    rank: int


def _extracted(address: str, recipe: Recipe, extraction: Extraction) -> Adapter:
    """The best LoRA of a rank for the difference of two models, by singular values; its error is logged."""
    model, base = open_model(address, recipe).network, open_model(extraction.base, recipe).network
    if model.config.two_time and not base.config.two_time:
        base = each_expert(base, lambda one: two_time_from(one, model.config.gate))
    weights: dict[str, torch.Tensor] = {}
    change = missed = 0.0
    start = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in start or start[name].shape != parameter.shape:
            raise UsageError(
                f"{extraction.base} is not a base of {address}: {name} differs in shape.",
                "Choose another --base.",
            )
        delta = (parameter - start[name]).float()
        total = float(delta.square().sum())
        kept = 0.0
        if delta.dim() == 2 and total:
            u, s, v = torch.linalg.svd(delta, full_matrices=False)
            rank, root = min(extraction.rank, len(s)), s[: extraction.rank].sqrt()
            a, b = torch.zeros(extraction.rank, v.shape[1]), torch.zeros(u.shape[0], extraction.rank)
            a[:rank], b[:, :rank] = root[:, None] * v[:rank], u[:, :rank] * root
            layer = name.removesuffix(".weight")
            weights |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
            kept = float(s[:rank].square().sum())
        change, missed = change + total, missed + max(total - kept, 0.0)
    if not weights:
        raise UsageError(
            f"{address} equals {extraction.base}: there is nothing to extract.", "Choose another --base."
        )
    log.info(
        "Rank %d misses %.1f %% of the change (relative norm).",
        extraction.rank,
        100 * (missed / change) ** 0.5,
    )
    return Adapter(weights, LoraSize(extraction.rank, extraction.rank), extraction.base)


def write_lora_files(folder: Path, adapter: Adapter) -> None:
    """Write an adapter for diffusers and for ComfyUI, with its scale alpha / rank multiplied into B.

    Diffusers finds its file by name. Modules that were trained in full have no place in either.
    """
    parts = by_expert(adapter.weights)
    if parts.keys() != {""}:
        for expert, own in parts.items():
            write_lora_files(folder / expert, adapter._replace(weights=own))
        return
    if any(".lora_" not in name for name in adapter.weights):
        log.warning("Modules trained in full are in PEFT's files alone; others need --format diffusers.")
        return
    scale = adapter.size.alpha / adapter.size.rank
    scaled = {n: w.float() * (scale if ".lora_B." in n else 1.0) for n, w in adapter.weights.items()}
    layers = sorted({name.rpartition(".lora_")[0] for name in scaled})
    facts = {"r": adapter.size.rank, "lora_alpha": adapter.size.rank, "target_modules": layers}
    metadata = {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in facts.items()})
    }
    for file, prefix, name_of in (
        (DIFFUSERS_LORA, "transformer.", str),
        (COMFYUI_LORA, "diffusion_model.", TRANSFORMER_NAMES.to_original),
    ):
        stored = {}
        for name, weight in scaled.items():
            layer, _, side = name.rpartition(".lora_")
            stored[f"{prefix}{name_of(layer)}.lora_{side}"] = LazyWeight.of(weight)
        _write(folder / file, stored, metadata if file == DIFFUSERS_LORA else {})


def write_merged(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write one safetensors file with diffusers' names, configuration and lineage in its metadata."""
    config, weights = folded(network.config, network.lazy_weights())
    metadata = {"config": json.dumps(config.to_diffusers()), "lineage": json.dumps(lineage)}
    _write(path, stored_as(weights, DTYPES[dtype] if dtype else None), metadata)


def write_comfyui(
    path: Path, network: WeightSource, lineage: Mapping[str, Any], dtype: str | None = None
) -> None:
    """Write one safetensors file with the original names under ComfyUI's prefix."""
    config, weights = folded(network.config, network.lazy_weights())
    stored = stored_as(weights, DTYPES[dtype] if dtype else None)
    renamed = {COMFYUI_PREFIX + TRANSFORMER_NAMES.to_original(name): one for name, one in stored.items()}
    # What shapes do not tell. The key "config" would change how ComfyUI detects the model.
    facts = {"gate": str(config.gate), "delta": config.delta, "head_dim": str(config.head_dim)}
    _write(path, renamed, facts | {"lineage": json.dumps(lineage)})


def _write(path: Path, weights: Mapping[str, LazyWeight], metadata: Mapping[str, str]) -> None:
    with atomic_write(path) as temporary:
        write_weights(temporary, weights, {"format": "pt", **metadata})
