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

A model of two experts takes a file for each: ``high=FILE`` or ``low=FILE``, or a file whose name says which
(``..._high_noise_...``). Any other file is merged into both.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.experts import EXPERTS, ExpertName
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.layouts.tensor_files import TensorFiles
from anyflow_cli.model.network import on_meta
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
ADDED_FILE = re.compile(r"^(.+)\+(?:(high|low)=)?(.+\.(?:safetensors|pt|pth))(?::(-?[0-9.]+))?$")
EXPERT_IN_NAME = re.compile(
    r"(?<![a-z])(high|low)(?:[-_ .]?noise)?(?![a-z])(?![-_ .]?(?:rank|vram|step|res|quality))"
)

log = logging.getLogger(__name__)


class LoraRequest(NamedTuple):
    """A LoRA file, the strength at which it is merged, and into which of two experts; None: by its name."""

    path: Path
    strength: float = 1.0
    expert: ExpertName | None = None

    @property
    def manner(self) -> str:
        """Strength, and the expert where one is named, in words."""
        return f"at {self.strength:g}" + (f" in the {self.expert}-noise expert" if self.expert else "")

    @property
    def settings(self) -> tuple[str | float, ...]:
        """Strength, and the expert where one is named, for records."""
        return (self.strength, *([self.expert] if self.expert else []))


def add_loras(model: Path, loras: Iterable[LoraRequest]) -> Path:
    """Address of a model with LoRA files, from absolute places, that ``split_loras`` takes apart again."""
    files = (
        f"{f'{one.expert}=' if one.expert else ''}{one.path}:"
        f"{np.format_float_positional(one.strength, trim='-')}"
        for one in loras
    )
    return Path(with_loras(str(model), files))


def with_loras(address: str, files: Iterable[str]) -> str:
    """An address with LoRA files, each [high=|low=]FILE[:STRENGTH], merged into its model."""
    return "+".join([address, *files])


def split_loras(address: str) -> tuple[str, tuple[LoraRequest, ...]]:
    """The address of a model, and the LoRA files that are to be merged into it."""
    found: list[LoraRequest] = []
    while not Path(address).expanduser().exists() and (match := ADDED_FILE.match(address)):
        address, expert, path, strength = match[1], match[2], Path(match[3]).expanduser(), match[4]
        if not path.is_file():
            raise UsageError(f"There is no LoRA file at {path}.", "Give --lora FILE or --lora FILE:STRENGTH.")
        one: ExpertName | None = None if expert is None else "high" if expert == "high" else "low"
        found.insert(0, LoraRequest(path.resolve(), 1.0 if strength is None else float(strength), one))
    return address, tuple(found)


def expert_of_name(path: Path) -> ExpertName | None:
    """The expert that the name of a LoRA file, or else of its folder, says it is for."""
    for name in (path.stem, path.parent.name):
        found = set(EXPERT_IN_NAME.findall(name.lower()))
        if len(found) == 1:
            return "high" if "high" in found else "low"
    return None


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
        return cls(base, tuple((read_lora(one.path, base, one.expert), one.strength) for one in requests))

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

        return replace(weight, load=load)


class LoraPair(NamedTuple):
    """Keys of a low-rank pair, the module that it changes, and its rank."""

    down: str
    up: str
    module: str
    rank: int


@dataclass(frozen=True)
class LoraPlan:
    """What a LoRA file would change in a network, by its header alone.

    Attributes:
        prefix: Of its keys, which names its family in ``LORA_FAMILIES``.
        pairs: Low-rank pairs by the parameter that they change.
        additions: Keys of tensors to add, by parameter.
        replacements: Keys of tensors to put in place, by parameter.
        unfit: Keys without a place, or of another shape, in the network.
    """

    prefix: str
    pairs: Mapping[str, LoraPair]
    additions: Mapping[str, str]
    replacements: Mapping[str, str]
    unfit: tuple[str, ...]

    @property
    def family(self) -> str:
        """Its spelling of the keys."""
        return LORA_FAMILIES[self.prefix][0]

    @property
    def is_whole(self) -> bool:
        """Whether the file fits the network as a whole."""
        return not self.unfit and bool(self.pairs or self.additions or self.replacements)


