"""What a file, folder, run or checkpoint is, from its headers: family, sizes, times, types, missing parts.

Nothing is loaded or downloaded. What cannot be used is described, too, with the reason and an alternative.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.layouts.components import (
    STEMS,
    component_config,
    open_component,
    open_component_folder,
)
from anyflow_cli.model.layouts.expert_files import open_network
from anyflow_cli.model.layouts.families import family_of
from anyflow_cli.model.layouts.tensor_files import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, TensorFiles
from anyflow_cli.model.layouts.transformer import TransformerFiles
from anyflow_cli.model.lora_formats import check_lora, lora_scale, plan_lora, shapes_of_network, split_loras
from anyflow_cli.model.pipeline_io import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BUILT_IN,
    INDEX,
    component,
    components_of,
    has_components,
    load_adapter,
    read_config,
    read_shift,
    resolve_pipeline,
)
from anyflow_cli.model.weights_io import TensorInfo, listed
from anyflow_cli.runs.checkpoint import is_checkpoint
from anyflow_cli.runs.open import describe_checkpoint, locate
from anyflow_cli.sample.presets import presets_of
from anyflow_cli.utils.hub import cached_snapshot, is_hub_name

Facts = dict[str, Any]
COMPONENTS = {
    "vae": ("VAE", "z_dim", "base_dim"),
    "text_encoder": ("text encoder", "d_model", "num_layers"),
    "image_encoder": ("image encoder (CLIP)", "hidden_size", "num_hidden_layers"),
}
LORA_KEY = re.compile(r"lora_|\.lora\.|\.diff(_[bm])?$|\.set_weight$")
TYPE_NAMES = {
    "F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2",
    "I8": "int8",
}  # fmt: skip


def inspect_address(address: str) -> Facts:
    """Describe what is at an address; ``usable`` tells whether a command can take it as a model.

    Raises:
        UsageError: There is nothing at the address.
    """
    if address not in BUILT_IN and is_hub_name(address) and cached_snapshot(address) is None:
        return {"address": address, **_not_downloaded(address)}
    path = locate(address)
    facts = {"address": address, "path": str(path)}
    try:
        return facts | _described(path)
    except AnyflowError as error:
        return facts | {"kind": "unknown", "usable": False, "problem": error.message, "instead": error.hint}


def _not_downloaded(name: str) -> Facts:
    known = KNOWN_MODELS.get(name)
    if known is None:
        raise UsageError(
            f"{name} is not here; on the Hub it may be.", f"Download it first: `hf download {name}`."
        )
    missing = [f"the download of about {known.download} GB: `hf download {name}`"]
    return {"kind": "model on the Hub", "usable": True, **_sizes(known.network), "missing": missing}


def _described(path: Path) -> Facts:
    model, loras = split_loras(str(path))
    if loras:
        facts = _described(Path(model))
        for lora in loras if not is_checkpoint(Path(model)) else ():
            check_lora(lora, read_config(Path(model)))
        return facts | {"loras": [f"{lora.path} {lora.manner}" for lora in loras]}
    if is_checkpoint(path):
        return _checkpoint(path)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(path)
    is_file = path.is_file() and path.suffix in WEIGHT_SUFFIXES
    if is_file or (path.name in STEMS and path.is_dir()):
        part = _component(path) or (_lora_file(path) if is_file else None)
        if part is not None:
            return part
    return _transformer(path)


def _checkpoint(path: Path) -> Facts:
    """A checkpoint holds only what was trained; the rest is that of the model its run started from."""
    info = describe_checkpoint(path)
    base = _transformer(info.pipeline)
    facts = {"kind": "checkpoint of a training run", "base": str(info.pipeline), "step": info.path.name}
    times = {"times": 2 if info.two_time else 1, "causal": info.causal and info.causal.partition}
    return base | facts | times | {"shift": info.shift}


def _adapter(path: Path) -> Facts:
    adapter = load_adapter(path)
    return {
        "kind": "LoRA adapter of PEFT",
        "usable": False,
        "rank": adapter.size.rank,
        "alpha": adapter.size.alpha,
        "base": adapter.base or None,
        "tensors": len(adapter.weights),
        "file": str(path / ADAPTER_WEIGHTS),
        "instead": f"Pass {path / ADAPTER_WEIGHTS} with --lora beside its model.",
    }


def _component(path: Path) -> Facts | None:
    """A VAE, a text encoder or an image encoder in a file or a folder of its own; None if it is none."""
    try:
        opened = open_component_folder(path, path.name) if path.is_dir() else open_component(path)
    except UsageError:
        return None
    kind, *keys = COMPONENTS[opened.name]
    return {
        "kind": kind,
        "usable": False,
        "layout": opened.weights.layout,
        **{key: opened.config.get(key) for key in keys},
        **_stored(opened.weights.files.tensors.values()),
        "instead": "Name the folder that it is part of."
        if path.is_dir()
        else "Put it beside the transformer's file; it is found by its published name.",
    }


def _lora_file(path: Path) -> Facts | None:
    """A LoRA file, and which of the known networks it fits; None if it is something else."""
    files = TensorFiles.open((path,))
    if not any(LORA_KEY.search(key) for key in files.tensors):
        return None
    networks = {name: known.network for name, known in KNOWN_MODELS.items()}
    networks |= {name: read_config(resolve_pipeline(name)) for name in BUILT_IN}
    plans = {name: plan_lora(files, shapes_of_network(config)) for name, config in networks.items()}
    fitting = [name for name, plan in plans.items() if plan.is_whole]
    nearest = fitting[0] if fitting else min(plans, key=lambda name: len(plans[name].unfit))
    plan = plans[nearest]
    scales = Counter(f"{lora_scale(files, path, plan, pair):g}" for pair in plan.pairs.values())
    alphas = sum(key.endswith(".alpha") for key in files.tensors)
    facts: Facts = {
        "kind": "LoRA file",
        "usable": False,
        "family": plan.family,
        "tensors": len(files.tensors),
        "pairs": len(plan.pairs),
        "ranks": sorted({pair.rank for pair in plan.pairs.values()}),
        "alpha": f"stated by {alphas} keys" if alphas else "not stated by keys",
        "scales": [f"{scale} ({count} pairs)" for scale, count in scales.most_common()],
        "added": len(plan.additions),
        "replaced": len(plan.replacements),
        "fits": fitting,
        "instead": "Pass it with --lora FILE[:STRENGTH] beside a model that it fits.",
    }
    if not fitting:
        count = f"{len(plan.unfit)} of {len(files.tensors)} keys"
        facts |= {"refused": f"{count}: {listed(list(plan.unfit))} without a place in {nearest}, the nearest"}
    return facts


def _transformer(path: Path) -> Facts:
    opened = open_network(path)
    config, transformer = opened.config, opened.transformers[0]
    kind = "pipeline folder" if has_components(path) else "transformer"
    if path.is_file():
        kind = "transformer in one file"
    if not path.exists():
        kind = "two experts in two places"
    facts = {"kind": kind, "usable": True, **_sizes(config), "layout": transformer.tensors.layout}
    facts |= _stored(
        one.tensors.stored(name) for one in opened.transformers for name in one.tensors.stored_names
    )
    if has_components(path):
        names = [name for name in components_of(config) if name != "image_processor"]
        facts |= {"shift": read_shift(path)} | {name: _place(path, name) for name in names}
    problems = check_folder(path)
    presets = [preset.name for preset in presets_of(str(path))]
    facts |= {"usable": not problems, "missing": _missing(path, config), "problems": problems}
    facts |= {"sampler_presets": presets}
    return facts | {"notes": _notes(transformer)}


def pictures_of(config: NetworkConfig) -> str | None:
    """What pictures a network takes as channels beside the noise; None where it takes none."""
    if config.in_channels == config.out_channels:
        return None
    ends = "first and last frame" if config.image_tokens else "first frame"
    return f"{ends}, with tokens of CLIP" if config.image_dim else ends


def _sizes(config: NetworkConfig) -> Facts:
    return {
        "family": family_of(config),
        "times": 2 if config.two_time else 1,
        "causal": list(config.causal.partition) if config.causal else None,
        "layers": config.layers,
        "width": config.dim,
        "heads": config.heads,
        "feed_forward": config.ffn_dim,
        "channels": config.out_channels,
        "pictures": pictures_of(config),
        "text_width": config.text_dim,
        "experts": None if config.boundary is None else f"2, which meet at t = {config.boundary:g}",
    } | ({"gate": config.gate, "second_time": config.delta} if config.two_time else {})


def _stored(tensors: Iterable[TensorInfo]) -> Facts:
    """Number of weights and the share of each type."""
    counts = Counter[str]()
    for tensor in tensors:
        size = 1
        for axis in tensor.shape:
            size *= axis
        counts[TYPE_NAMES.get(tensor.dtype, tensor.dtype)] += size
    total = sum(counts.values())
    shares = {dtype: round(count / total, 4) for dtype, count in counts.most_common()}
    return {"parameters": total, "types": shares}


def _place(pipeline: Path, name: str) -> str:
    try:
        place = component(pipeline, name)
    except UsageError:
        return "missing"
    if name != "vae":
        return str(place)
    config = component_config(place)
    return f"{place} ({config.get('z_dim', 16)} channels)"


def _missing(path: Path, config: NetworkConfig) -> list[str]:
    if has_components(path):
        names = [name for name in components_of(config) if _place(path, name) == "missing"]
        return [
            *names,
            *(["scheduler"] if (path / INDEX).is_file() and not (path / "scheduler").is_dir() else []),
        ]
    return [f"{', '.join(components_of(config))}: taken from the recipe's teacher (model.teacher)"]


def _notes(transformer: TransformerFiles) -> list[str]:
    """What a user should know before using the model as the network that its weights fit."""
    notes = []
    files, config = transformer.tensors.files, transformer.config
    if files.wrapper in ("generator", "generator_ema") and not presets_of(str(transformer.path)):
        notes.append(
            "a student in few steps, of a system that its name does not tell: choose one of "
            "`anyflow sample --list-presets`"
        )
    if config.causal is not None and not config.causal.is_stated:
        notes.append("chunk_partition is not stated; the default of the class is used")
    if (
        config.two_time
        and transformer.stated is None
        and "gate" not in files.metadata
        and "config" not in files.metadata
    ):
        notes.append(f"the gate of the second time is not stated; {config.gate} is used")
    if any(file.suffix in PICKLE_SUFFIXES for file in transformer.weight_files):
        notes.append("pickled; read with weights_only, so that nothing in it is executed")
    return notes
