"""VBench itself, in its own environment, through our worker. Slow; skipped without an environment.

temporal_flickering needs no weights, so its scores are real. The others run with random weights of the right
architecture: the code is VBench's, the numbers are meaningless.
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
from anyflow_cli.evaluate.suite import Assessment, ScoringNotes, SuiteClip, VideoScore
from anyflow_cli.evaluate.vbench import suite as vbench_suite
from anyflow_cli.evaluate.vbench.environment import (
    SETUP_COMMAND,
    Environment,
    environment_directory,
    is_created,
    open_environment,
)
from anyflow_cli.evaluate.vbench.prompts import BenchmarkPrompt
from anyflow_cli.evaluate.vbench.suite import VBenchSuite
from anyflow_cli.evaluate.vbench.worker_pool import WORKER
from tests.evaluate.drawn import drawn

PLACE = environment_directory(None)
MEANINGLESS = ("motion_smoothness", "dynamic_degree", "imaging_quality", "human_action")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_created(PLACE), reason=f"no VBench in {PLACE}: `{SETUP_COMMAND}`"),
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def environment() -> Environment:
    return open_environment(PLACE)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, environment: Environment) -> Path:
    """A directory of random weights."""
    directory = tmp_path_factory.mktemp("weights")
    script = Path(__file__).with_name("random_weights.py")
    paths = os.environ | {"PYTHONPATH": str(WORKER.parent)}
    subprocess.run([environment.python, script, directory], check=True, env=paths)
    return directory


def prompt_of(number: int, prompt: str, *dimensions: str) -> BenchmarkPrompt:
    return BenchmarkPrompt(number, prompt, prompt, ({"prompt_en": prompt, "dimension": list(dimensions)},))


def clips_in(directory: Path, number: int, count: int) -> list[SuiteClip]:
    found = []
    for k in range(count):
        path = directory / f"any name {number} {k}.mp4"
        write_mp4(path, drawn(number * 10 + k, 50)[:9], 16)
        found.append(SuiteClip(number, path, VideoScore({})))
    return found


def notes_of(found: Assessment) -> ScoringNotes:
    assert found.notes is not None
    return found.notes


def suite_of(environment: Environment, weights: Path, *prompts: BenchmarkPrompt) -> VBenchSuite:
    only = tuple({name for prompt in prompts for name in prompt.dimensions})
    return VBenchSuite("vbench", prompts, environment, weights, only)


def test_flickering_is_the_benchmarks_own_score(environment: Environment, tmp_path: Path) -> None:
    asked = [prompt_of(0, "a bench", "temporal_flickering"), prompt_of(4, "a tree", "temporal_flickering")]
    clips = clips_in(tmp_path, 0, 2) + clips_in(tmp_path, 4, 1)
    found = suite_of(environment, tmp_path / "none", *asked).assess(clips, tmp_path)
    pixels = [read_clip(clip.path, ClipFormat(9, 16, 64, 64)).pixels.astype(float) for clip in clips]
    by_hand = [1 - np.abs(np.diff(video, axis=0)).mean() / 255 for video in pixels]
    assert [s.scores["temporal_flickering"] for s in found.scores] == pytest.approx(by_hand, abs=2e-3)
    assert found.raw["temporal_flickering"] == pytest.approx(
        np.mean([s.scores["temporal_flickering"] for s in found.scores])
    )
    assert len(found.missing) == 15
    assert notes_of(found).vbench["vbench"] == "0.1.5"


def test_dimensions_with_weights_run_their_own_code(
    environment: Environment, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [
        prompt_of(0, "a bench", *MEANINGLESS[:3]),
        prompt_of(1, "A person is riding a bike", "human_action"),
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
        vbench_suite, "run_jobs", lambda python, jobs, *rest: None if not jobs else pytest.fail("again")
    )
    assert suite.assess(clips, tmp_path).raw == found.raw


def test_of_many_videos_flickering_scores_the_static_ones(
    environment: Environment, weights: Path, tmp_path: Path
) -> None:
    asked = prompt_of(0, "a bench", "temporal_flickering")
    clips = clips_in(tmp_path, 0, 6)
    found = suite_of(environment, weights, asked).assess(clips, tmp_path)
    static = json.loads((tmp_path / "vbench" / "static_filter.json").read_text())["videos"]
    assert len(static) == 6
    scored = sum("temporal_flickering" in score.scores for score in found.scores)
    assert scored == min(5, sum(static))
    assert notes_of(found).static_filter


def test_an_unreadable_video_is_named(environment: Environment, tmp_path: Path) -> None:
    clips = clips_in(tmp_path, 0, 2)
    clips[1].path.write_bytes(b"no video")
    asked = prompt_of(0, "a bench", "temporal_flickering")  # VBench omits it silently
    found = suite_of(environment, tmp_path / "none", asked).assess(clips, tmp_path)
    assert found.raw == {}
    assert "VBench skipped 1 of 2 videos" in found.missing["temporal_flickering"]
    assert "Traceback" in (tmp_path / "vbench" / "temporal_flickering.error.txt").read_text()


def test_from_a_directory_of_videos_to_a_report(
    environment: Environment, tmp_path: Path, capsys: Capture
) -> None:
    lines = json.loads(environment.full_info.read_text())
    prompts = [line["prompt_en"] for line in lines if "temporal_flickering" in line["dimension"]]
    for number, prompt in enumerate(prompts[:3]):
        write_mp4(tmp_path / "videos" / f"{prompt}-0.mp4", drawn(number, 50)[:9], 16)
    settings = {"evaluate.samples": 1, "evaluate.vbench.dimensions": "[temporal_flickering]"}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["evaluate", "--suite", "vbench", "--videos", str(tmp_path / "videos"), *options]
    command += ["--export", str(tmp_path / "board")]
    assert app.main([*command, "--runs", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (scores,) = found["scores"]
    assert 90 < scores["dimensions"]["temporal_flickering"] < 100
    assert scores["total"] is None
    assert scores["missing"]["scene"] == "not requested"
    assert found["card"]["comparable"] is False
    assert "72 prompts or videos" in found["card"]["deviations"][1]
    assert Path(found["files"]["report.html"]).is_file()
    assert "AnyFlow-FAR-Wan2.1-14B" in Path(found["files"]["report.html"]).read_text()
    board = tmp_path / "board" / "external-videos"
    assert (board / "videos" / f"{prompts[0]}-0.mp4").is_file()
    assert json.loads((tmp_path / "board" / "protocol.json").read_text())["comparable"] is False
    score, videos = json.loads((board / "external-videos_eval_results.json").read_text())[
        "temporal_flickering"
    ]
    assert score == pytest.approx(np.mean([one["video_results"] for one in videos]))
    assert {one["video_path"] for one in videos} == {f"{prompt}-0.mp4" for prompt in prompts[:3]}


def test_the_environment_is_described(environment: Environment) -> None:
    known: dict[str, Any] = environment.versions
    assert known["vbench"] == "0.1.5"
    assert len(json.loads(environment.full_info.read_text())) == 946
