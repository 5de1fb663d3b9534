"""``run_training``: everything that the three training verbs do beyond their options."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow_cli.cli import options
from anyflow_cli.cli.console import facts_table, print_dry_run, print_result
from anyflow_cli.cli.launch import count_processes, start_processes
from anyflow_cli.cli.progress import Progress
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.distributed import is_main_process, process_group
from anyflow_cli.utils.run_lock import RunLock

if TYPE_CHECKING:
    from anyflow_cli.recipe.schema import Recipe, TrainingSection
    from anyflow_cli.runs.lineage import RunInputs
    from anyflow_cli.runs.resources import Resource
    from anyflow_cli.train.prepare import TrainingResult

log = logging.getLogger(__name__)

SHOWN = ("loss", "matching", "flow_map_loss", "fake")  # values beside the bar; all are in metrics.jsonl

# Encodes the videos of a command as a data set; in a dry run None, unless they are already encoded.
EncodeVideos = Callable[["Recipe", RunPaths, bool], Path | None]
# Scores a finished model against the one it started from; returns tables by name.
CompareModels = Callable[["Recipe", RunPaths, "RunInputs", "TrainingResult"], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class TrainingCommand:
    """A training verb with its options.

    Attributes:
        section: Section of the recipe, which names the stage.
        recipe: Value of ``--recipe``.
        assignments: Values of ``--set``.
        runs: Directory of all runs.
        steps: Value of ``--steps``.
        seed: Value of ``--seed``.
        processes: Value of ``--nproc``.
        dry_run: Whether to check everything and train nothing.
        as_json: Whether to print the result as JSON.
        overrides: Options of this verb alone, each with the key that it sets.
        shown: Keys of the section that a dry run shows first, by their labels.
        data: Value of ``--data``.
        encode: Encodes videos, for a verb that takes them.
        compare: Compares the models before and after, where the verb does.
        loras: Values of ``--lora``.
        lora_key: Key of the model that they are merged into.
    """

    section: str
    recipe: str
    assignments: Iterable[str] | None
    runs: Path
    steps: int | None
    seed: int | None
    processes: int | None
    dry_run: bool
    as_json: bool
    overrides: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    data: Path | None = None
    encode: EncodeVideos | None = None
    compare: CompareModels | None = None
    loras: list[str] | None = None
    lora_key: str = "model.teacher"

    @property
    def verb(self) -> str:
        """Name of the command."""
        return self.section.replace("_", "-")

    def load_recipe(self) -> Recipe:
        """The recipe with all overrides."""
        common = {
            "--steps": (f"{self.section}.steps", self.steps),
            "--seed": (f"{self.section}.seed", self.seed),
            "--nproc": ("launch.processes", self.processes),
        }
        recipe = options.load_settings(self.recipe, self.assignments, {**self.overrides, **common})
        return self.fitted(options.merge_lora_files(recipe, self.loras, self.lora_key))

    def fitted(self, recipe: Recipe) -> Recipe:
        """The recipe with the blocks to recompute chosen, its optional packages present."""
        from anyflow_cli.model.base_storage import require_package

        for setting in (recipe.model.base_weights, getattr(recipe, self.section).optimizer.states):
            require_package(setting)
        if recipe.model.gradient_checkpointing != "auto":
            return recipe
        from anyflow_cli.plan.estimate import choose_checkpointing
        from anyflow_cli.plan.hardware import this_machine

        tunes = self.section == "train_flowmap" and recipe.train_flowmap.objective == "flow-matching"
        stage = "tune" if tunes else "distill" if self.section == "distill" else "train-flowmap"
        chosen = choose_checkpointing(recipe, stage, this_machine())
        every = chosen.model.checkpoint_every_n_blocks
        recomputed = f"one block of {every}" if chosen.model.gradient_checkpointing else "no block"
        log.info("Recomputed in the backward pass: %s, by the plan of this machine.", recomputed)
        return chosen

    def encode_videos(self, recipe: Recipe, paths: RunPaths) -> Path | None:
        """The data set of the command's videos; None in a dry run unless they are encoded."""
        assert self.encode is not None, "a verb that takes videos encodes them"
        return self.encode(recipe, paths, self.dry_run)


