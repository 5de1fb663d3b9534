"""VBench itself, in its own environment, through our worker. Slow; skipped where there is no environment.

temporal_flickering needs no weights and is the real thing. The others run on random weights of the right
architecture: the whole path is VBench's own, the numbers mean nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anyflow_cli.cli import app
from anyflow_cli.data.video import ClipFormat, read_clip, write_mp4
from anyflow_cli.evaluate.suite import SuiteClip, VideoScore
from anyflow_cli.evaluate.vbench import assess
from anyflow_cli.evaluate.vbench.environment import Environment, is_there, open_environment, place
from anyflow_cli.evaluate.vbench.prompts import Question
from anyflow_cli.evaluate.vbench.suite import VBenchSuite
from anyflow_cli.evaluate.vbench.worker_pool import WORKER
from tests.evaluate.drawn import drawn

PLACE = place(None)
MEANINGLESS = ("motion_smoothness", "dynamic_degree", "imaging_quality", "human_action")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_there(PLACE), reason=f"no VBench in {PLACE}: `anyflow doctor --fix vbench`"),
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def environment() -> Environment:
    return open_environment(PLACE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, environment: Environment) -> Path:
    """Random ones."""
    directory = tmp_path_factory.mktemp("weights")
    script = Path(__file__).with_name("random_weights.py")
    paths = os.environ | {"PYTHONPATH": str(WORKER.parent)}
    subprocess.run([environment.python, script, directory], check=True, env=paths)
    return directory


def question(number: int, prompt: str, *dimensions: str) -> Question:
    return Question(number, prompt, prompt, ({"prompt_en": prompt, "dimension": list(dimensions)},))


def clips_in(directory: Path, question: int, count: int) -> list[SuiteClip]:
    found = []
    for k in range(count):
        path = directory / f"any name {question} {k}.mp4"
        write_mp4(path, drawn(question * 10 + k, 50)[:9], 16)
        found.append(SuiteClip(question, path, VideoScore({})))
    return found


def suite_of(environment: Environment, weights: Path, *questions: Question) -> VBenchSuite:
    only = tuple({name for question in questions for name in question.dimensions})
    return VBenchSuite("vbench", questions, environment, weights, only)


def test_flickering_is_the_benchmarks_own_number(environment: Environment, tmp_path: Path) -> None:
    asked = [question(0, "a bench", "temporal_flickering"), question(4, "a tree", "temporal_flickering")]
    clips = clips_in(tmp_path, 0, 2) + clips_in(tmp_path, 4, 1)
    found = suite_of(environment, tmp_path / "none", *asked).assess(clips, tmp_path)
    pixels = [read_clip(clip.path, ClipFormat(9, 16, 64, 64)).pixels.astype(float) for clip in clips]
    by_hand = [1 - np.abs(np.diff(video, axis=0)).mean() / 255 for video in pixels]
    assert [s.scores["temporal_flickering"] for s in found.scores] == pytest.approx(by_hand, abs=2e-3)
    assert found.raw["temporal_flickering"] == pytest.approx(
        np.mean([s.scores["temporal_flickering"] for s in found.scores])
    )
    assert len(found.missing) == 15
    assert found.notes["vbench"]["vbench"] == "0.1.5"


def test_dimensions_with_weights_run_their_own_code(
    environment: Environment, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        question(0, "a bench", *MEANINGLESS[:3]),
        question(1, "A person is riding a bike", "human_action"),
    ]
    clips = clips_in(tmp_path, 0, 2) + clips_in(tmp_path, 1, 1)
    suite = suite_of(environment, weights, *asked)
    found = suite.assess(clips, tmp_path)
    assert set(found.raw) == set(MEANINGLESS), found.missing
    assert all(np.isfinite(value) for value in found.raw.values())
    assert set(found.scores[0].scores) == set(MEANINGLESS[:3])
    assert set(found.scores[2].scores) == {"human_action"}
    imaging = np.mean([score.scores["imaging_quality"] for score in found.scores[:2]])
    assert found.raw["imaging_quality"] == pytest.approx(imaging)  # a fraction, as the benchmark sums it
    assert found.deviations == ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth is not the published file",)

    monkeypatch.setattr(
        assess, "run_jobs", lambda python, jobs, *rest: None if not jobs else pytest.fail("again")
    )
    assert suite.assess(clips, tmp_path).raw == found.raw


def test_of_many_videos_flickering_scores_the_static_ones(
    environment: Environment, weights: Path, tmp_path: Path
) -> None:
    asked = question(0, "a bench", "temporal_flickering")
    clips = clips_in(tmp_path, 0, 6)
    found = suite_of(environment, weights, asked).assess(clips, tmp_path)
    static = json.loads((tmp_path / "vbench" / "static_filter.json").read_text())["videos"]
    assert len(static) == 6
    scored = sum("temporal_flickering" in score.scores for score in found.scores)
    assert scored == min(5, sum(static))
    assert found.notes["static filter"] is True


def test_a_video_that_cannot_be_read_is_named(environment: Environment, tmp_path: Path) -> None:
    clips = clips_in(tmp_path, 0, 2)
    clips[1].path.write_bytes(b"no video")
    asked = question(0, "a bench", "temporal_flickering")  # VBench leaves it out without a word
    found = suite_of(environment, tmp_path / "none", asked).assess(clips, tmp_path)
    assert found.raw == {}
    assert "VBench skipped 1 of 2 videos" in found.missing["temporal_flickering"]
    assert "Traceback" in (tmp_path / "vbench" / "temporal_flickering.error.txt").read_text()


def test_the_whole_way_from_a_directory_to_a_report(
    environment: Environment, tmp_path: Path, capsys: Capture
) -> None:
    lines = json.loads(environment.full_info.read_text())
    prompts = [line["prompt_en"] for line in lines if "temporal_flickering" in line["dimension"]]
    for number, prompt in enumerate(prompts[:3]):
        write_mp4(tmp_path / "videos" / f"{prompt}-0.mp4", drawn(number, 50)[:9], 16)
    settings = {"evaluate.samples": 1, "evaluate.vbench.dimensions": "[temporal_flickering]"}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["evaluate", "--suite", "vbench", "--videos", str(tmp_path / "videos"), *given]
    command += ["--export", str(tmp_path / "board")]
    assert app.main([*command, "--runs", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (scores,) = found["scores"]
    assert 90 < scores["dimensions"]["temporal_flickering"] < 100
    assert scores["total"] is None
    assert scores["missing"]["scene"] == "not asked for"
    assert found["card"]["comparable"] is False
    assert "72 prompts or videos" in found["card"]["deviations"][1]
    assert Path(found["files"]["report.html"]).is_file()
    assert "AnyFlow-FAR-Wan2.1-14B" in Path(found["files"]["report.html"]).read_text()
    board = tmp_path / "board" / "given-videos"
    assert (board / "videos" / f"{prompts[0]}-0.mp4").is_file()
    assert json.loads((tmp_path / "board" / "protocol.json").read_text())["comparable"] is False
    score, videos = json.loads((board / "given-videos_eval_results.json").read_text())["temporal_flickering"]
    assert score == pytest.approx(np.mean([one["video_results"] for one in videos]))
    assert {one["video_path"] for one in videos} == {f"{prompt}-0.mp4" for prompt in prompts[:3]}


def test_what_vbench_says_of_itself(environment: Environment) -> None:
    known: dict[str, Any] = environment.versions
    assert known["vbench"] == "0.1.5"
    assert len(json.loads(environment.full_info.read_text())) == 946
