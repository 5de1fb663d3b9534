"""External videos: each file is assigned to its prompt or named; an incomplete set is not comparable."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.external_videos import find_videos, prepare_external
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.run import run_evaluation
from tests.evaluate.drawn import drawn, make_job


@pytest.fixture
def job(tmp_path: Path) -> EvaluationJob:
    return make_job(tmp_path, prompts=5, samples=2, teacher=False)


def fill(directory: Path, job: EvaluationJob) -> None:
    """All videos of the protocol under VBench's names."""
    for number, prompt in enumerate(job.protocol.prompts):
        for k in range(job.protocol.samples):
            write_mp4(directory / f"{prompt}-{k}.mp4", drawn(number, 50), 16)


def test_a_complete_directory_is_scored_like_a_model(job: EvaluationJob, tmp_path: Path) -> None:
    fill(tmp_path / "videos", job)
    external = prepare_external(job.recipe, job.protocol, tmp_path / "videos", job.out)
    found = run_evaluation(external)
    assert found.card.comparable is True
    assert found.columns[0].title == "external videos"
    assert found.columns[0].result.videos == 10
    assert (found.columns[0].result.groups["quality"] or 0) > 80
    assert run_evaluation(external).as_json() == found.as_json()
    assert len(list((tmp_path / "videos").iterdir())) == 10


def test_each_fault_is_named_and_makes_the_result_not_comparable(job: EvaluationJob, tmp_path: Path) -> None:
    directory = tmp_path / "videos"
    fill(directory, job)
    first, second, third, *_ = job.protocol.prompts
    (directory / f"{first}-1.mp4").unlink()
    (directory / f"{second}-0.mp4").write_bytes(b"")
    whole = (directory / f"{third}-1.mp4").read_bytes()
    (directory / f"{third}-1.mp4").write_bytes(whole[: len(whole) // 2])
    write_mp4(directory / f"{first}-7.mp4", drawn(0, 50), 16)
    write_mp4(directory / f"{second}-7.mp4", drawn(0, 50), 16)
    write_mp4(directory / "a stranger-0.mp4", drawn(0, 50), 16)
    found = find_videos(directory, job.protocol)
    assert found.missing == ()  # -7 is the second video of the first prompt
    assert found.extra == tuple(sorted(("a stranger-0.mp4", f"{second}-7.mp4")))
    assert [name.partition(" (")[0] for name in found.broken] == [f"{second}-0.mp4", f"{third}-1.mp4"]
    assert "empty" in found.broken[0]
    assert len(found.files) == 8
    evaluation = run_evaluation(prepare_external(job.recipe, job.protocol, directory, job.out))
    assert evaluation.card.comparable is False
    assert "2 prompts or videos" in evaluation.card.deviations[0]
    assert (directory / f"{second}-0.mp4").exists()


def test_missing_videos_are_counted_by_prompt(job: EvaluationJob, tmp_path: Path) -> None:
    fill(tmp_path / "videos", job)
    (tmp_path / "videos" / f"{job.protocol.prompts[1]}-0.mp4").unlink()
    found = find_videos(tmp_path / "videos", job.protocol)
    assert found.missing == (f"{job.protocol.prompts[1]} (1 of 2)",)
    assert found.faults == [f"1 missing: {job.protocol.prompts[1]} (1 of 2)"]


def test_captions_assign_files_of_any_name(job: EvaluationJob, tmp_path: Path) -> None:
    directory = tmp_path / "videos"
    protocol = replace(job.protocol, titles=tuple(f"title {n}" for n in range(5)))
    write_mp4(directory / "x.mp4", drawn(0, 50), 16)
    (directory / "x.txt").write_text("title 0")
    write_mp4(directory / "y.mp4", drawn(1, 50), 16)
    (directory / "y.txt").write_text(protocol.prompts[1])  # the text it was sampled with
    write_mp4(directory / "title 2-0.mp4", drawn(2, 50), 16)
    assert sorted(request.number for request in find_videos(directory, protocol).files) == [0, 1, 2]


def test_a_changed_file_is_scored_again_and_never_deleted(job: EvaluationJob, tmp_path: Path) -> None:
    directory = tmp_path / "videos"
    fill(directory, job)
    before = run_evaluation(prepare_external(job.recipe, job.protocol, directory, job.out))
    path = directory / f"{job.protocol.prompts[0]}-0.mp4"
    write_mp4(path, drawn(0, 1), 16)
    after = run_evaluation(prepare_external(job.recipe, job.protocol, directory, job.out))
    assert after.columns[0].result.dimensions["sharpness"] < before.columns[0].result.dimensions["sharpness"]
    assert path.exists()


def test_a_directory_without_videos_of_the_prompts_is_refused(job: EvaluationJob, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        prepare_external(job.recipe, job.protocol, tmp_path / "videos", job.out)
    write_mp4(tmp_path / "videos" / "nothing.mp4", drawn(0, 50), 16)
    with pytest.raises(UsageError, match="has no readable video of a prompt of shapes"):
        prepare_external(job.recipe, job.protocol, tmp_path / "videos", job.out)


def test_a_video_of_another_size_is_named(job: EvaluationJob, tmp_path: Path) -> None:
    write_mp4(tmp_path / "videos" / f"{job.protocol.prompts[0]}-0.mp4", drawn(0, 50)[:, :32], 16)
    with pytest.raises(UsageError, match="would have to be scaled and cropped"):
        run_evaluation(prepare_external(job.recipe, job.protocol, tmp_path / "videos", job.out))


def test_a_prompt_listed_twice_needs_two_videos(job: EvaluationJob, tmp_path: Path) -> None:
    prompt = job.protocol.prompts[0]
    twice = replace(job.protocol, prompts=(prompt, prompt), samples=1)
    for k in range(2):
        write_mp4(tmp_path / "videos" / f"{prompt}-{k}.mp4", drawn(0, 50), 16)
    found = find_videos(tmp_path / "videos", twice)
    assert (found.missing, found.extra) == ((), ())
    assert [found.files[request].name for request in twice.requests] == [f"{prompt}-0.mp4", f"{prompt}-1.mp4"]
