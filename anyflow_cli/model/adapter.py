"""Adapters on disk, in PEFT's format: what LoRA training learnt, without the base.

Modules that were trained whole (a causal model's compressed patch embedding) are in it as PEFT's
``modules_to_save``.

``PeftModel.from_pretrained(transformer, folder)`` opens one on the diffusers class of its base. Names inside
this project are those of ``Backbone.state_dict_of``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.backbone import LoraSize
from anyflow_cli.utils.files import atomic_directory, read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def save_adapter(folder: Path, weights: Mapping[str, Tensor], size: LoraSize, base: str) -> None:
    """Write a role's adapter; ``base`` names the model that it belongs on. Replaces an older one."""
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
    stored = {PREFIX + name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    with atomic_directory(folder) as partial:
        config.save_pretrained(partial)
        save_file(stored, partial / WEIGHTS, metadata={"format": "pt"})


class Adapter(NamedTuple):
    """Weights under this project's names, their size, and the address of the model they belong on."""

    weights: dict[str, Tensor]
    size: LoraSize
    base: str


def load_adapter(folder: Path) -> Adapter:
    """Read what ``save_adapter`` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_json(folder / CONFIG)
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder / WEIGHTS} cannot be read ({error}).", "Train it again.") from error
    size = LoraSize(int(config["r"]), float(config["lora_alpha"]))
    named = {name.removeprefix(PREFIX): weight for name, weight in weights.items()}
    return Adapter(named, size, str(config["base_model_name_or_path"]))
