"""``anyflow distill``: stage 2, on-policy distillation, and the consistency baseline."""

from __future__ import annotations

from anyflow_cli.cli import options
from anyflow_cli.cli.train import TrainingCommand, run_training


def distill(
    recipe: options.RecipeOption = options.DEFAULT_RECIPE,
    simulation: options.SimulationOption = None,
    model: options.InitFromOption = None,
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
    """Stage 2: pull the student's own samples to the teacher's distribution (on-policy distillation).

    The same command continues a run that was stopped, from its newest checkpoint.
    """
    run_training(
        TrainingCommand(
            "distill", recipe, assignments, runs, steps, seed, processes, dry_run, as_json,
            loras=lora,
            overrides={
                "--simulation": ("distill.simulation", simulation), "--model": ("distill.init_from", model),
            },
            shown={"simulation": "simulation", "joint": "joint stage-1 loss"},
        )
    )  # fmt: skip