def plan_lora(files: TensorFiles, parameters: Mapping[str, tuple[int, ...]]) -> LoraPlan:
    """Match the keys of a LoRA file with a network's parameters, given by their shapes."""
    prefix = next(prefix for prefix in LORA_FAMILIES if any(key.startswith(prefix) for key in files.tensors))
    modules = _modules(parameters)
    pairs: dict[str, LoraPair] = {}
    additions: dict[str, str] = {}
    replacements: dict[str, str] = {}
    used = set()
    for key, info in files.tensors.items():
        inner = key.removeprefix(prefix)
        for down, up in LORA_PAIRS:
            module = modules.get(inner.removesuffix(down))
            other = f"{key.removesuffix(down)}{up}"
            if not inner.endswith(down) or module is None or other not in files.tensors:
                continue
            rank, columns = info.shape[0], torch.Size(info.shape[1:]).numel()
            rows, inner_rank = (
                files.tensors[other].shape[0],
                torch.Size(files.tensors[other].shape[1:]).numel(),
            )
            if _fits(f"{module}.weight", (rows, columns), parameters) and rank == inner_rank:
                pairs[f"{module}.weight"] = LoraPair(key, other, module, rank)
                used |= {key, other, f"{key.removesuffix(down)}.alpha"}
        for suffix, last in {**LORA_ADDITIONS, ".set_weight": "weight"}.items():
            module = modules.get(inner.removesuffix(suffix))
            if not inner.endswith(suffix) or module is None:
                continue
            name = f"{module}.{last}".removeprefix(".")
            if _fits(name, info.shape, parameters):
                (replacements if suffix == ".set_weight" else additions)[name] = key
                used.add(key)
    return LoraPlan(prefix, pairs, additions, replacements, tuple(sorted(files.tensors.keys() - used)))


def check_lora(lora: LoraRequest, config: NetworkConfig) -> None:
    """Refuse a LoRA file of which a part does not fit a network, by headers alone."""
    _experts_of(lora.path, config, lora.expert)
    _require_whole(lora.path, plan_lora(TensorFiles.open((lora.path,)), shapes_of_network(config)))


def shapes_of_network(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a network, of one of two experts, by name."""
    parameters = on_meta(replace(config, boundary=None)).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters}


def _require_whole(path: Path, plan: LoraPlan) -> None:
    if not plan.is_whole:
        raise UsageError(
            f"{path} does not fit the model: {listed(list(plan.unfit))} without a place or of another shape "
            "in it.",
            "Use a LoRA of the same model family and size; nothing was merged.",
        )


def read_lora(path: Path, base: WeightSource, expert: ExpertName | None = None) -> LoraFile:
    """Read a LoRA file for a network, or for one of two experts; by default for the one that its name says.

    Raises:
        UsageError: The network has no place for some of its keys, or other shapes.
    """
    files, experts = TensorFiles.open((path,)), _experts_of(path, base.config, expert)
    if base.config.boundary is not None:
        names = "- and the ".join(one.removesuffix(".") for one in experts)
        log.info("%s is merged into the %s-noise expert.", path.name, names)
    weights = base.lazy_weights().items()
    shapes = {n.removeprefix(experts[0]): tuple(w.shape) for n, w in weights if n.startswith(experts[0])}
    plan = plan_lora(files, shapes)
    _require_whole(path, plan)
    pairs = {
        name: (
            files.read(pair.down).flatten(1),
            files.read(pair.up).flatten(1),
            lora_scale(files, path, plan, pair),
        )
        for name, pair in plan.pairs.items()
    }
    additions, replacements = (
        {f"{expert}{name}": files.read(key) for name, key in keys.items() for expert in experts}
        for keys in (plan.additions, plan.replacements)
    )
    by_expert = {f"{expert}{name}": pair for name, pair in pairs.items() for expert in experts}
    return LoraFile(plan.family, by_expert, additions, replacements)


def _experts_of(path: Path, config: NetworkConfig, expert: ExpertName | None) -> tuple[str, ...]:
    """Prefixes of the parameters that a file is for; of two experts those of one, or of both."""
    if config.boundary is None and expert is not None:
        raise UsageError(
            f"{path} is given for the {expert}-noise expert, and the model is one network.",
            f"Give --lora {path} without {expert}=.",
        )
    if config.boundary is None:
        return ("",)
    named = expert or expert_of_name(path)
    experts = EXPERTS if named is None else (named,)
    return tuple(f"{name}." for name in experts)


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


def lora_scale(files: TensorFiles, path: Path, plan: LoraPlan, pair: LoraPair) -> float:
    """Factor of B A: alpha / rank, with alpha from the file, its metadata or the configuration beside it."""
    stem = next(pair.down.removesuffix(down) for down, _ in LORA_PAIRS if pair.down.endswith(down))
    alpha = LORA_FAMILIES[plan.prefix][1]
    if f"{stem}.alpha" in files.tensors:
        alpha = float(files.read(f"{stem}.alpha"))
    stated = json.loads(files.metadata.get("lora_adapter_metadata", "{}"))
    settings: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in stated.items()}
    if (path.parent / "adapter_config.json").is_file() and path.name == "adapter_model.safetensors":
        settings = read_json(path.parent / "adapter_config.json")
    if alpha is None and "lora_alpha" in settings:
        alpha = float((settings.get("alpha_pattern") or {}).get(pair.module, settings["lora_alpha"]))
    return 1.0 if alpha is None else alpha / pair.rank
