"""Damaged files of an evaluation: every mutant is read or refused in a sentence, none ends in a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from anyflow_cli.evaluate.compare import compare, read_side
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.report.page import render_page, write_results
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.evaluate.store import EvaluationDirectory
from anyflow_cli.evaluate.suite import SuiteClip, VideoScore
from anyflow_cli.evaluate.vbench.dimensions import FLICKERING
from anyflow_cli.evaluate.vbench.prompts import read_prompts_of
from anyflow_cli.evaluate.vbench.suite import VBenchSuite
from tests.evaluate.drawn import Drawn, make_job
from tests.evaluate.vbench.test_suite_vbench import environment, prompt_of
from tests.mutants import COUNTS, check


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mutants")
    job = make_job(root, nfe=(1,), prompts=2, teacher=False, kind="AnyFlowFAR")
    write_results(run_evaluation(job, Drawn().open), job.protocol.suite, job.out)
    return root


@pytest.fixture
def job(template: Path, tmp_path: Path) -> EvaluationJob:
    shutil.copytree(template, tmp_path / "root")
    return make_job(tmp_path / "root", nfe=(1,), prompts=2, teacher=False, kind="AnyFlowFAR")


@pytest.mark.parametrize("cases", COUNTS)
def test_records(cases: int, job: EvaluationJob, tmp_path: Path) -> None:
    canary = tmp_path / "x"
    canary.write_text("mine")
    file = job.out / job.variants[0].key / "scores.jsonl"

    def use() -> None:
        before = file.read_bytes()
        result = run_evaluation(job, Drawn().open)
        render_page(result, job.protocol.suite)
        compare(job.protocol.suite, *[read_side(job.out)] * 2)
        file.write_bytes(before)  # what was sampled again is not for the next mutant

    check(file, use, cases, seed=1)
    assert canary.read_text() == "mine"


@pytest.mark.parametrize("cases", COUNTS)
def test_results(cases: int, job: EvaluationJob) -> None:
    file = job.out / "results.json"
    check(file, lambda: compare(job.protocol.suite, *[read_side(job.out)] * 2), cases, seed=2)


@pytest.mark.parametrize("cases", COUNTS)
def test_the_marker_of_the_directory(cases: int, tmp_path: Path) -> None:
    directory, reports = EvaluationDirectory(tmp_path), {"scores.md": b"1", "results.json": b"{}"}
    directory.write(reports)
    file = tmp_path / ".anyflow-evaluation.json"

    def use() -> None:
        before = file.read_bytes()
        directory.write(reports)
        file.write_bytes(before)

    check(file, use, cases, seed=3)


@pytest.mark.parametrize("cases", COUNTS)
def test_full_info_files(cases: int, tmp_path: Path) -> None:
    entry = {
        "prompt_en": "a bench",
        "dimension": ["scene"],
        "auxiliary_info": {"scene": "x"},
        "image_name": "a.jpg",
    }
    file = tmp_path / "full_info.json"
    file.write_text(json.dumps([entry, entry | {"prompt_en": "a tree"}]))
    check(file, lambda: read_prompts_of(file), cases, seed=4)


@pytest.mark.parametrize("cases", COUNTS)
def test_augmented_prompts(cases: int, tmp_path: Path) -> None:
    entries = [{"prompt_en": f"p{n}", "dimension": ["scene"]} for n in range(3)]
    (tmp_path / "full_info.json").write_text(json.dumps(entries))
    file = tmp_path / "augmented.json"
    file.write_text(json.dumps([entry | {"aug_prompt_en": "long"} for entry in entries]))
    check(file, lambda: read_prompts_of(tmp_path / "full_info.json", str(file)), cases, seed=5)


@pytest.mark.parametrize("cases", COUNTS)
def test_answers_of_vbench(cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.evaluate.vbench.test_suite_vbench import Answers

    monkeypatch.setattr("anyflow_cli.evaluate.vbench.suite.run_jobs", Answers())
    (tmp_path / "0.mp4").write_text("video")
    suite = VBenchSuite("vbench", (prompt_of(0, FLICKERING),), environment(tmp_path), tmp_path / "none")
    clips = [SuiteClip(0, tmp_path / "0.mp4", VideoScore({}))]
    suite.assess(clips, tmp_path)
    file = tmp_path / "vbench" / f"{FLICKERING}.json"

    def use() -> None:
        before = file.read_bytes()
        suite.assess(clips, tmp_path)
        file.write_bytes(before)

    check(file, use, cases, seed=6)
