"""The directory of a training run: what it was started from, and whether a command may continue it.

    recipe.yaml      the resolved recipe; a command with another one is refused, with the keys that differ
    lineage.json     command, versions, hash of the data set, fingerprints of the models it started from
    metrics.jsonl    tensorboard/  previews/  checkpoints/  model/  adapter/

Between starts may change: how long, how often something is written, how a batch is split, and the precision,
so that a run with a loss that is not finite can continue in fp32. Nothing else that affects the weights may.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from anyflow_cli import __version__
from anyflow_cli.data.published import recognize
from anyflow_cli.data.shards import MANIFEST
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.expert_files import open_network
from anyflow_cli.model.lora_formats import split_loras
from anyflow_cli.model.pipeline_io import absolute_model, named_places, without_loras
from anyflow_cli.model.precision import Precision
from anyflow_cli.recipe.compare import differing_keys, dump, flat
from anyflow_cli.recipe.load import load_recorded_recipe
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.checkpoint import STATE, is_checkpoint
from anyflow_cli.runs.dcp import SHARDS
from anyflow_cli.runs.paths import ADAPTER_FOLDER, LINEAGE, MODEL, RECIPE
from anyflow_cli.utils.files import atomic_write, file_sha256, write_json
from anyflow_cli.utils.records import read_record

MAY_CHANGE = {
    "steps", "micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "preview_every",
    "preview_prompts", "tensorboard", "trackers", "gradient_checkpointing",
    "checkpoint_every_n_blocks", "compile", "recompute_rollout", "pretrained_any_step",
    "fps", "precision", "data.prompts", "data.world", "data.path", "data.workers", "data.max_corrupt",
    "attention", "states",
}  # fmt: skip
# section -> key of a new run that starts from the weights of a run
START_KEYS = {
    "train_flowmap": "model.teacher",
    "distill": "distill.init_from",
    "finetune": "finetune.init_from",
}


class Fingerprint(BaseModel, extra="allow", frozen=True):
    """Where an input was, and a hash of it."""

    path: str
    sha256: str


class RunLineage(BaseModel, extra="allow", frozen=True):
    """Content of a run's ``lineage.json``. Without ``base`` its checkpoints cannot be opened."""

    stage: str
    command: list[str]
    recipe: str
    base: str
    versions: dict[str, str]
    inputs: dict[str, Fingerprint]
    precision: Literal["fp32", "bf16"]
    processes: int
    components: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class RunInputs:
    """What a run starts from.

    Attributes:
        directory: Directory of the run.
        section: Section of the recipe, e.g. ``train_flowmap``.
        data: Data set: a directory, or an address that fsspec reads.
        parents: Model folders or checkpoints by their part, e.g. start, teacher.
        base: Pipeline folder that the student's weights or adapter apply to. The finished model takes text
            encoder, VAE and tokenizer from it.
        components: Folder with those where the base has none.
    """

    directory: Path
    section: str
    data: str | Path
    parents: Mapping[str, Path]
    base: Path
    components: Path | None = None

    @property
    def pipeline(self) -> Path:
        """Folder with the VAE, the text encoder and the tokenizer."""
        return self.components or self.base

    @property
    def finished(self) -> Path:
        """The pipeline folder that the run writes at its end."""
        return self.directory / MODEL

    @property
    def adapter(self) -> Path:
        """The adapter that a run with LoRA writes at its end."""
        return self.directory / ADAPTER_FOLDER


class TrainingRun(NamedTuple):
    """A run as its files describe it: recipe, lineage, and the model that its checkpoints apply to."""

    recipe: Recipe
    lineage: RunLineage
    base: Path

    @property
    def pipeline(self) -> Path:
        """Folder with the VAE, the text encoder and the tokenizer."""
        return self.base if self.lineage.components is None else Path(self.lineage.components)


def run_of(checkpoint: Path) -> TrainingRun:
    """Read the run that a checkpoint belongs to."""
    directory = checkpoint.parent.parent
    lineage = read_lineage(directory)
    base = Path(lineage.base)
    missing = [place for place in named_places(base) if not place.exists()]
    if missing:
        raise UsageError(
            f"{checkpoint} was trained from {missing[0]}, which does not exist.",
            "Restore that model, or work in the directory where the training was started.",
        )
    return TrainingRun(recipe_of(directory), lineage, base)


def read_lineage(run: Path) -> RunLineage:
    """Read the ``lineage.json`` of a run."""
    return read_record(run / LINEAGE, RunLineage, "Restore the file from a copy of the run.")


def recipe_of(run: Path) -> Recipe:
    """Read the recipe of a run; one of another version may have keys that this version does not know."""
    try:
        return load_recorded_recipe(run / RECIPE)
    except UsageError as error:
        versions = read_lineage(run).versions if (run / LINEAGE).exists() else {}
        writer = versions.get("anyflow", __version__)
        if writer == __version__:
            raise
        raise UsageError(
            f"The run {run} was started by anyflow {writer}; {__version__} cannot read its recipe.",
            f"Use that version: pip install anyflow=={writer}.",
        ) from error


