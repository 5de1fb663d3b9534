"""Ownership of files: nothing is replaced, deleted or shown that anyflow did not write."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.report.page import render_page, write_results
from anyflow_cli.evaluate.results import Evaluation
from anyflow_cli.evaluate.run import evaluate_and_report, run_evaluation
from anyflow_cli.evaluate.shapes.suite import ShapesSuite
from anyflow_cli.evaluate.store import (
    EvaluationDirectory,
    other_variants,
    remove_variants,
    size_and_digest,
)
from anyflow_cli.evaluate.vbench.environment import ENVIRONMENT_MARKER, create_environment
from anyflow_cli.evaluate.vbench.leaderboard import export_leaderboard
from anyflow_cli.utils.run_lock import RUN_LOCK
from tests.evaluate.drawn import Drawn, make_job


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    job = make_job(root, nfe=(1,), prompts=2, teacher=False)
    run_evaluation(job, Drawn().open)
    return root


@pytest.fixture
def job(template: Path, tmp_path: Path) -> EvaluationJob:
    """A finished evaluation of two videos."""
    shutil.copytree(template, tmp_path / "root")
    return make_job(tmp_path / "root", nfe=(1,), prompts=2, teacher=False)


def edit_records(job: EvaluationJob, change: Callable[[dict[str, Any]], None]) -> None:
    path = job.out / job.variants[0].key / "scores.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", ["{victim}", "../../../victim.mp4", "videos/../../../../victim.mp4"])
def test_a_records_file_name_never_leads_outside(job: EvaluationJob, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim.mp4"
    victim.write_bytes(b"secret")
    edit_records(job, lambda record: record.update(file=name.format(victim=victim), size=1))
    rest = Drawn()
    run_evaluation(job, rest.open)
    assert victim.read_bytes() == b"secret"
    assert len(rest.requests) == 2  # a record of another size is not that of a video here


def test_a_file_outside_is_not_embedded_in_the_page(job: EvaluationJob, tmp_path: Path) -> None:
    victim = tmp_path / "victim.mp4"
    victim.write_bytes(b"secret of the user")
    size, digest = size_and_digest(victim)
    edit_records(job, lambda record: record.update(file=str(victim), size=size, digest=digest))
    found = run_evaluation(job, Drawn().open)
    assert "c2VjcmV0IG9mIHRoZSB1c2Vy" not in render_page(found, ShapesSuite())
    assert victim.exists()


def test_a_linked_directory_of_videos_keeps_its_files(job: EvaluationJob, tmp_path: Path) -> None:
    store = job.store(job.variants[0]).directory
    (store / "videos").rename(tmp_path / "elsewhere")
    (store / "videos").symlink_to(tmp_path / "elsewhere")
    kept = sorted((tmp_path / "elsewhere").iterdir())
    kept[0].write_bytes(b"damaged")
    with pytest.raises(UsageError, match="leads outside of"):
        run_evaluation(job, Drawn().open)
    assert sorted((tmp_path / "elsewhere").iterdir()) == kept


def test_records_are_not_appended_through_a_link(job: EvaluationJob, tmp_path: Path) -> None:
    records = job.store(job.variants[0]).directory / "scores.jsonl"
    records.rename(tmp_path / "notes.txt")
    records.symlink_to(tmp_path / "notes.txt")
    before = (tmp_path / "notes.txt").read_bytes()
    next((records.parent / "videos").iterdir()).unlink()
    with pytest.raises(UsageError, match="not a regular file"):
        run_evaluation(job, Drawn().open)
    assert (tmp_path / "notes.txt").read_bytes() == before


def test_a_lock_is_not_written_through_a_link(job: EvaluationJob, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (job.out / RUN_LOCK).unlink()
    (job.out / RUN_LOCK).symlink_to(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="not a regular file"):
        run_evaluation(job, Drawn().open)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- reports -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["report.html", "results.json", "scores.md", "scores.tex", "chunks.png"])
def test_a_users_own_report_is_neither_replaced_nor_found_too_late(job: EvaluationJob, name: str) -> None:
    (job.out / name).write_text("mine")
    shutil.rmtree(job.out / job.variants[0].key)
    with pytest.raises(UsageError, match=f"{name} was not written by anyflow"):
        evaluate_and_report(job)
    assert (job.out / name).read_text() == "mine"
    assert not (job.out / job.variants[0].key).exists(), "nothing was sampled before"


def test_a_report_that_was_edited_is_kept(job: EvaluationJob) -> None:
    found = run_evaluation(job, Drawn().open)
    paths = write_results(found, job.protocol.suite, job.out)
    write_results(found, job.protocol.suite, job.out)
    paths["scores.md"].write_text("with my notes")
    with pytest.raises(UsageError, match=r"scores\.md was not written by anyflow, or was changed since"):
        write_results(found, job.protocol.suite, job.out)
    assert paths["scores.md"].read_text() == "with my notes"


def test_a_replacement_that_was_interrupted_is_completed(
    job: EvaluationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = {"scores.md": b"1", "scores.tex": b"1"}, {"scores.md": b"2", "scores.tex": b"2"}
    directory = EvaluationDirectory(job.out)
    directory.write(first)
    directory.write(second)
    (job.out / "scores.tex").write_bytes(b"1")  # as if the kill came between the two
    directory.write(second)
    assert (job.out / "scores.tex").read_bytes() == b"2"


def test_other_files_in_the_directory_stay(job: EvaluationJob) -> None:
    (job.out / "notes.txt").write_text("mine")
    (job.out / "mine").mkdir()
    write_results(run_evaluation(job, Drawn().open), job.protocol.suite, job.out)
    assert (job.out / "notes.txt").read_text() == "mine"


def test_a_file_or_an_address_is_not_a_directory(job: EvaluationJob, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", Path("s3://bucket/x")):
        with pytest.raises(UsageError, match="directory"):
            EvaluationDirectory(wrong).check()


# -- variants of other models --------------------------------------------------------------------------------


def other(job: EvaluationJob) -> Path:
    """A variant of another model, as the same evaluation would have left it."""
    place = job.out / "model-4-0123456789ab"
    shutil.copytree(job.out / job.variants[0].key, place)
    return place


def test_a_variant_that_anyflow_wrote_is_pruned(job: EvaluationJob) -> None:
    place = other(job)
    found = other_variants(job.out, job.variants)
    assert (found.removable, found.kept) == ((place,), ())
    remove_variants(found.removable)
    assert not place.exists()
    assert (job.out / job.variants[0].key).is_dir()


@pytest.mark.parametrize("case", ["no marker", "own file", "own video", "other name", "link"])
def test_anything_else_is_not_pruned(job: EvaluationJob, tmp_path: Path, case: str) -> None:
    place = other(job)
    if case == "no marker":
        (place / "variant.json").unlink()
    elif case == "own file":
        (place / "thesis.tex").write_text("mine")
    elif case == "own video":
        (place / "videos" / "holiday.mp4").write_text("mine")
    elif case == "other name":
        place = place.rename(job.out / "my-scores")
    elif case == "link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    assert other_variants(job.out, job.variants).removable == ()
    assert (place / "scores.jsonl").is_file()


# -- other directories ---------------------------------------------------------------------------------------


def test_an_export_needs_an_empty_directory(job: EvaluationJob, tmp_path: Path) -> None:
    found = run_evaluation(job, Drawn().open)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for wrong in ("mine", "file"):
        with pytest.raises(UsageError, match="not an empty directory"):
            export_leaderboard(job, found, tmp_path / wrong)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def export_names(job: EvaluationJob, found: Evaluation, directory: Path) -> list[str]:
    export_leaderboard(job, found, directory)
    return sorted(path.name for path in directory.rglob("*.mp4"))


def test_an_export_links_files_and_changes_none(job: EvaluationJob, tmp_path: Path) -> None:
    found = run_evaluation(job, Drawn().open)
    plain = replace(found.measured[0], result=replace(found.measured[0].result, dimensions={}))
    names = export_names(job, replace(found, measured=(plain,)), tmp_path / "board")
    assert names == sorted(f"{prompt}-0.mp4" for prompt in job.protocol.prompts)
    assert all(path.is_file() for path in found.measured[0].files)


def test_nothing_is_installed_into_an_environment_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: commands.append(command))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    (tmp_path / "pyvenv.cfg").touch()
    with pytest.raises(UsageError, match="that anyflow did not create"):
        create_environment(tmp_path)
    assert commands == []
    assert not (tmp_path / ENVIRONMENT_MARKER).exists()
