"""LoRA files of other projects, merged into a network: eight spellings of the keys, and their scales.

=============  ======================================  ===========================================
family         key                                     scale of B A
=============  ======================================  ===========================================
diffusers      transformer.blocks.0.attn1.to_q         1, or ``lora_adapter_metadata``
ComfyUI        diffusion_model.blocks.0.self_attn.q    1, or alpha / rank if there is ``.alpha``
PEFT           base_model.model.blocks.0.attn1.to_q    lora_alpha / r of ``adapter_config.json``
musubi         lora_unet_blocks_0_self_attn_q          alpha / rank, alpha 1 if absent
Fun            lora_unet__blocks_0_self_attn_q         alpha / rank, alpha 1 if absent
LyCORIS        lycoris_blocks_0_attn1_to_q             alpha / rank, alpha 1 if absent
bare           blocks.0.self_attn.q                    1, or alpha / rank if there is ``.alpha``
=============  ======================================  ===========================================

ComfyUI's and kijai's files differ in the suffixes alone (lora_A / lora_B, lora_down / lora_up), which are
read in every family. Besides low-rank pairs a file may add to a weight (``.diff``), a bias (``.diff_b``) or a
modulation (``.diff_m``), or replace a weight (``.set_weight``). An address ends with ``+FILE:STRENGTH`` for
each file that is merged into its model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.layouts.tensor_files import TensorFiles
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, listed
from anyflow_cli.utils.files import read_json

# prefix of the keys -> family, and alpha where a file states none (None: the rank, so that the scale is 1)
LORA_FAMILIES: dict[str, tuple[str, float | None]] = {
    "transformer.": ("diffusers", None), "diffusion_model.": ("ComfyUI", None),
    "base_model.model.": ("PEFT", None), "lora_unet__": ("Fun", 1.0), "lora_unet_": ("musubi", 1.0),
    "lycoris_": ("LyCORIS", 1.0), "": ("bare", None),
}  # fmt: skip
LORA_PAIRS = (  # suffixes of A and B
    (".lora_A.weight", ".lora_B.weight"), (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"), (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)  # fmt: skip
LORA_ADDITIONS = {
    ".diff": "weight",
    ".diff_b": "bias",
    ".lora_B.bias": "bias",
    ".diff_m": "scale_shift_table",
}
ADDED_FILE = re.compile(r"^(.+)\+(.+\.(?:safetensors|pt|pth))(?::(-?[0-9.]+))?$")


class LoraRequest(NamedTuple):
    """A LoRA file and the strength at which it is merged."""

    path: Path
    strength: float = 1.0


def with_loras(address: str, files: Iterable[str]) -> str:
    """An address with LoRA files, each FILE or FILE:STRENGTH, merged into its model."""
    return "+".join([address, *files])


def split_loras(address: str) -> tuple[str, tuple[LoraRequest, ...]]:
    """The address of a model, and the LoRA files that are to be merged into it."""
    found: list[LoraRequest] = []
    while not Path(address).expanduser().exists() and (match := ADDED_FILE.match(address)):
        address, path, strength = match[1], Path(match[2]).expanduser(), match[3]
        if not path.is_file():
            raise UsageError(f"There is no LoRA file at {path}.", "Give --lora FILE or --lora FILE:STRENGTH.")
        found.insert(0, LoraRequest(path, 1.0 if strength is None else float(strength)))
    return address, tuple(found)


@dataclass(frozen=True)
class LoraFile:
    """The changes that a LoRA file makes.

    Attributes:
        family: Its spelling of the keys.
        pairs: A, B and scale by the parameter that they change.
        additions: Tensors to add, by parameter.
        replacements: Tensors to put in place, by parameter.
    """

    family: str
    pairs: Mapping[str, tuple[Tensor, Tensor, float]]
    additions: Mapping[str, Tensor]
    replacements: Mapping[str, Tensor]

    def changes(self) -> set[str]:
        """Names of the parameters that it changes."""
        return {*self.pairs, *self.additions, *self.replacements}

    @torch.no_grad()
    def change(self, name: str, weight: Tensor, strength: float) -> Tensor:
        """A weight with the file's changes, fp32."""
        weight = weight.float()
        if name in self.pairs:
            a, b, scale = self.pairs[name]
            weight = weight + (strength * scale * (b.float() @ a.float())).reshape(weight.shape)
        if name in self.additions:
            weight = weight + strength * self.additions[name].float().reshape(weight.shape)
        if name in self.replacements:
            weight = weight + strength * (self.replacements[name].float().reshape(weight.shape) - weight)
        return weight


