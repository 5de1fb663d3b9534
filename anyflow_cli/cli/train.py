"""What the training verbs share: what they announce, the progress they show, the result they print."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli.console import print_result
from anyflow_cli.cli.progress import Progress

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe, TrainingSection
    from anyflow_cli.runs.lineage import RunInputs
    from anyflow_cli.train.stages import Finished

log = logging.getLogger(__name__)

SHOWN = ("loss", "matching", "flow_map_loss", "fake")  # figures beside the bar; all are in metrics.jsonl


def stage_facts(recipe: Recipe, inputs: RunInputs) -> dict[str, Any]:
    """What a stage would do, for ``--dry-run``."""
    from anyflow_cli.runs.checkpoint import newest

    settings: TrainingSection = getattr(recipe, inputs.section)
    lora = recipe.model.lora
    return {
        **{name: str(path) for name, path in inputs.parents.items()},
        "data": inputs.data,
        "trains": f"LoRA of rank {lora.rank}" if lora else "all weights",
        "steps": settings.steps,
        "global batch": settings.global_batch,
        "learning rate": settings.optimizer.lr,
        "continues from": newest(inputs.directory / "checkpoints") or "the start",
        "result": inputs.finished,
    }


def train_stage(recipe: Recipe, inputs: RunInputs, label: str) -> Finished:
    """Run a stage under a progress bar, saying first what it is made from."""
    from anyflow_cli.runs.checkpoint import newest
    from anyflow_cli.train.stages import train

    settings: TrainingSection = getattr(recipe, inputs.section)
    for name, path in inputs.parents.items():
        log.info("%s: %s", name, path)
    log.info("data: %s", inputs.data)
    checkpoint = newest(inputs.directory / "checkpoints")
    if checkpoint is not None:
        log.info("continues from %s", checkpoint)
    with Progress(label, settings.steps) as progress:
        return train(
            recipe,
            inputs,
            lambda step, values: progress.update(step, {k: v for k, v in values.items() if k in SHOWN}),
        )


def run_stage(recipe: Recipe, inputs: RunInputs, label: str, *, as_json: bool) -> None:
    """Run a stage and print where its model is."""
    print_result(stage_result(train_stage(recipe, inputs, label), inputs), as_json=as_json)


def stage_result(finished: Finished, inputs: RunInputs) -> dict[str, Any]:
    """The result of a training command."""
    values: dict[str, Any] = {"model": finished.model, "steps": finished.steps}
    if finished.adapter is not None:
        values["adapter"] = finished.adapter
    return values | {"metrics": inputs.directory / "metrics.jsonl", "previews": inputs.directory / "previews"}
