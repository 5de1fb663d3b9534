"""Names of directories: as documented, one for every objective, and which model is taken."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from anyflow_cli.recipe.schema import DistillSection, TrainFlowMapSection
from anyflow_cli.runs.paths import STAGE_1, STAGE_2, RunPaths

PATHS = RunPaths(Path("runs"), "tiny")


def test_directories_are_the_documented_ones() -> None:
    found = [PATHS.data, PATHS.stage_1(), PATHS.stage_2(), PATHS.finetune, PATHS.samples, PATHS.evaluate]
    names = ["data", "train-flowmap", "distill", "finetune", "samples", "evaluate"]
    assert found == [Path("runs/tiny") / name for name in names]


def test_every_objective_and_simulation_has_a_directory_of_its_own() -> None:
    objectives = get_args(TrainFlowMapSection.model_fields["objective"].annotation)
    simulations = get_args(DistillSection.model_fields["simulation"].annotation)
    assert set(objectives) == set(STAGE_1)
    assert set(simulations) == set(STAGE_2)
    assert len({*map(PATHS.stage_1, objectives), *map(PATHS.stage_2, simulations)}) == 6
