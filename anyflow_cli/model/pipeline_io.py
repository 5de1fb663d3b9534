"""Pipeline folders, found in any layout and written in diffusers', and LoRA adapters in PEFT's.

A pipeline folder holds ``model_index.json`` and one directory per component; an original Wan folder holds one
file per component. A folder is written under a temporary name and then renamed, so that it is complete or
absent.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.flow.experts import EXPERTS
from anyflow_cli.model.config import ANYFLOW, ANYFLOW_FAR, WAN, NetworkConfig
from anyflow_cli.model.experts import by_expert, network_from
from anyflow_cli.model.layouts.components import (
    ORIGINAL_FILES,
    open_component,
    original_place,
    tokenizer_class,
)
from anyflow_cli.model.layouts.expert_files import (
    EXPERT_FOLDERS,
    ORIGINAL_FOLDERS,
    expert_places,
    open_network,
    split_places,
)
from anyflow_cli.model.lora import LoraSize, adapter_problems
from anyflow_cli.model.lora_formats import LoraMerged, add_loras, split_loras
from anyflow_cli.model.network import FlowMapTransformer, folded, stored_as
from anyflow_cli.model.weights_io import (
    FETCH,
    TRANSFORMER_STEM,
    LazyWeight,
    WeightSource,
    read_tensors,
    write_weights,
)
from anyflow_cli.utils.files import atomic_directory, write_json
from anyflow_cli.utils.hub import is_hub_name
from anyflow_cli.utils.records import read_record

INDEX = "model_index.json"
BUILT_IN = ("tiny", "tiny-anyflow")
ASSETS = Path(__file__).resolve().parent.parent / "assets"
FROZEN = ("vae", "text_encoder", "tokenizer")  # components that no training changes
PICTURE_ENCODER = ("image_encoder", "image_processor")  # of Wan 2.1 I2V
SHARD_BYTES = 5_000_000_000
PIPELINES = {WAN: "WanPipeline", ANYFLOW: "AnyFlowPipeline", ANYFLOW_FAR: "AnyFlowFARPipeline"}
# Diffusers has no pipeline of two any-step experts; one that ignored the second would sample another model.
TWO_TIME_EXPERTS = "AnyFlowExpertsPipeline"
# by whether there are two times, for which diffusers has no pipeline
IMAGE_PIPELINES = {False: "WanImageToVideoPipeline", True: "AnyFlowImageToVideoPipeline"}
TI2V_CHANNELS = 48  # latents of Wan 2.2 TI2V-5B, whose frames have times of their own
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."
_Class = tuple[str | None, str | None]  # library and class; nulls for a component that the pipeline lacks
_Positive = Annotated[float, Field(gt=0, lt=1e6)]
HUB_FILES = [
    *("*.json", "*.safetensors", "*.txt", "*.model"),
    *ORIGINAL_FILES["vae"],
    *ORIGINAL_FILES["text_encoder"],
    *ORIGINAL_FILES["image_encoder"],
]
ORIGINAL_SHIFT = 5.0  # of Wan's own generate.py for every model but these
ORIGINAL_EXPERTS_SHIFT = 12.0  # of two experts that make videos from text
ORIGINAL_FIRST_LAST_SHIFT = 16.0
ORIGINAL_SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True
}  # fmt: skip


class PipelineIndex(BaseModel):
    """``model_index.json``: the class of every component, in the order of the file."""

    text_encoder: _Class
    tokenizer: _Class
    vae: _Class
    scheduler: _Class
    image_encoder: _Class = (None, None)
    image_processor: _Class = (None, None)
    expand_timesteps: bool = False


class SchedulerConfig(BaseModel):
    """``scheduler_config.json``: the timestep shift, under whichever name its class has for it."""

    flow_shift: _Positive | None = None
    shift: _Positive | None = None


class AdapterConfig(BaseModel):
    """``adapter_config.json`` of PEFT."""

    r: Annotated[int, Field(ge=1, le=1 << 16)]
    lora_alpha: _Positive
    base_model_name_or_path: str | None = None  # PEFT knows it of some models only


def resolve_pipeline(address: str) -> Path:
    """Find the folder or file that ``address`` names: a built-in model, a path, or a model of the Hub.

    Two places of two experts (``HIGH,LOW``) are resolved each, and stay two places. LoRA files
    (``MODEL+FILE:STRENGTH``) stay part of the path.
    """
    model, loras = split_loras(address)
    if loras:
        return add_loras(resolve_pipeline(model), loras)
    if (places := split_places(address)) is not None:
        return each_place(places, resolve_pipeline)
    if address in BUILT_IN:
        return _built_in(address)
    path = Path(address).expanduser()
    if address and path.exists():
        return path
    if is_hub_name(address):
        return _from_hub(address)
    raise UsageError(
        f"There is no model at {address}.",
        f"Give a pipeline folder, a Hub name (Wan-AI/Wan2.1-T2V-1.3B-Diffusers), {' or '.join(BUILT_IN)}.",
    )


def each_place(places: re.Match[str], find: Callable[[str], Path]) -> Path:
    """Two places of two experts, each found by ``find``, as one path."""
    boundary = f"@{places['boundary']}" if places["boundary"] else ""
    return Path(f"{find(places['high'])},{find(places['low'])}{boundary}")


def without_loras(path: Path) -> Path:
    """The model of an address without the LoRA files that are merged into it."""
    return Path(split_loras(str(path))[0])


def named_places(path: Path) -> list[Path]:
    """The files and folders that an address of a model names: a model or two experts, and LoRA files."""
    model, loras = split_loras(str(path))
    places = split_places(model)
    models = [Path(model)] if places is None else [Path(places[name]) for name in ("high", "low")]
    return [*models, *(lora.path for lora in loras)]


def absolute_model(path: Path) -> Path:
    """The address of a model, absolute in all its parts."""
    model, loras = split_loras(str(path))
    places = split_places(model)
    found = Path(model).resolve() if places is None else each_place(places, lambda one: Path(one).resolve())
    return add_loras(found, loras) if loras else found


def component_home(path: Path) -> Path:
    """Where the VAE, the text encoder and the tokenizer of a model are: of two places, the first."""
    return named_places(path)[0]


def with_components(path: Path, other: str) -> Path:
    """The folder with the VAE, the text encoder and the tokenizer of a model: its own, or else ``other``."""
    return path if has_components(path) else resolve_pipeline(other)


def frozen_files(pipeline: Path) -> dict[str, Path]:
    """Files of the VAE, the text encoder and the tokenizer that are there, by their name in a pipeline."""
    files: dict[str, Path] = {}
    for name in FROZEN:
        with suppress(UsageError):  # what is missing is for the command to say that loads it
            place = component(pipeline, name)
            found = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
            files |= {
                f"{name}/{file.name if file == place else file.relative_to(place)}": file for file in found
            }
    return {name: files[name] for name in sorted(files)}


def _built_in(name: str) -> Path:
    path = ASSETS / name
    if not path.is_dir():
        raise AnyflowError(
            f"The built-in model {name} is not part of this installation.",
            "Install anyflow again, from its wheel.",
        )
    return path


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AnyflowError(
            f"{name} is not a local folder and cannot be fetched from the Hugging Face Hub ({reason}).",
            "Check the name and the network; log in with `hf auth login` if the model is gated.",
        ) from error


def component(pipeline: Path, name: str) -> Path:
    """Directory of a component of a pipeline folder, or its file in an original folder.

    The built-in models share one copy of their frozen components, stored in ``tiny``.
    """
    pipeline = component_home(pipeline)
    path = pipeline / name
    if name in FROZEN and pipeline.parent == ASSETS and not path.is_dir():
        path = ASSETS / "tiny" / name
    if path.is_dir():
        return path
    original = original_place(pipeline, name)
    if original is None:
        names = f", nor {ORIGINAL_FILES[name][0]}" if name in ORIGINAL_FILES else ""
        raise UsageError(
            f"{pipeline} has no {name} directory{names}.",
            "Give a whole pipeline folder, with vae, text_encoder and tokenizer.",
        )
    return original


def components_of(config: NetworkConfig) -> tuple[str, ...]:
    """Components that a network is used with, and saved with."""
    return (*FROZEN, *(PICTURE_ENCODER if config.image_dim is not None else ()))


def has_components(pipeline: Path) -> bool:
    """Whether a folder, or the folder of a file, also holds the VAE, the text encoder and the tokenizer."""
    pipeline = component_home(pipeline)
    return (pipeline / INDEX).is_file() or all(original_place(pipeline, name) for name in FROZEN)


def pipeline_files(pipeline: Path) -> dict[str, Path]:
    """Files of a pipeline folder by their name in it, shared components of built-in models included.

    Of two places of two experts: the files of both under the experts' folders, and components of the first.
    """
    places = expert_places(pipeline) if split_places(pipeline) else None
    if places is not None:
        named: dict[str, Path] = {}
        for expert, place in places.items():
            found = pipeline_files(place) if place.is_dir() else {place.name: place}
            named |= {f"{EXPERT_FOLDERS[expert]}/{name}": file for name, file in found.items()}
        home = pipeline_files(component_home(pipeline)) if component_home(pipeline).is_dir() else {}
        return named | {name: file for name, file in home.items() if name.split("/")[0] in FROZEN}
    files = {file.relative_to(pipeline): file for file in pipeline.rglob("*")}
    if pipeline.parent == ASSETS:
        for name in FROZEN:
            folder = component(pipeline, name)
            files |= {file.relative_to(folder.parent): file for file in folder.rglob("*")}
    return {name.as_posix(): files[name] for name in sorted(files) if files[name].is_file()}


def read_config(path: Path) -> NetworkConfig:
    """Read the sizes of the network of a pipeline folder, transformer folder or file."""
    return open_network(without_loras(path)).config


def load_network(
    path: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    storage: torch.dtype | None = None,
) -> FlowMapTransformer:
    """Load the network at a path of ``resolve_pipeline``, LoRA files merged, see ``network_from``."""
    model, loras = split_loras(str(path))
    source = open_network(Path(model))
    return network_from(LoraMerged.of(source, loras) if loras else source, dtype, device, storage)


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def save_pipeline(
    target: Path,
    network: WeightSource,
    source_pipeline: Path,
    lineage: Mapping[str, Any],
    *,
    shift: float | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> Path:
    """Write a network as a pipeline folder; a network with two times as AnyFlow's, with one as Wan's.

    Args:
        target: Folder to write.
        network: The network.
        source_pipeline: Folder that the other components are from.
        lineage: Content of ``lineage.json``.
        shift: Timestep shift of an AnyFlow folder; None: the source's.
        dtype: Type of all weights; None: as they are.
        replace: Replace an existing folder instead of refusing it.
    """
    if target.exists() and not replace:
        raise UsageError(f"{target} exists already.", "Choose another directory, or remove it.")
    source_pipeline, config = component_home(source_pipeline), network.config
    with atomic_directory(target) as folder:
        for name in components_of(config):
            _write_component(component(source_pipeline, name), folder / name)
        _write_scheduler(folder / "scheduler", source_pipeline, config, shift)
        for name, weights in transformer_weights_of(network).items():
            write_transformer(folder / name, *folded(config, weights), dtype)
        write_json(folder / INDEX, _model_index(config, source_pipeline))
        write_json(folder / "lineage.json", dict(lineage))
    return target


def transformer_weights_of(network: WeightSource) -> dict[str, dict[str, LazyWeight]]:
    """Weights by the folder of their transformer: of one network, or of each expert under its own names."""
    parts = by_expert(network.lazy_weights())
    return {EXPERT_FOLDERS["low" if expert == "low" else "high"]: own for expert, own in parts.items()}


def write_transformer(
    folder: Path, config: NetworkConfig, weights: Mapping[str, LazyWeight], dtype: torch.dtype | None = None
) -> None:
    """Write ``config.json`` and safetensors, sharded where large, holding one tensor in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory

    assert not any(".lora_" in name for name in weights), "an adapter was not merged"
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_diffusers() | {"_diffusers_version": version("diffusers")})
    stored = stored_as(weights, dtype)
    split = split_state_dict_into_shards_factory(
        stored,
        get_storage_size=lambda weight: weight.nbytes,
        filename_pattern=TRANSFORMER_STEM + "{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for file, names in split.filename_to_tensors.items():
        write_weights(folder / file, {name: stored[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{TRANSFORMER_STEM}.safetensors.index.json", index)


def _write_component(source: Path, target: Path) -> None:
    if source.is_file() and target.name == "image_processor":
        target.mkdir()
        write_json(target / "preprocessor_config.json", open_component(source).processor)
    elif source.is_file():
        open_component(source).write(target)
    else:
        link_tree(source, target)


def _write_scheduler(folder: Path, source: Path, config: NetworkConfig, shift: float | None) -> None:
    if not config.two_time and (source / INDEX).is_file():
        link_tree(component(source, "scheduler"), folder)
        return
    folder.mkdir()
    shift = read_shift(source) if shift is None else shift
    own = {"_class_name": "FlowMapEulerDiscreteScheduler", "shift": shift}
    if not config.two_time:
        own = ORIGINAL_SCHEDULER | {"flow_shift": shift}
    scheduler = own | {"_diffusers_version": version("diffusers"), "num_train_timesteps": 1000}
    write_json(folder / "scheduler_config.json", scheduler)


def read_shift(pipeline: Path) -> float:
    """Timestep shift of a pipeline's scheduler; 1 where its class has none, Wan's in an original folder."""
    pipeline = component_home(pipeline)
    if not (pipeline / INDEX).is_file() and original_place(pipeline, "vae") is not None:
        config = read_config(pipeline)
        if config.image_tokens is not None:
            return ORIGINAL_FIRST_LAST_SHIFT
        experts = (pipeline / ORIGINAL_FOLDERS["high"]).is_dir() and config.in_channels == 16
        return ORIGINAL_EXPERTS_SHIFT if experts else ORIGINAL_SHIFT
    file = component(pipeline, "scheduler") / "scheduler_config.json"
    scheduler = read_record(file, SchedulerConfig, FETCH)
    return scheduler.flow_shift or scheduler.shift or 1.0


def refusal_of_diffusers(config: NetworkConfig) -> str | None:
    """What of a network's folder diffusers has no class for, as a sentence; None: it opens the folder."""
    if not config.two_time or (config.boundary is None and config.in_channels == config.out_channels):
        return None
    if config.image_dim is not None:
        return "Diffusers has no class for an any-step network with CLIP's tokens; anyflow opens this folder."
    kind = "two any-step experts" if config.boundary is not None else "an any-step model that takes pictures"
    return f"Diffusers has no pipeline for {kind}; it opens each transformer of this folder by itself."


def _model_index(config: NetworkConfig, source: Path) -> dict[str, Any]:
    if (source / INDEX).is_file():
        index = read_record(source / INDEX, PipelineIndex, FETCH)
    else:
        index = PipelineIndex(
            text_encoder=("transformers", "UMT5EncoderModel"),
            tokenizer=("transformers", tokenizer_class(component(source, "tokenizer"))),
            vae=("diffusers", "AutoencoderKLWan"),
            scheduler=("diffusers", str(ORIGINAL_SCHEDULER["_class_name"])),
            image_encoder=("transformers", "CLIPVisionModel"),
            image_processor=("transformers", "CLIPImageProcessor"),
            expand_timesteps=config.out_channels == TI2V_CHANNELS,
        )
    scheduler = ("diffusers", "FlowMapEulerDiscreteScheduler") if config.two_time else index.scheduler
    components = {name: getattr(index, name) for name in ("text_encoder", "tokenizer", "vae")}
    folders = EXPERT_FOLDERS.values() if config.boundary is not None else [EXPERT_FOLDERS["high"]]
    name = PIPELINES.get(config.class_name)
    if config.in_channels != config.out_channels:
        name, pictures = IMAGE_PIPELINES[config.two_time], config.image_dim is not None
        components |= {part: getattr(index, part) if pictures else (None, None) for part in PICTURE_ENCODER}
    if config.boundary is not None and config.two_time:
        name = TWO_TIME_EXPERTS
    return {
        "_class_name": name,
        "_diffusers_version": version("diffusers"),
        **components,
        **{folder: ["diffusers", config.class_name] for folder in folders},
        "scheduler": scheduler,
        **({"boundary_ratio": config.boundary} if config.boundary is not None else {}),
        **({"expand_timesteps": True} if index.expand_timesteps and not config.two_time else {}),
    }


def link_tree(source: Path, target: Path) -> None:
    """Copy the regular files of a directory, sharing them (hard links) where the file system supports it."""
    for folder, _, names in os.walk(source):  # copytree hides the type of an error
        copy = target / Path(folder).relative_to(source)
        copy.mkdir(parents=True)
        for name in names:
            if (Path(folder) / name).is_file():  # not a FIFO, a device or a link that leads nowhere
                link_or_copy(Path(folder) / name, copy / name)


def link_or_copy(source: Path, target: Path) -> None:
    """Copy a file, sharing its bytes (a hard link) where the file system supports it."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def save_adapter(folder: Path, weights: Mapping[str, Tensor], size: LoraSize, base: str) -> None:
    """Write a LoRA adapter in PEFT's format, replacing an older one.

    ``PeftModel.from_pretrained(transformer, folder)`` opens it on the diffusers class of its base. Modules
    that were trained in full (a causal model's compressed patch embedding) are PEFT's ``modules_to_save``.
    Adapters of two experts are in the folders ``high`` and ``low``.

    Args:
        folder: Directory to write.
        weights: Weights by name, as ``Backbone.state_dict_of`` has them.
        size: Rank and alpha.
        base: Address of the model that the adapter was trained on.
    """
    with atomic_directory(folder) as partial:
        for expert, own in by_expert(weights).items():
            _write_adapter(partial / expert, own, size, base)


def _write_adapter(folder: Path, weights: Mapping[str, Tensor], size: LoraSize, base: str) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    layers = sorted({name.rpartition(".lora_")[0] for name in weights if ".lora_" in name})
    whole = sorted({name.rpartition(".")[0] for name in weights if ".lora_" not in name})
    config = LoraConfig(
        r=size.rank,
        lora_alpha=size.alpha,
        target_modules=layers,
        modules_to_save=whole or None,
        base_model_name_or_path=base,
    )
    stored = {ADAPTER_PREFIX + name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    config.save_pretrained(folder)
    save_file(stored, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


class Adapter(NamedTuple):
    """A LoRA adapter: weights named as in ``Backbone.state_dict_of``, its size, and its base or ""."""

    weights: dict[str, Tensor]
    size: LoraSize
    base: str


def load_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter in PEFT's format.

    Raises:
        UsageError: It is damaged, or its weights are not pairs of the rank that its configuration states.
    """
    if parts := {expert: folder / expert for expert in EXPERTS if (folder / expert).is_dir()}:
        found = {expert: load_adapter(part) for expert, part in parts.items()}
        weights = {f"{e}.{name}": weight for e, one in found.items() for name, weight in one.weights.items()}
        return next(iter(found.values()))._replace(weights=weights)
    config = read_record(folder / ADAPTER_CONFIG, AdapterConfig, FETCH)
    file = folder / ADAPTER_WEIGHTS
    weights = {name.removeprefix(ADAPTER_PREFIX): weight for name, weight in read_tensors(file).items()}
    for problem in adapter_problems(shapes_of(weights), config.r):
        raise UsageError(f"{file} is not an adapter of rank {config.r}: {problem}.", FETCH)
    return Adapter(weights, LoraSize(config.r, config.lora_alpha), config.base_model_name_or_path or "")