def run_training(command: TrainingCommand) -> None:
    """Run a training command: find its inputs, train or continue, save the model, print where it is.

    A dry run stops after the checks. With ``--nproc`` this process only starts the others.
    """
    recipe = command.load_recipe()
    paths = RunPaths(command.runs, recipe.name)
    settings: TrainingSection = getattr(recipe, command.section)
    from anyflow_cli.runs import resources
    from anyflow_cli.runs.checkpoint import newest
    from anyflow_cli.runs.lineage import check_run, check_run_directory
    from anyflow_cli.train.prepare import prepare_training
    from anyflow_cli.train.stages import STAGES

    stage = STAGES[command.section]
    needs = resources.inputs(recipe, paths, command.verb, resources.Given(data=command.data))
    count_processes(recipe.launch)
    if command.dry_run:
        return _print_dry_run(command, recipe, paths, needs)
    found, directory = resources.require_inputs(needs), stage.directory(recipe, paths)
    check_run_directory(directory)
    with RunLock(directory) as lock:
        if "data set" not in found:
            found |= {"data set": str(command.encode_videos(recipe, paths))}
        inputs = stage.inputs(recipe, paths, found)
        check_run(recipe, inputs)
        if start_processes(recipe.launch, before=lock.release):
            return None
        for name, path in {**inputs.parents, "data": inputs.data}.items():
            log.info("%s: %s", name, path)
        if checkpoint := newest(directory / "checkpoints"):
            log.info("continues from %s", checkpoint)
        with process_group(), Progress(command.verb, settings.steps) as progress:
            training = prepare_training(
                recipe,
                inputs,
                lambda step, values: progress.update(step, {k: v for k, v in values.items() if k in SHOWN}),
            )
            training.trainer.run()
            finished = training.save_result()
    if not is_main_process():
        return None
    values: dict[str, Any] = {"model": finished.model, "steps": finished.steps}
    if finished.adapter is not None:
        values["adapter"] = finished.adapter
    values |= {"metrics": directory / "metrics.jsonl", "previews": directory / "previews"}
    compared = command.compare(recipe, paths, inputs, finished) if command.compare else {}
    shown = facts_table(values | {name: _in_words(part) for name, part in compared.items()})
    print_result(values | dict(compared), as_json=command.as_json, text=shown)


def _print_dry_run(
    command: TrainingCommand, recipe: Recipe, paths: RunPaths, needs: Sequence[Resource]
) -> None:
    """Print what a training command would do, as far as what it starts from is there."""
    from anyflow_cli.runs import resources
    from anyflow_cli.runs.checkpoint import newest
    from anyflow_cli.runs.lineage import check_run
    from anyflow_cli.train.stages import STAGES

    stage, settings = STAGES[command.section], getattr(recipe, command.section)
    facts = {label: getattr(settings, key) for key, label in command.shown.items()}
    found = resources.require_inputs(needs) if resources.is_ready(needs) else {}
    if found and "data set" not in found:
        latents = command.encode_videos(recipe, paths)
        found = {} if latents is None else found | {"data set": str(latents)}
    if not found:
        facts |= {"latents": paths.finetune_data} if command.encode else {}
        facts |= {"result": stage.directory(recipe, paths) / "model"}
        return print_dry_run(command.verb, facts, needs, as_json=command.as_json)
    inputs = stage.inputs(recipe, paths, found)
    check_run(recipe, inputs)
    lora = recipe.model.lora
    facts |= {name: str(path) for name, path in {**inputs.parents, "data": inputs.data}.items()} | {
        "trains": f"LoRA of rank {lora.rank}" if lora else "all weights",
        "steps": settings.steps,
        "global batch": settings.global_batch,
        "learning rate": settings.optimizer.lr,
        "continues from": newest(inputs.directory / "checkpoints") or "the start",
        "result": inputs.finished,
    }
    print_dry_run(command.verb, facts, needs, as_json=command.as_json)


def _in_words(values: Mapping[str, Any]) -> str:
    shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in values.items() if v is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items()) or "unknown"
