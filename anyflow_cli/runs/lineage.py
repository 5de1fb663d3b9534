"""The directory of a training run: whose it is, what it was made from, and whether it may go on here.

    recipe.yaml      the resolved recipe; another one is refused, with the keys that differ
    lineage.json     command, versions, the data set's hash, fingerprints of the models it started from
    metrics.jsonl    tensorboard/  previews/  checkpoints/  model/  adapter/

What may change between starts: how long, how often something is written, how a batch is cut, and the
precision, so that a run whose loss is no number can go on in fp32; nothing else that bears on the weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anyflow_cli
from anyflow_cli.data.shards import MANIFEST
from anyflow_cli.data.storage import Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.model.layouts.transformer import open_transformer
from anyflow_cli.recipe.compare import differing_keys, dump, flat
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.dcp import SHARDS
from anyflow_cli.runs.open import LINEAGE, RECIPE, STATE, is_checkpoint, recipe_of
from anyflow_cli.utils.files import atomic_write, read_json, write_json

HARMLESS = (
    "steps", "micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "preview_every",
    "preview_prompts", "tensorboard", "trackers", "gradient_checkpointing",
    "checkpoint_every_n_blocks", "compile", "recompute_rollout", "pretrained_any_step",
    "fps", "precision",
)  # fmt: skip
OTHER = "Use another --runs directory or recipe name, or go back to the settings of {path}."


@dataclass(frozen=True)
class RunInputs:
    """What a run is made from. ``parents``: each model folder or checkpoint by its part, e.g. start, teacher.

    ``base`` is the pipeline folder whose network the student's weights or adapter stand on, and whose other
    components the finished model takes over.
    """

    directory: Path
    section: str  # of the recipe, e.g. train_flowmap
    data: str | Path  # a directory, or another address of a data set
    parents: Mapping[str, Path]
    base: Path

    @property
    def finished(self) -> Path:
        """The pipeline folder that the run leaves."""
        return self.directory / "model"

    @property
    def adapter(self) -> Path:
        """The adapter that it leaves when it trains one."""
        return self.directory / "adapter"


def check_run(recipe: Recipe, inputs: RunInputs) -> None:
    """Refuse a directory that holds something else, or a run from other settings or inputs."""
    directory = inputs.directory
    if not (directory / RECIPE).exists():
        if directory.exists() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise UsageError(f"{directory} holds files that are no training run.", "Use another --runs.")
        return
    hint = OTHER.format(path=directory / RECIPE)
    there = recipe_of(directory)
    then, now = flat(there), flat(recipe)
    differing = [
        f"{key} ({then.get(key)} there, {now.get(key)} now)"
        for key in differing_keys(there, recipe, ("model", inputs.section))
        if key.rpartition(".")[2] not in HARMLESS and ".alarms." not in key
    ]
    if differing:
        raise UsageError(f"{directory} holds a run with another {', '.join(differing)}.", hint)
    if not (directory / LINEAGE).exists():  # killed as it began
        return
    before = read_json(directory / LINEAGE)
    for name, found in fingerprints(inputs).items():
        if before["inputs"].get(name, {}).get("sha256") != found["sha256"]:
            raise UsageError(
                f"{directory} holds a run from another {name}: {found['path']} is not what it was.",
                f"Remove {directory} to begin again, or bring that {name} back.",
            )


def begin_run(recipe: Recipe, inputs: RunInputs, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make the directory and write what it is, or read it where the run has begun; gives the lineage."""
    check_run(recipe, inputs)
    path = inputs.directory / LINEAGE
    if path.exists():
        return read_json(path)
    lineage = {
        "stage": inputs.section,
        "command": sys.argv,
        "recipe": recipe.name,
        "base": str(inputs.base.resolve()),  # a checkpoint cannot be opened without it
        "versions": package_versions(),
        "inputs": fingerprints(inputs),
        **facts,
    }
    with atomic_write(inputs.directory / RECIPE) as temporary:
        temporary.write_text(dump(recipe), encoding="utf-8")
    write_json(path, lineage)
    return lineage


def package_versions() -> dict[str, str]:
    """Of this package and those that bear on the numbers."""
    others = {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")}
    return {"anyflow": anyflow_cli.__version__, **others}


def fingerprints(inputs: RunInputs) -> dict[str, dict[str, str]]:
    """Path and hash of the data set's manifest and of each parent."""
    data = {"path": str(inputs.data), "sha256": Storage.at(inputs.data).sha256(MANIFEST)}
    parents = {
        name: {"path": str(path), "sha256": model_fingerprint(path)} for name, path in inputs.parents.items()
    }
    return {"data": data} | parents


def model_fingerprint(model: Path) -> str:
    """Tells models apart without reading all of them: config, names, sizes and the ends of the weights."""
    digest = hashlib.sha256()
    weights, config = _identifying_files(model)
    for file in weights:
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as handle:
            for start in (0, max(size - (1 << 20), 0)):
                handle.seek(start)
                digest.update(handle.read(1 << 20))
    if config is not None:
        digest.update(config.read_bytes())
    return digest.hexdigest()


def _identifying_files(model: Path) -> tuple[list[Path], Path | None]:
    """The files with a model's weights, and the one with its sizes or step."""
    if is_checkpoint(model):
        weights = [*model.glob("*.safetensors"), *model.glob(f"{SHARDS}/*.distcp")]
        return sorted(weights), model / STATE
    transformer = open_transformer(model)
    return sorted(transformer.weight_files), transformer.config_file