@dataclass(frozen=True)
class LoraMerged:
    """A network with LoRA files in it, in order, merged tensor by tensor when each is read."""

    base: WeightSource
    loras: tuple[tuple[LoraFile, float], ...]  # files and strengths

    @classmethod
    def of(cls, base: WeightSource, requests: Iterable[LoraRequest]) -> LoraMerged:
        """Read the files for a network; see ``read_lora``."""
        return cls(base, tuple((read_lora(path, base), strength) for path, strength in requests))

    @property
    def config(self) -> NetworkConfig:
        """Sizes of the network."""
        return self.base.config

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name, of the type of the base's; see ``WeightSource``."""
        return {name: self._weight(name, weight) for name, weight in self.base.lazy_weights().items()}

    def _weight(self, name: str, weight: LazyWeight) -> LazyWeight:
        def load() -> Tensor:
            value = weight.load()
            for lora, strength in self.loras:
                value = lora.change(name, value, strength) if name in lora.changes() else value
            return value

        return LazyWeight(weight.shape, weight.dtype, load)


def read_lora(path: Path, base: WeightSource) -> LoraFile:
    """Read a LoRA file for a network.

    Raises:
        UsageError: The network has no place for some of its keys, or other shapes.
    """
    files = TensorFiles.open((path,))
    prefix = next(prefix for prefix in LORA_FAMILIES if any(key.startswith(prefix) for key in files.tensors))
    family, default = LORA_FAMILIES[prefix]
    parameters = {name: tuple(weight.shape) for name, weight in base.lazy_weights().items()}
    modules = _modules(parameters)
    pairs: dict[str, tuple[Tensor, Tensor, float]] = {}
    additions: dict[str, Tensor] = {}
    replacements: dict[str, Tensor] = {}
    used = set()
    for key in files.tensors:
        inner = key.removeprefix(prefix)
        for down, up in LORA_PAIRS:
            module = modules.get(inner.removesuffix(down))
            other = f"{key.removesuffix(down)}{up}"
            if not inner.endswith(down) or module is None or other not in files.tensors:
                continue
            a, b = files.read(key).flatten(1), files.read(other).flatten(1)
            alpha = f"{key.removesuffix(down)}.alpha"
            scale = _scale(
                files, path, module, float(files.read(alpha)) if alpha in files.tensors else default, len(a)
            )
            if _fits(f"{module}.weight", (b.shape[0], a.shape[1]), parameters) and a.shape[0] == b.shape[1]:
                pairs[f"{module}.weight"] = (a, b, scale)
                used |= {key, other, alpha}
        for suffix, last in {**LORA_ADDITIONS, ".set_weight": "weight"}.items():
            module = modules.get(inner.removesuffix(suffix))
            if not inner.endswith(suffix) or module is None:
                continue
            name = f"{module}.{last}".removeprefix(".")
            if _fits(name, files.tensors[key].shape, parameters):
                (replacements if suffix == ".set_weight" else additions)[name] = files.read(key)
                used.add(key)
    unfit = sorted(files.tensors.keys() - used)
    if unfit or not used:
        raise UsageError(
            f"{path} does not fit the model: {listed(unfit)} without a place or of another shape in it.",
            "Use a LoRA of the same model family and size; nothing was merged.",
        )
    return LoraFile(family, pairs, additions, replacements)


def _modules(parameters: Iterable[str]) -> dict[str, str]:
    """Our module by each of its names: ours and the original one, with dots or underscores."""
    found = {}
    for name in {name.rpartition(".")[0] for name in parameters} - {""}:
        original = TRANSFORMER_NAMES.to_original(name)
        for spelled in (name, original, name.replace(".", "_"), original.replace(".", "_")):
            found[spelled] = name
    return found | {"head": ""}  # whose modulation is a parameter of the network itself


def _fits(name: str, shape: Iterable[int], parameters: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a change of this shape has the size of a parameter; patch embeddings may be flattened."""
    wanted = parameters.get(name)
    if wanted is None:
        return False
    flat = (wanted[0], torch.Size(wanted[1:]).numel())
    return tuple(shape) in (wanted, flat)


def _scale(files: TensorFiles, path: Path, module: str, alpha: float | None, rank: int) -> float:
    """Factor of B A: alpha / rank, with alpha from the file, its metadata or the configuration beside it."""
    settings: dict[str, Any] = {}
    stated = json.loads(files.metadata.get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix("transformer."): value for key, value in stated.items()}
    if (path.parent / "adapter_config.json").is_file() and path.name == "adapter_model.safetensors":
        settings = read_json(path.parent / "adapter_config.json")
    if alpha is None and "lora_alpha" in settings:
        alpha = float((settings.get("alpha_pattern") or {}).get(module, settings["lora_alpha"]))
    return 1.0 if alpha is None else alpha / rank
