"""VBench as a suite, with stand-ins for its workers: jobs, unavailable dimensions, reuse of answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from anyflow_cli.data.video import ClipFormat
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate import registry
from anyflow_cli.evaluate.registry import protocol_for
from anyflow_cli.evaluate.suite import SuiteClip, VideoScore, result_of
from anyflow_cli.evaluate.vbench import suite as vbench_suite
from anyflow_cli.evaluate.vbench.dimensions import FLICKERING
from anyflow_cli.evaluate.vbench.environment import (
    SETUP_COMMAND,
    find_python,
    offline_setup,
    open_environment,
)
from anyflow_cli.evaluate.vbench.prompts import BenchmarkPrompt
from anyflow_cli.evaluate.vbench.suite import VBenchSuite
from anyflow_cli.evaluate.vbench.worker_pool import JobFailure
from anyflow_cli.recipe.schema import EvaluateSection, ModelSection, Recipe
from tests.evaluate.vbench.stand_in import Answers, environment, with_weights


def prompt_of(number: int, *dimensions: str, **more: Any) -> BenchmarkPrompt:
    prompt = f"prompt {number}"
    return BenchmarkPrompt(
        number, prompt, prompt, ({"prompt_en": prompt, "dimension": list(dimensions), **more},)
    )


Workers = Callable[..., Answers]
Lines = list[dict[str, Any]]


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answers]:
    def install(**values: Any) -> Answers:
        answers = Answers(**values)
        monkeypatch.setattr(vbench_suite, "run_jobs", answers)
        return answers

    return install


def clips(directory: Path, number: int, count: int) -> list[SuiteClip]:
    paths = [directory / f"{number}-{k}.mp4" for k in range(count)]
    for path in paths:
        path.write_text("video")
    return [SuiteClip(number, path, VideoScore({})) for path in paths]


def test_a_dimension_that_cannot_run_names_what_it_needs(tmp_path: Path) -> None:
    suite = VBenchSuite("vbench", (), environment(tmp_path), with_weights(tmp_path / "w", "dynamic_degree"))
    reasons = suite.unavailable()
    assert FLICKERING not in reasons
    assert "dynamic_degree" not in reasons
    assert reasons["motion_smoothness"] == "needs amt_model/amt-s.pth"
    assert "detectron2" in reasons["color"]
    assert (
        "detectron2"
        not in VBenchSuite("vbench", (), environment(tmp_path, ("detectron2",)), tmp_path).unavailable()[
            "color"
        ]
    )
    i2v = VBenchSuite("vbench-i2v", (), environment(tmp_path), tmp_path).unavailable()
    assert "images" in i2v["i2v_subject"]
    assert "dino_model" in i2v["subject_consistency"]


def test_each_dimension_scores_its_own_videos(tmp_path: Path, workers: Callable[..., Answers]) -> None:
    answers = workers(**{FLICKERING: [0.9, 0.7], "imaging_quality": [40.0, 60.0]})
    weights = with_weights(tmp_path / "w", "imaging_quality")
    both = (prompt_of(3, FLICKERING), prompt_of(8, "imaging_quality"))
    suite = VBenchSuite("vbench", both, environment(tmp_path), weights)
    found = suite.assess(clips(tmp_path, 3, 2) + clips(tmp_path, 8, 2), tmp_path)
    assert dict(answers.asked) == {
        FLICKERING: ["3-0.mp4", "3-1.mp4"],
        "imaging_quality": ["8-0.mp4", "8-1.mp4"],
    }
    assert [score.scores for score in found.scores] == [
        {FLICKERING: 0.9}, {FLICKERING: 0.7}, {"imaging_quality": 0.4}, {"imaging_quality": 0.6},
    ]  # fmt: skip
    result = result_of(suite, found)
    assert result.total is None
    assert result.dimensions[FLICKERING] == pytest.approx(100 * (0.8 - 0.6293) / (1 - 0.6293))
    assert result.reasons["scene"].startswith("needs caption_model/")


def test_answers_are_reused_until_something_changes(tmp_path: Path, workers: Callable[..., Answers]) -> None:
    weights = with_weights(tmp_path / "w", "dynamic_degree")
    suite = VBenchSuite(
        "vbench", (prompt_of(0, FLICKERING, "dynamic_degree"),), environment(tmp_path), weights
    )
    made = clips(tmp_path, 0, 2)
    first = workers(**{FLICKERING: [0.9, 0.7], "dynamic_degree": JobFailure("it crashed", "Traceback ...")})
    found = suite.assess(made, tmp_path)
    assert found.missing["dynamic_degree"] == "it crashed"
    assert "Traceback ..." in (tmp_path / "vbench" / "dynamic_degree.error.txt").read_text()
    second = workers()
    again = suite.assess(made, tmp_path)
    assert [name for name, _ in first.asked] == [FLICKERING, "dynamic_degree"]
    assert [name for name, _ in second.asked] == ["dynamic_degree"]  # a failed dimension is retried
    assert again.raw[FLICKERING] == found.raw[FLICKERING] == pytest.approx(0.8)
    assert not (tmp_path / "vbench" / "dynamic_degree.error.txt").exists()
    made[1].path.write_text("another video")
    third = workers()
    suite.assess(made, tmp_path)
    assert [name for name, _ in third.asked] == [FLICKERING, "dynamic_degree"]
    (weights / "raft_model/models/raft-things.pth").write_text("other weights")
    fourth = workers()
    suite.assess(made, tmp_path)
    assert [name for name, _ in fourth.asked] == ["dynamic_degree"]


def test_of_twenty_five_videos_the_first_five_static_ones_count(
    tmp_path: Path, workers: Callable[..., Answers]
) -> None:
    static = [float(k % 2) for k in range(25)]
    answers = workers(static_filter=static)
    weights = with_weights(tmp_path / "w", "static_filter")
    suite = VBenchSuite("vbench", (prompt_of(0, FLICKERING),), environment(tmp_path), weights)
    found = suite.assess(clips(tmp_path, 0, 25), tmp_path)
    assert answers.asked[1] == (FLICKERING, [f"0-{k}.mp4" for k in (1, 3, 5, 7, 9)])
    assert sum(FLICKERING in score.scores for score in found.scores) == 5
    blind = VBenchSuite("vbench", (prompt_of(0, FLICKERING),), environment(tmp_path), tmp_path / "none")
    lost = blind.assess(clips(tmp_path, 0, 25), tmp_path)
    assert lost.missing[FLICKERING] == "its static filter needs raft_model/models/raft-things.pth"


def test_a_video_that_color_skips_is_left_out(tmp_path: Path, workers: Callable[..., Answers]) -> None:
    weights = with_weights(tmp_path / "w", "color")
    suite = VBenchSuite("vbench", (prompt_of(0, "color"),), environment(tmp_path), weights)
    suite = replace(suite, environment=environment(tmp_path, ("detectron2",)))
    made = clips(tmp_path, 0, 3)
    answers = workers(color=[1.0, None, 0.5])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anyflow_cli.evaluate.vbench.weights.cached_snapshot", lambda name, file: Path(name))
        found, again = suite.assess(made, tmp_path), suite.assess(made, tmp_path)
    assert [score.scores for score in found.scores] == [{"color": 1.0}, {}, {"color": 0.5}]
    assert found.raw == {"color": 0.75}
    assert (again.scores, again.raw, len(answers.asked)) == (found.scores, found.raw, 1)


def test_weights_other_than_the_published_ones_are_a_deviation(
    tmp_path: Path, workers: Callable[..., Answers]
) -> None:
    workers()
    weights = with_weights(tmp_path / "w", "background_consistency", "dynamic_degree")
    suite = VBenchSuite(
        "vbench", (prompt_of(0, "background_consistency", "dynamic_degree"),), environment(tmp_path), weights
    )
    found = suite.assess(clips(tmp_path, 0, 1), tmp_path)
    assert found.deviations == ("clip_model/ViT-B-32.pt is not the published file",)


def make_recipe(tmp_path: Path, suite: str = "vbench", **vbench: Any) -> Recipe:
    evaluate = EvaluateSection.model_validate({"suite": suite, "seed": 100, "vbench": vbench})
    return Recipe(name="t", model=ModelSection(frames=9, height=64, width=64), evaluate=evaluate)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    lines = [{"prompt_en": f"p{n}", "dimension": [FLICKERING if n < 2 else "scene"]} for n in range(4)]
    (tmp_path / "full_info.json").write_text(json.dumps(lines))
    monkeypatch.setattr(registry, "open_environment", lambda directory: environment(tmp_path))
    return lines


def test_the_protocol_is_the_benchmarks(tmp_path: Path, installed: Lines) -> None:
    protocol = protocol_for(make_recipe(tmp_path))
    assert protocol.deviations == ()
    assert [len([i for i in protocol.requests if i.number == n]) for n in range(4)] == [25, 25, 5, 5]
    assert len({item.seed for item in protocol.requests}) == 60
    assert [item.seed for item in protocol.requests if item.number == 2] == [110, 111, 112, 113, 114]
    five = protocol_for(make_recipe(tmp_path, flickering=5))
    assert [item.seed for item in five.requests] == list(range(100, 120))
    assert {(i.prompt, i.seed) for i in five.requests} < {(i.prompt, i.seed) for i in protocol.requests}


def test_a_limit_and_another_number_of_videos_are_deviations(
    tmp_path: Path, installed: list[dict[str, Any]]
) -> None:
    some = protocol_for(make_recipe(tmp_path, flickering=5), limit=2)
    assert some.deviations == ("only 2 of 4 prompts",)
    everything = protocol_for(make_recipe(tmp_path, flickering=5))
    assert {(i.prompt, i.seed, i.number) for i in some.requests} < {
        (i.prompt, i.seed, i.number) for i in everything.requests
    }
    recipe = make_recipe(tmp_path)
    one = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"samples": 1})})
    assert protocol_for(one).deviations == ("1 instead of 5 videos per prompt",)
    assert len(protocol_for(one).requests) == 4
    with pytest.raises(UsageError, match="has its own prompts"):
        protocol_for(recipe, tmp_path / "mine.txt")
    with pytest.raises(UsageError, match="does not have the dimension scenery"):
        protocol_for(make_recipe(tmp_path, dimensions=("scenery",)))


def test_image_to_video_is_conditioned_on_its_images(tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    Image.new("RGB", (70, 40), "red").save(tmp_path / "crops" / "cup.png")
    cup = prompt_of(0, "i2v_subject", image_name="cup.png")
    shape = ClipFormat(1, 16, 64, 64)
    suite = VBenchSuite(
        "vbench-i2v",
        (cup,),
        environment(tmp_path),
        tmp_path,
        images_directory=tmp_path / "crops",
        image_format=shape,
    )
    suite.check(ModelSection())
    (image,) = suite.images(["prompt 0"], [0]) or []
    assert image.shape == (64, 64, 3)
    assert image[0, 0].tolist() == [255, 0, 0]
    none = VBenchSuite("vbench-i2v", (cup,), environment(tmp_path), tmp_path)
    with pytest.raises(UsageError, match="conditions each video on an image"):
        none.check(ModelSection())
    with pytest.raises(UsageError, match="1 of 1 images"):
        VBenchSuite("vbench-i2v", (cup,), environment(tmp_path), tmp_path, images_directory=tmp_path).check(
            ModelSection()
        )


def test_the_user_provides_the_prompts_of_image_to_video(tmp_path: Path, installed: Lines) -> None:
    with pytest.raises(AnyflowError, match=r"lacks the prompts of VBench-I2V"):
        protocol_for(make_recipe(tmp_path, "vbench-i2v"))
    named = make_recipe(tmp_path, "vbench-i2v", full_info=str(tmp_path / "full_info.json"))
    assert len(protocol_for(named).requests) == 20  # five of each, flickering or not


def test_a_missing_environment_is_reported_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is none in") as raised:
        open_environment(tmp_path)
    assert SETUP_COMMAND in str(raised.value.hint)
    assert "pip download -r" in offline_setup(tmp_path)
    with pytest.raises(UsageError, match=r"not a Python 3\.8 to 3\.11"):
        find_python("/bin/false")
