"""Which model a command uses, and how its address becomes a network.

An address is a built-in name, a Hub name, a pipeline folder, or a place in a training run: the run itself
(its finished model, else its newest checkpoint), or one checkpoint. A checkpoint holds only what was
trained, as a moving average; the rest is read from the model that the run started from. So a model can be
sampled and exported while its training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.backbone import start_network
from anyflow_cli.model.causal import FAR, resolved_chunks
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.layouts.expert_files import expert_places, open_network, split_places
from anyflow_cli.model.lora import LoraSize, MergedNetwork
from anyflow_cli.model.lora_formats import LoraMerged, LoraRequest, add_loras, split_loras
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    PipelineIndex,
    component,
    components_of,
    each_place,
    has_components,
    load_network,
    named_places,
    read_config,
    read_shift,
    resolve_pipeline,
    with_components,
)
from anyflow_cli.model.weights_io import WeightSource
from anyflow_cli.recipe.schema import ModelSection, Recipe
from anyflow_cli.runs.checkpoint import (
    MARKER,
    is_checkpoint,
    newest,
    trained_names,
    trained_weights,
    weight_files,
)
from anyflow_cli.runs.lineage import TrainingRun, run_of
from anyflow_cli.runs.paths import LINEAGE, MODEL, RECIPE
from anyflow_cli.utils.files import read_json
from anyflow_cli.utils.records import read_record

log = logging.getLogger(__name__)


class ModelChoice(NamedTuple):
    """A model and the reason why it was taken, for people to read."""

    address: str
    why: str


@dataclass(frozen=True)
class OpenedModel:
    """A network, the folder with its text encoder and VAE, where it comes from, and its own shift."""

    network: FlowMapTransformer
    pipeline: Path
    lineage: dict[str, Any]
    shift: float


@dataclass(frozen=True)
class ModelInfo:
    """A model as its files describe it, without the values of its weights.

    Attributes:
        path: Pipeline folder, transformer folder or checkpoint.
        pipeline: Folder with the text encoder and the VAE; for a checkpoint also the weights it started from.
        two_time: Whether the network takes two times, as any-step models do.
        causal: Chunks and patches of a causal model; None for a bidirectional one.
        lineage: Content of ``lineage.json``, empty where there is none.
        sources: Files and folders that determine what the model samples.
        run: Training run of a checkpoint; None for a model folder.
        loras: LoRA files that are merged into it.
    """

    path: Path
    pipeline: Path
    two_time: bool
    causal: CausalConfig | None
    lineage: dict[str, Any]
    sources: tuple[Path, ...]
    run: TrainingRun | None = None
    loras: tuple[LoraRequest, ...] = ()

    @property
    def shift(self) -> float:
        """Timestep shift the model was made for."""
        return read_shift(self.pipeline) if self.run is None else self.run.recipe.model.shift

    @property
    def scheduler(self) -> str | None:
        """Class and shift of the pipeline's scheduler, which anyflow's samplers replace; None without one."""
        if not (self.pipeline / "scheduler").is_dir() or not (self.pipeline / INDEX).is_file():
            return None
        index = read_record(self.pipeline / INDEX, PipelineIndex)
        return f"{index.scheduler[1]}, shift {read_shift(self.pipeline):g}"


def model_problems(address: str) -> list[str]:
    """List what is wrong with the model at ``address``, by the headers of its files; empty if it is sound."""
    path = locate(split_loras(address)[0])
    if is_checkpoint(path):
        describe_checkpoint(path)
        return []
    if (path / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{path} is a LoRA adapter, not a model.",
            f"Name the model beside it, or a base with --lora {path / ADAPTER_WEIGHTS}.",
        )
    return check_folder(path)


def describe(address: str, recipe: Recipe) -> ModelInfo:
    """Describe the model at ``address`` without loading its weights.

    A transformer without text encoder and VAE, a folder or a file, takes those that the recipe names
    (``model.components``), else those of its teacher.
    """
    model, loras = split_loras(address)
    info = _describe(locate(model), recipe)
    if not loras:
        return info
    lineage = info.lineage | {"loras": [[str(lora.path), *lora.settings] for lora in loras]}
    sources = (*info.sources, *(lora.path for lora in loras))
    return replace(info, lineage=lineage, sources=sources, loras=loras)


def _describe(path: Path, recipe: Recipe) -> ModelInfo:
    if is_checkpoint(path):
        return describe_checkpoint(path)
    is_pipeline, places = has_components(path), expert_places(path)
    pipeline = with_components(path, recipe.model.components or recipe.model.teacher)
    lineage = read_json(path / LINEAGE) if (path / LINEAGE).is_file() else {}
    if not path.exists() and places is not None:
        lineage = {"experts": {name: str(place) for name, place in places.items()}}
    config = read_config(path)
    causal = config.causal
    if causal is not None:
        causal, message = resolved_chunks(causal, recipe.model.causal, path)
        if message:
            _warn_once(message)
    weights = (path,) if path.exists() or places is None else tuple(places.values())
    sources = weights if is_pipeline else (*weights, pipeline)
    if is_pipeline and not path.is_dir():
        sources = (*weights, *dict.fromkeys(component(path, name) for name in components_of(config)))
    return ModelInfo(path, pipeline, config.two_time, causal, lineage, sources)


def describe_checkpoint(path: Path) -> ModelInfo:
    """Describe a checkpoint; it may add the second time or the chunks to the model its run started from."""
    if not (path / MARKER).is_file():
        raise UsageError(f"The checkpoint {path} is not complete.", "Use another one of the same run.")
    run, names = run_of(path), trained_names(path)
    config, chunks = read_config(run.base), run.recipe.model.causal
    two_time = config.two_time or any("delta_embedder" in name for name in names)
    causal = config.causal
    if chunks is not None and any(name.startswith(FAR) for name in names):
        causal = CausalConfig.from_recipe(chunks)
    lineage = run.lineage.as_dict() | {"checkpoint": path.name}
    sources = (*weight_files(path), *named_places(run.base), run.pipeline)
    return ModelInfo(path, run.pipeline, two_time, causal, lineage, sources, run)


def open_model(
    address: str,
    recipe: Recipe,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    storage: torch.dtype | None = None,
) -> OpenedModel:
    """Open the model at ``address`` tensor by tensor, see ``network_from``."""
    info = describe(address, recipe)
    network = network_from(weight_source(info), dtype, device, storage)
    network.config = replace(network.config, causal=info.causal)
    return OpenedModel(network, info.pipeline, info.lineage, info.shift)


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def weight_source(info: ModelInfo) -> WeightSource:
    """Weights of a model as stored, to be read one at a time."""
    source: WeightSource = (
        open_network(info.path)
        if info.run is None
        else merged_student(
            info.run.base, info.run.recipe.model, trained_weights(info.path), two_time=info.two_time
        )
    )
    return LoraMerged.of(source, info.loras) if info.loras else source


def merged_student(
    base: Path, model: ModelSection, trained: Mapping[str, Tensor], *, two_time: bool
) -> MergedNetwork:
    """The student of a run, its trained weights merged into the stored ones of the model it started from.

    Args:
        base: Model that the run started from.
        model: Section of the run's recipe.
        trained: Trained weights by name, see ``trained_weights``.
        two_time: Whether the student is a flow map.
    """
    size = LoraSize(model.lora.rank, model.lora.alpha) if model.lora else None
    network = start_network(load_network(base, None), model, two_time=two_time)
    return MergedNetwork(network, trained, size)


def locate(address: str) -> Path:
    """The model folder or checkpoint that an address leads to."""
    model, loras = split_loras(address)
    if loras:
        return add_loras(locate(model), loras)
    if (places := split_places(model)) is not None:
        return each_place(places, locate)
    path = resolve_pipeline(model)
    if (path / MODEL / "model_index.json").is_file():
        return path / MODEL
    return last_checkpoint(path) if (path / RECIPE).is_file() else path


def last_checkpoint(path: Path) -> Path:
    """The newest checkpoint of a training run."""
    found = newest(path / "checkpoints")
    if found is None:
        raise UsageError(
            f"The run {path} has neither a finished model nor a checkpoint yet.",
            "Wait for its first checkpoint, or set checkpoint_every lower.",
        )
    return found