def check_run_directory(directory: Path) -> None:
    """Refuse a directory that holds something else than a training run."""
    if (directory / RECIPE).exists() or not directory.exists():
        return
    if not directory.is_dir() or any(not path.name.startswith(".") for path in directory.iterdir()):
        raise UsageError(f"{directory} is not a training run.", "Choose another directory with --runs.")


def check_run(recipe: Recipe, inputs: RunInputs) -> None:
    """Refuse a directory that holds something else, or a run with other settings or inputs."""
    directory = inputs.directory
    check_run_directory(directory)
    if not (directory / RECIPE).exists():
        return
    recorded = recipe_of(directory)
    then, now = flat(recorded), flat(recipe)
    differing = [
        f"{key} ({then.get(key)} there, {now.get(key)} now)"
        for key in differing_keys(recorded, recipe, ("model", "data", inputs.section))
        if MAY_CHANGE.isdisjoint((key, key.rpartition(".")[2])) and ".alarms." not in key
    ]
    if differing:
        key = START_KEYS[inputs.section]
        raise UsageError(
            f"{directory} holds a run with another {', '.join(differing)}.",
            f"Go back to the settings of {directory / RECIPE}, or use another --runs or recipe name; to start"
            f" that run from the weights of this one, add --set {key}={inputs.finished}.",
        )
    if not (directory / LINEAGE).exists():
        if any(directory.glob("checkpoints/*")):
            raise UsageError(
                f"{directory} has checkpoints but no {LINEAGE}, so it is unknown what it was started from.",
                "Restore the file from a copy of the run, or use another --runs.",
            )
        return  # killed as it began
    recorded_inputs = read_lineage(directory).inputs
    for name, found in fingerprints(inputs).items():
        if name not in recorded_inputs or recorded_inputs[name].sha256 != found.sha256:
            raise UsageError(
                f"{directory} holds a run from another {name}: {found.path} has changed since.",
                f"Remove {directory} to start again, or restore that {name}.",
            )


def begin_run(recipe: Recipe, inputs: RunInputs, precision: Precision, processes: int) -> RunLineage:
    """Create the directory of a run and record what it starts from, or read the record; give the lineage."""
    check_run(recipe, inputs)
    if (inputs.directory / LINEAGE).exists():
        return read_lineage(inputs.directory)
    lineage = RunLineage(
        stage=inputs.section,
        command=sys.argv,
        recipe=recipe.name,
        base=str(absolute_model(inputs.base)),
        versions=package_versions(),
        inputs=fingerprints(inputs),
        precision=precision,
        processes=processes,
        components=None if inputs.components is None else str(inputs.components.resolve()),
    )
    with atomic_write(inputs.directory / RECIPE) as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    write_json(inputs.directory / LINEAGE, lineage.as_dict())
    return lineage


def package_versions() -> dict[str, str]:
    """Versions of this package and of those that affect the numbers."""
    others = {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
    return {"anyflow": __version__, **others}


def fingerprints(inputs: RunInputs) -> dict[str, Fingerprint]:
    """Path and hash of the data set, by its manifest or its files' names and sizes, and of each parent."""
    published = recognize(inputs.data)
    sha256 = Storage.at(inputs.data).sha256(MANIFEST) if published is None else published.sha256
    found = {"data": Fingerprint(path=str(inputs.data), sha256=sha256)}
    for name, path in inputs.parents.items():
        found[name] = Fingerprint(path=str(path), sha256=model_fingerprint(path))
    return found


def model_fingerprint(model: Path) -> str:
    """Hash what tells models apart without reading all: config, names, sizes and ends of the weights.

    LoRA files are hashed whole.
    """
    digest = hashlib.sha256()
    loras = split_loras(str(model))[1]
    weights, config = _identifying_files(without_loras(model))
    for file in weights:
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as handle:
            for start in (0, max(size - (1 << 20), 0)):
                handle.seek(start)
                digest.update(handle.read(1 << 20))
    if config is not None:
        digest.update(config.read_bytes())
    for lora in loras:
        digest.update(json.dumps([file_sha256(lora.path), *lora.settings]).encode())
    return digest.hexdigest()


def _identifying_files(model: Path) -> tuple[list[Path], Path | None]:
    """The files with a model's weights, and the one with its sizes or step."""
    if is_checkpoint(model):
        weights = [*model.glob("*.safetensors"), *model.glob(f"{SHARDS}/*.distcp")]
        return sorted(weights), model / STATE
    transformers = open_network(model).transformers
    weights = [file for transformer in transformers for file in sorted(transformer.weight_files)]
    return weights, transformers[0].config_file
