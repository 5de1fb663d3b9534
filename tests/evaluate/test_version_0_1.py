"""Evaluations that version 0.1 wrote: found again, read, compared, and replaced by the same scores.

The fixture is what 0.1 left after ``evaluate(make_job(root, prompts=5), Drawn().open)`` of its own
``tests/evaluate/drawn.py`` and ``write_results``, without the page and the figure.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.evaluate.compare import compare, read_side
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import RENAMED_KEYS
from anyflow_cli.evaluate.report.page import write_results
from anyflow_cli.evaluate.results import read_results
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.evaluate.shapes.suite import EDGE_FIDELITY
from anyflow_cli.evaluate.store import RESULTS
from tests.evaluate.drawn import CAPTIONED, drawn, make_job

FIXTURE = Path(__file__).parents[1] / "fixtures" / "v0.1-evaluation"


@pytest.fixture
def job(tmp_path: Path) -> EvaluationJob:
    shutil.copytree(FIXTURE, tmp_path / "old")
    return make_job(tmp_path / "old", prompts=5)


def renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED_KEYS.get(key, key): renamed(inner) for key, inner in value.items() if key != "model"}
    return value


def test_its_videos_and_scores_are_reused_unchanged(job: EvaluationJob) -> None:
    old = json.loads((job.out / RESULTS).read_text())
    found = run_evaluation(job, lambda of, recipe: pytest.fail("a model was loaded"))
    write_results(found, job.protocol.suite, job.out)
    new = json.loads((job.out / RESULTS).read_text())
    figures = [entry.pop("figures") for entry in new["scores"]]
    assert figures == [{EDGE_FIDELITY: None}] * 3  # which 0.1 did not measure
    assert [renamed(entry) for entry in old["scores"]] == [renamed(entry) for entry in new["scores"]]
    assert new["trend"]["interval"] == old["trend"]["interval"]


def test_its_card_is_read_with_the_keys_of_today(job: EvaluationJob) -> None:
    card = read_results(job.out / RESULTS).card
    assert (card.suite_version, card.samples_per_prompt, card.seeds) == (2, 1, (7, 11))
    teacher = card.models["teacher-5x2-1d23b77050c7"]
    assert teacher.reason == "the teacher of recipe test"
    assert teacher.negative_prompt == job.recipe.model.negative_prompt
    assert teacher.text_tokens == 512


def test_it_is_compared_with_an_evaluation_of_today(job: EvaluationJob, tmp_path: Path) -> None:
    old = read_side(job.out)
    found = run_evaluation(job, lambda of, recipe: pytest.fail("a model was loaded"))
    write_results(found, job.protocol.suite, job.out)
    differences = compare(job.protocol.suite, old, read_side(job.out)).differences
    assert [(one.steps, one.change) for one in differences] == [(1, 0.0), (2, 0.0)]


def test_pixels_still_have_the_scores_it_recorded(job: EvaluationJob) -> None:
    for one in job.variants:
        for (prompt, _), record in job.store(one).records().items():
            (again,) = job.protocol.suite.score([drawn(CAPTIONED[prompt], one.steps)], [prompt])
            assert again.scores == pytest.approx(record.score.scores, rel=1e-9)
            assert again.right == record.score.right
            assert again.features == pytest.approx(record.score.features, rel=1e-9)
