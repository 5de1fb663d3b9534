"""Pipeline folders in the layout of diffusers: finding, reading and writing them.

A pipeline folder holds ``model_index.json`` and one directory a component. Only JSON and safetensors are
read. What is written appears whole or not at all: it is made beside its place and renamed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.config import ANYFLOW, ANYFLOW_FAR, WAN, NetworkConfig
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer, folded, on_meta
from anyflow_cli.utils.files import atomic_directory, read_json, write_json
from anyflow_cli.utils.hub import is_hub_name

BUILT_IN = ("tiny", "tiny-anyflow")
ASSETS = Path(__file__).resolve().parent.parent / "assets"
FROZEN = ("vae", "text_encoder", "tokenizer")  # components that no training changes
WEIGHTS = "diffusion_pytorch_model"
SHARD_BYTES = 5_000_000_000
PIPELINES = {WAN: "WanPipeline", ANYFLOW: "AnyFlowPipeline", ANYFLOW_FAR: "AnyFlowFARPipeline"}
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER_PREFIX = "base_model.model."
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def resolve_pipeline(address: str) -> Path:
    """The folder that ``address`` names: a built-in model, a directory, or a model of the Hub."""
    if address in BUILT_IN:
        return _built_in(address)
    path = Path(address).expanduser()
    if address and path.is_dir():
        return path
    if address and path.exists():
        raise UsageError(
            f"{address} is a file, not a model folder.", "Give the directory that holds model_index.json."
        )
    if is_hub_name(address):
        return _from_hub(address)
    raise UsageError(
        f"There is no model at {address}.",
        f"Give a pipeline folder, a Hub name (Wan-AI/Wan2.1-T2V-1.3B-Diffusers), {' or '.join(BUILT_IN)}.",
    )


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
            f"{name} is no local folder and could not be fetched from the Hugging Face Hub ({reason}).",
            "Check the name and the network; log in with `hf auth login` if the model is gated.",
        ) from error


def component(pipeline: Path, name: str) -> Path:
    """The directory of one component of a pipeline folder.

    The built-in models share one copy of their frozen components, stored in ``tiny``.
    """
    path = pipeline / name
    if name in FROZEN and pipeline.parent == ASSETS and not path.is_dir():
        path = ASSETS / "tiny" / name
    if not path.is_dir():
        raise UsageError(
            f"{pipeline} has no {name} directory.",
            "Give a whole pipeline folder, with vae, text_encoder and tokenizer.",
        )
    return path


def pipeline_files(pipeline: Path) -> dict[str, Path]:
    """Files of a pipeline folder by their name in it, shared components of built-in models included."""
    files = {file.relative_to(pipeline): file for file in pipeline.rglob("*")}
    if pipeline.parent == ASSETS:
        for name in FROZEN:
            folder = component(pipeline, name)
            files |= {file.relative_to(folder.parent): file for file in folder.rglob("*")}
    return {name.as_posix(): files[name] for name in sorted(files) if files[name].is_file()}


def transformer_folder(path: Path) -> Path:
    """The transformer's directory of a pipeline folder, or ``path`` itself if it is one."""
    if (path / "model_index.json").is_file():
        second = read_json(path / "model_index.json").get("transformer_2")
        if second and second[0] is not None:
            raise UsageError(
                f"{path} has two transformers (a Wan 2.2 expert pair), which anyflow cannot distil.",
                "Use a model with one transformer, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers.",
            )
        return component(path, "transformer")
    if (path / "config.json").is_file():
        return path
    raise UsageError(
        f"{path} is not a model folder: it holds neither model_index.json nor config.json.",
        "Give a diffusers pipeline folder, or its transformer directory.",
    )


def read_config(path: Path) -> NetworkConfig:
    """Sizes of the network in a pipeline or transformer folder."""
    return NetworkConfig.from_diffusers(read_json(transformer_folder(path) / "config.json"))


def load_network(path: Path, dtype: torch.dtype | None = torch.float32) -> FlowMapTransformer:
    """The network of a pipeline or transformer folder, frozen; weights as ``dtype`` (None: as stored)."""
    folder = transformer_folder(path)
    network = on_meta(read_config(folder))
    weights = read_weights(folder)
    _check_names_and_shapes(network.state_dict(), weights, folder)
    network.load_state_dict(weights, assign=True)
    if dtype is not None:
        network.store_as(dtype)
    return network.requires_grad_(False)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a component: one safetensors file, or the shards of an index."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            weights |= load_file(file)
        except FileNotFoundError:
            raise UsageError(
                f"{file} is missing, though the index names it.", "Fetch the model again."
            ) from None
        except SafetensorError as error:
            raise UsageError(f"{file} is damaged ({error}).", "Fetch or save the model again.") from error
    return weights


def _weight_files(folder: Path) -> list[Path]:
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    single = folder / f"{WEIGHTS}.safetensors"
    if single.is_file():
        return [single]
    raise UsageError(
        f"{folder} holds no {WEIGHTS}.safetensors.",
        "Convert the weights to safetensors; other formats are not read.",
    )


