"""Several processes, kills and damage: each video is sampled once, with the result of a single process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate import generate
from anyflow_cli.evaluate.generate import check_free_space, remaining_cost
from anyflow_cli.evaluate.run import generate_share, run_evaluation
from anyflow_cli.sample.shares import VideoShare
from tests.evaluate import drawn
from tests.evaluate.drawn import Drawn, KilledError, make_job


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_videos_and_the_first_sums_up(tmp_path: Path, world: int) -> None:
    alone = run_evaluation(make_job(tmp_path / "alone"), Drawn().open)
    job, drawn = make_job(tmp_path / "shared"), [Drawn() for _ in range(world)]
    for rank in range(1, world):
        generate_share(job, VideoShare(group=rank, groups=world), drawn[rank].open)
    together = run_evaluation(job, drawn[0].open, share=VideoShare(group=0, groups=world))
    asked = [each for one in drawn for each in one.requests]
    assert len(asked) == len(set(asked)) == 12
    assert all(one.requests for one in drawn)
    for a, b in zip(alone.measured, together.measured, strict=True):
        assert (a.result, a.interval) == (b.result, b.interval)


def test_the_first_process_waits_for_the_videos_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "POLL_SECONDS", 0.02)
    job = make_job(tmp_path, teacher=False)
    other = threading.Timer(0.5, generate_share, (job, VideoShare(group=1, groups=2), Drawn().open))
    other.start()
    progress: list[int] = []
    run_evaluation(job, Drawn().open, progress.append, VideoShare(group=0, groups=2))
    other.join()
    assert progress[0] == 0
    assert progress[-1] == job.videos == 8


def test_a_stalled_process_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(generate, "STALL_SECONDS", 0.05)
    with pytest.raises(AnyflowError, match="6 videos of other processes are missing"):
        run_evaluation(make_job(tmp_path), Drawn().open, share=VideoShare(group=0, groups=2))


def test_another_number_of_processes_continues_with_what_is_there(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    generate_share(job, VideoShare(group=2, groups=3), Drawn().open)
    rest = Drawn()
    run_evaluation(job, rest.open)
    assert [seed for _, seed, _ in rest.requests] == [7, 8, 10]


def test_a_kill_keeps_the_finished_videos_of_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, write = make_job(tmp_path, nfe=(1,), teacher=False), write_mp4
    written: list[Path] = []

    def write_three(path: Path, *given: Any) -> None:
        if len(written) == 3:
            raise KilledError
        written.append(path)
        write(path, *given)

    monkeypatch.setattr(generate, "write_mp4", write_three)
    with pytest.raises(KilledError):
        run_evaluation(job, Drawn().open)
    monkeypatch.setattr(generate, "write_mp4", write)
    rest = Drawn()
    run_evaluation(job, rest.open)
    assert [seed for _, seed, _ in rest.requests] == [10]


@pytest.mark.parametrize("damage", ["shortened", "altered", "emptied"])
def test_a_damaged_video_is_reported_and_sampled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    found = run_evaluation(job, Drawn().open)
    path = found.models[0].files[2]
    whole = path.read_bytes()
    altered = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
    path.write_bytes({"shortened": whole[:-9], "altered": altered, "emptied": b""}[damage])
    rest = Drawn()
    assert run_evaluation(job, rest.open).measured[0].result == found.measured[0].result
    assert [seed for _, seed, _ in rest.requests] == [9]
    assert path.read_bytes() == whole
    assert "1 damaged video will be sampled again" in caplog.text


def test_a_video_replaced_by_another_process_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, nfe=(1,), teacher=False)
    found = run_evaluation(job, Drawn().open)
    record = found.models[0].records[1]
    found.models[0].files[1].unlink()
    draw = drawn.drawn
    monkeypatch.setattr(drawn, "drawn", lambda number, nfe: draw(number, 2))  # as on another GPU
    generate_share(job, VideoShare(group=1, groups=2), Drawn().open)
    kept = (
        run_evaluation(job, lambda of, recipe: pytest.fail("it was sampled once more")).models[0].records[1]
    )
    assert (record.seed, kept.seed) == (8, 8)
    assert record.digest != kept.digest


def test_the_cost_is_estimated_from_finished_videos(tmp_path: Path) -> None:
    job = make_job(tmp_path, nfe=(1, 2), prompts=3)
    before = remaining_cost(job)
    assert (before.videos, before.seconds) == (9, None)
    run_evaluation(make_job(tmp_path, nfe=(1,), prompts=2, teacher=False), Drawn().open)
    after, shared = remaining_cost(job), remaining_cost(job, 2)
    assert after.videos == 7
    # 0.5 s per evaluation, 0.25 s of decoding; 1 video at 1 step, 3 at 2 steps, 3 of the teacher at 5x2
    assert after.seconds == pytest.approx(1 * 0.75 + 3 * 1.25 + 3 * 5.25)
    assert shared.seconds == pytest.approx((1 * 0.75 + 3 * 1.25 + 3 * 5.25) / 2)
    record = next(iter(job.store(job.variants[0]).records().values()))
    assert after.size == pytest.approx(7 * record.size, rel=0.5)


def test_too_little_disk_space_is_reported_before_sampling(tmp_path: Path) -> None:
    check_free_space(tmp_path / "new", 1)
    with pytest.raises(UsageError, match=r"The videos need about 10+ MB, but .* has"):
        check_free_space(tmp_path / "new", 1e24)
