"""The training stages as a table: what each one starts from, what it minimizes, and where its result goes.

``runs.resources`` lists what a stage needs, and where the stages before it left that. ``inputs`` turns the
list into paths and loads nothing; ``train.prepare`` turns inputs into a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor

from anyflow_cli.data.published import recognize
from anyflow_cli.data.shards import read_manifest
from anyflow_cli.errors import UsageError
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.pipeline_io import (
    absolute_model,
    has_components,
    load_adapter,
    resolve_pipeline,
    with_components,
    without_loras,
)
from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import is_checkpoint
from anyflow_cli.runs.lineage import RunInputs, read_lineage, run_of
from anyflow_cli.runs.open import locate
from anyflow_cli.runs.paths import ADAPTER_FOLDER, LINEAGE, MODEL, RunPaths
from anyflow_cli.train.preview import PreviewSettings


class Stage(NamedTuple):
    """One training command.

    Attributes:
        inputs: Finds paths and checks them, from the places of what the stage starts from, by name
            (``runs.resources``).
        directory: Directory of the run; the finished model is ``model`` in it, an adapter ``adapter``.
        preview: How the student is sampled for previews.
    """

    inputs: Callable[[schema.Recipe, RunPaths, Mapping[str, str]], RunInputs]
    directory: Callable[[schema.Recipe, RunPaths], Path]
    preview: Callable[[schema.Recipe], PreviewSettings]


def training_section(recipe: schema.Recipe, section: str) -> schema.TrainingSection:
    """The recipe's settings of a stage."""
    return cast("schema.TrainingSection", getattr(recipe, section))


# --- train-flowmap: stage 1, its baselines, and the tuning of the teacher


def flowmap_inputs(recipe: schema.Recipe, paths: RunPaths, found: Mapping[str, str]) -> RunInputs:
    """The teacher, and a data set."""
    data = _data_set(found)  # first, so that it is read before a teacher is downloaded
    teacher = resolve_pipeline(found["teacher"])
    directory = STAGES["train_flowmap"].directory(recipe, paths)
    components = _components(recipe, teacher)
    return RunInputs(directory, "train_flowmap", data, {"teacher": teacher}, teacher, components)


def _flowmap_preview(recipe: schema.Recipe) -> PreviewSettings:
    student = PreviewSettings("flow-map", recipe.sample.nfe, recipe.train_flowmap.preview_prompts)
    match recipe.train_flowmap.objective:
        case "flow-map":
            return student
        case "consistency-ode":
            return replace(student, method="consistency")
        case "flow-matching":
            scale = recipe.sample.teacher_guidance
            guidance = None if scale == 1 else scale
            return replace(student, method="euler", nfe=(recipe.sample.teacher_steps,), guidance=guidance)


# --- distill: stage 2


def distill_inputs(recipe: schema.Recipe, paths: RunPaths, found: Mapping[str, str]) -> RunInputs:
    """The student of stage 1 and, as real score, the tuned teacher or, without one, the teacher.

    All roles share the teacher as the base of their adapters where student and real score are adapters of it.
    """
    data, start = _data_set(found), locate(found["stage-1 model"])
    teacher = resolve_pipeline(found["teacher"])
    real = locate(found["tuned teacher"]) if "tuned teacher" in found else teacher
    directory = STAGES["distill"].directory(recipe, paths)
    shared = adapter_on_teacher(recipe, start) and (real == teacher or adapter_on_teacher(recipe, real))
    base = teacher if shared and not _began_on(directory, start) else _base_of(recipe, start)
    parents = {"start": start, "real score": real, "teacher": teacher}
    return RunInputs(directory, "distill", data, parents, base, _components(recipe, base))


def _began_on(directory: Path, base: Path) -> bool:
    """Whether an existing run stores its weights relative to this base; it has to go on with it."""
    return (directory / LINEAGE).is_file() and Path(read_lineage(directory).base) == absolute_model(base)


def _distill_preview(recipe: schema.Recipe) -> PreviewSettings:
    simulation, prompts = recipe.distill.simulation, recipe.distill.preview_prompts
    return PreviewSettings(
        "consistency" if simulation == "consistency" else "flow-map", recipe.sample.nfe, prompts
    )


# --- finetune: flow-map training of any any-step model on other data


def finetune_inputs(recipe: schema.Recipe, paths: RunPaths, found: Mapping[str, str]) -> RunInputs:
    """An any-step model, and a data set of the user's videos."""
    data, start = _data_set(found), locate(found["any-step model"])
    directory = STAGES["finetune"].directory(recipe, paths)
    base = _base_of(recipe, start)
    return RunInputs(directory, "finetune", data, {"start": start}, base, _components(recipe, base))


STAGES = {
    "train_flowmap": Stage(
        inputs=flowmap_inputs,
        directory=lambda recipe, paths: paths.stage_1(recipe.train_flowmap.objective),
        preview=_flowmap_preview,
    ),
    "distill": Stage(
        inputs=distill_inputs,
        directory=lambda recipe, paths: paths.stage_2(recipe.distill.simulation),
        preview=_distill_preview,
    ),
    "finetune": Stage(
        inputs=finetune_inputs,
        directory=lambda recipe, paths: paths.finetune,
        preview=lambda recipe: PreviewSettings(
            "flow-map", recipe.sample.nfe, recipe.finetune.preview_prompts
        ),
    ),
}


# --- what several stages look for


def _data_set(found: Mapping[str, str]) -> str | Path:
    address = found["data set"]
    if recognize(address) is None:
        read_manifest(address)
    return address if "://" in address else Path(address)


def _components(recipe: schema.Recipe, base: Path) -> Path | None:
    """Folder with the VAE, the text encoder and the tokenizer, for a base that has none."""
    if has_components(base):
        return None
    return with_components(base, recipe.model.components or recipe.model.teacher)


def _base_of(recipe: schema.Recipe, start: Path) -> Path:
    """The pipeline folder behind a model; an adapter needs one with the very weights that it starts from."""
    checkpoint = without_loras(start)
    if not is_checkpoint(checkpoint):
        return start
    if start != checkpoint:
        raise UsageError(
            f"LoRA files cannot be merged into the checkpoint {checkpoint} where training starts.",
            f"Make a model of both first: `anyflow export --model {start} --out DIR`.",
        )
    if recipe.model.lora is not None:
        raise UsageError(
            f"Adapters cannot be trained on the checkpoint {start}.",
            f"Export it as a model first: `anyflow export --model {start}`.",
        )
    return run_of(start).base


def adapter_on_teacher(recipe: schema.Recipe, model: Path) -> dict[str, Tensor] | None:
    """The adapter that a run left beside its finished model, if it fits the teacher and the recipe's rank."""
    folder = model.parent / ADAPTER_FOLDER
    if recipe.model.lora is None or model.name != MODEL or not folder.is_dir():
        return None
    adapter = load_adapter(folder)
    size = LoraSize(recipe.model.lora.rank, recipe.model.lora.alpha)
    teacher = absolute_model(resolve_pipeline(recipe.model.teacher))
    is_of_teacher = absolute_model(Path(adapter.base)) == teacher
    return adapter.weights if adapter.size == size and is_of_teacher else None
