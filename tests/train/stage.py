"""A recipe, a pipeline and a data set small enough to run whole stages in a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyflow_cli.data.shards import LatentSample, shard_path, write_manifest, write_negative, write_shard
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs.lineage import RunInputs
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.runs.resources import Given, inputs, require_inputs
from anyflow_cli.train.prepare import TrainingResult, prepare_training
from anyflow_cli.train.stages import STAGES
from tests.tiny_pipeline import CHANNELS, TEXT_DIM

LORA = {"rank": 4, "alpha": 4.0}


def make_data(
    directory: Path,
    count: int = 12,
    seed: int = 0,
    channels: int = CHANNELS,
    shape: tuple[int, int, int] = (3, 4, 4),
    captions: Sequence[str] | None = None,
) -> Path:
    """Random latents, by default of 9 frames of 32 x 32 pixels."""
    generator = torch.Generator().manual_seed(seed)
    samples = [
        LatentSample(
            index, captions[index] if captions else f"clip {index}",
            torch.randn(shape[0], channels, *shape[1:], generator=generator),
            torch.randn(5, TEXT_DIM, generator=generator),
        )
        for index in range(count)
    ]  # fmt: skip
    directory.mkdir(parents=True)
    record = write_shard(shard_path(directory, 0), samples)
    write_negative(directory, torch.zeros(1, TEXT_DIM))
    write_manifest(directory, [record], {"source": "test"})
    return directory


def make_recipe(teacher: Path, data: str | Path, /, **sections: Any) -> Recipe:
    """Two steps of everything, in fp32."""
    short = {
        "steps": 2, "global_batch": 2, "checkpoint_every": 1, "log_every": 1, "preview_every": 0,
        "tensorboard": False, "optimizer": {"lr": 1e-3, "warmup_steps": 0}, "ema": {"decay": 0.5, "start": 1},
    }  # fmt: skip
    content: dict[str, Any] = {
        "name": "test",
        "model": {
            "teacher": str(teacher), "height": 32, "width": 32, "frames": 9, "max_text_tokens": 8,
            "shift": 3.0, "precision": "fp32",
        },
        "data": {"path": str(data)},
        "sample": {"nfe": (1, 2), "teacher_steps": 2},
    }  # fmt: skip
    for section in ("train_flowmap", "distill", "finetune"):
        content[section] = short | sections.pop(section, {})
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values
    return Recipe.model_validate(content)


def inputs_of(verb: str, recipe: Recipe, place: RunPaths, data: Path | None = None) -> RunInputs:
    """What a training command would start from; raises what it would."""
    found = require_inputs(inputs(recipe, place, verb, Given(data=data)))
    return STAGES[verb.replace("-", "_")].inputs(recipe, place, found)


def train(recipe: Recipe, inputs: RunInputs) -> TrainingResult:
    """Run a stage to its end."""
    training = prepare_training(recipe, inputs)
    training.trainer.run()
    return training.save_result()


def paths(directory: Path) -> RunPaths:
    return RunPaths(directory / "runs", "test")