def _check_names_and_shapes(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], folder: Path
) -> None:
    hint = "The weights and config.json belong to different models; fetch or save the folder again."
    for name, tensor in expected.items():
        if name not in found:
            raise UsageError(f"The weights of {folder} lack {name}.", hint)
        if found[name].shape != tensor.shape:
            wanted, got = tuple(tensor.shape), tuple(found[name].shape)
            raise UsageError(
                f"The weights of {folder} hold {name} as {got}; config.json says {wanted}.", hint
            )
    for name in found:
        if name not in expected:
            raise UsageError(
                f"The weights of {folder} hold {name}, which is no part of this architecture.", hint
            )


def save_pipeline(
    target: Path,
    network: FlowMapTransformer,
    source_pipeline: Path,
    lineage: Mapping[str, Any],
    *,
    shift: float | None = None,
    dtype: torch.dtype | None = None,
    replace: bool = False,
) -> Path:
    """Write ``network`` as a pipeline folder at ``target``; other components come from ``source_pipeline``.

    Two times: an AnyFlow folder that samples at ``shift`` (None: the source's). One time: a Wan folder with
    the source's scheduler. ``lineage.json`` records ``lineage``. An existing ``target`` is an error unless
    ``replace``.
    """
    if target.exists() and not replace:
        raise UsageError(f"{target} exists already.", "Choose another directory, or remove it.")
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    assert not any(".lora_" in name for name in weights), "merge a role first: Backbone.merged"
    config, weights = folded(network.config, weights)
    with atomic_directory(target) as folder:
        for name in FROZEN:
            link_tree(component(source_pipeline, name), folder / name)
        _write_scheduler(folder / "scheduler", source_pipeline, config, shift)
        write_transformer(folder / "transformer", config, weights, dtype)
        write_json(folder / "model_index.json", _model_index(config, source_pipeline))
        write_json(folder / "lineage.json", dict(lineage))
    return target


def write_transformer(
    folder: Path, config: NetworkConfig, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """``config.json`` and safetensors, sharded where large."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_diffusers() | {"_diffusers_version": version("diffusers")})
    stored = {name: tensor.to(device="cpu", dtype=dtype).contiguous() for name, tensor in weights.items()}
    pattern = WEIGHTS + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(stored, filename_pattern=pattern, max_shard_size=SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        save_file({name: stored[name] for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / f"{WEIGHTS}.safetensors.index.json", index)


def _write_scheduler(folder: Path, source: Path, config: NetworkConfig, shift: float | None) -> None:
    if not config.two_time:
        link_tree(component(source, "scheduler"), folder)
        return
    folder.mkdir()
    scheduler = {
        "_class_name": "FlowMapEulerDiscreteScheduler",
        "_diffusers_version": version("diffusers"),
        "num_train_timesteps": 1000,
        "shift": read_shift(source) if shift is None else shift,
    }
    write_json(folder / "scheduler_config.json", scheduler)


def read_shift(pipeline: Path) -> float:
    """The shift of a pipeline's scheduler, under whichever name its class has for it."""
    scheduler = read_json(component(pipeline, "scheduler") / "scheduler_config.json")
    return float(scheduler.get("flow_shift") or scheduler.get("shift") or 1.0)


def _model_index(config: NetworkConfig, source: Path) -> dict[str, Any]:
    index = read_json(source / "model_index.json")
    scheduler = ["diffusers", "FlowMapEulerDiscreteScheduler"] if config.two_time else index["scheduler"]
    components = {name: index[name] for name in ("text_encoder", "tokenizer", "vae")}
    return {
        "_class_name": PIPELINES[config.class_name],
        "_diffusers_version": version("diffusers"),
        **components,
        "transformer": ["diffusers", config.class_name],
        "scheduler": scheduler,
    }


def link_tree(source: Path, target: Path) -> None:
    """A copy of ``source`` that shares its files where the file system can."""
    for folder, _, names in os.walk(source, followlinks=True):  # copytree would hide which error it was
        place = target / Path(folder).relative_to(source)
        place.mkdir(parents=True)
        for name in names:
            link_or_copy(Path(folder) / name, place / name)


def link_or_copy(source: Path, target: Path) -> None:
    """A copy of a file, which shares its bytes where the file system can."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def save_adapter(folder: Path, weights: Mapping[str, Tensor], size: LoraSize, base: str) -> None:
    """Write a LoRA adapter in PEFT's format, replacing an older one.

    ``PeftModel.from_pretrained(transformer, folder)`` opens it on the diffusers class of its base. Modules
    that were trained in full (a causal model's compressed patch embedding) are PEFT's ``modules_to_save``.

    Args:
        folder: Directory to write.
        weights: Weights by name, as ``Backbone.state_dict_of`` has them.
        size: Rank and alpha.
        base: Address of the model that the adapter was trained on.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

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
    with atomic_directory(folder) as partial:
        config.save_pretrained(partial)
        save_file(stored, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})


class Adapter(NamedTuple):
    """A LoRA adapter: weights named as in ``Backbone.state_dict_of``, its size, and its base's address."""

    weights: dict[str, Tensor]
    size: LoraSize
    base: str


def load_adapter(folder: Path) -> Adapter:
    """Read what ``save_adapter`` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_json(folder / ADAPTER_CONFIG)
    try:
        weights = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{folder / ADAPTER_WEIGHTS} cannot be read ({error}).", "Train it again."
        ) from error
    size = LoraSize(int(config["r"]), float(config["lora_alpha"]))
    named = {name.removeprefix(ADAPTER_PREFIX): weight for name, weight in weights.items()}
    return Adapter(named, size, str(config["base_model_name_or_path"]))
