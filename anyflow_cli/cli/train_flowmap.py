"""``anyflow train-flowmap``: stage 1, the baselines it is compared with, and the teacher's own tuning."""

from __future__ import annotations

from anyflow_cli.cli import options
from anyflow_cli.cli.train import TrainingCommand, run_training


def train_flowmap(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    objective: options.ObjectiveOption = None,
    lora: options.TeacherLoraOption = None,
    steps: options.StepsOption = None,
    seed: options.SeedOption = None,
    processes: options.ProcessesOption = None,
    assignments: options.SetOption = None,
    runs: options.RunsOption = options.DEFAULT_RUNS,
    dry_run: options.DryRunOption = False,
    as_json: options.JsonOption = False,
    debug: options.DebugOption = False,
) -> None:
    """Stage 1: train the teacher to jump between any two times (forward flow-map training).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    run_training(
        TrainingCommand(
            "train_flowmap", recipe, assignments, runs, steps, seed, processes, dry_run, as_json,
            loras=lora,
            overrides={"--objective": ("train_flowmap.objective", objective)},
            shown={"objective": "objective"},
        )
    )  # fmt: skip
