"""The time of an evaluation before its first video: every missing video at its own number of evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anyflow_cli.cli import app
from anyflow_cli.cli.evaluate import network_seconds
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.plan.estimate import target_of
from anyflow_cli.plan.hardware import Hardware
from anyflow_cli.plan.steps import sampling_cost
from anyflow_cli.utils.units import GIB
from tests.evaluate.drawn import Drawn, make_job

GPU = Hardware(1, 80 * GIB, peak=1e12, mfu=0.5)


def test_time_is_that_of_all_evaluations_of_the_missing_videos(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1, 2), prompts=4)
    assert network_seconds(job, 1, GPU) is None  # folders without the sizes of a text encoder
    model = job.recipe.model.model_copy(update={"teacher": "tiny"})
    job = replace(job, recipe=job.recipe.model_copy(update={"model": model}))
    target = target_of(job.recipe, GPU)
    one = sampling_cost(target.setup(None, None), job.recipe.evaluate.batch_size).step_flops
    evaluations = 4 * (1 + 2 + 5 * 2)  # the teacher is guided, in 5 steps
    assert network_seconds(job, 1, GPU) == pytest.approx(evaluations * one / 0.5e12, rel=1e-3)
    assert network_seconds(job, 4, GPU) == pytest.approx(evaluations * one / 2e12, rel=1e-3)
    run_evaluation(job, Drawn().open)
    assert network_seconds(job, 1, GPU) == 0


def test_of_a_cpu_nobody_states_the_peak(tmp_path: Path) -> None:
    assert network_seconds(make_job(tmp_path), 1, Hardware(1, GIB, None, is_gpu=False)) is None


def test_a_dry_run_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--dry-run", "--nfe", "4", "--limit", "5", "--runs", str(tmp_path)]
    assert app.main(command) == 0
    assert "not known before the first videos" in capsys.readouterr().out
    monkeypatch.setattr("anyflow_cli.plan.hardware.this_machine", lambda: GPU)
    assert app.main(command) == 0
    assert "s without decoding, at the GPUs' peak" in capsys.readouterr().out
