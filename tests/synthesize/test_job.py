from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.data.shapes_world import WORLDS
from anyflow_cli.data.shards import PROVENANCE
from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.schema import DataSection, ModelSection, Recipe, SynthesizeSection
from anyflow_cli.synthesize.job import SynthesisJob, prepare_synthesis
from anyflow_cli.utils.files import write_json


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    (tmp_path / "wan").mkdir()
    return tmp_path / "wan"


def job_of(teacher: Path, out: str = "out", **changes: Any) -> SynthesisJob:
    prompts = changes.pop("prompts", None)
    model = ModelSection(teacher=str(teacher), precision="fp32", shift=changes.pop("shift", 5.0))
    made = SynthesizeSection(**{"count": 5, "shard_size": 2, **changes})
    return prepare_synthesis(
        Recipe(name="t", model=model, data=DataSection(prompts=prompts), synthesize=made),
        teacher.parent / out,
    )


def begun(teacher: Path, **changes: Any) -> SynthesisJob:
    job = job_of(teacher, **changes)
    write_json(job.out / PROVENANCE, job.provenance)
    return job


def test_captions_of_the_world_unless_there_are_prompts(teacher: Path) -> None:
    assert list(job_of(teacher, seed=3).captions) == [
        WORLDS["shapes"].scene(seed).caption for seed in range(3, 8)
    ]
    (teacher.parent / "p.txt").write_text("a\nb\n")
    prompts = str(teacher.parent / "p.txt")
    assert job_of(teacher, prompts=prompts, count=None).captions == ["a", "b"]
    assert job_of(teacher, prompts=prompts).captions == ["a", "b", "a", "b", "a"]


def test_a_world_needs_a_count(teacher: Path) -> None:
    with pytest.raises(UsageError, match="without end") as error:
        job_of(teacher, count=None)
    assert error.value.hint is not None
    assert "--count" in error.value.hint


def test_preparing_writes_nothing(teacher: Path) -> None:
    job = job_of(teacher)
    assert not job.out.exists()
    assert [len(indices) for indices in job.ranges] == [2, 2, 1]
    assert job.records() == [None] * 3


def test_a_missing_teacher_is_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model at"):
        job_of(tmp_path / "absent")


def test_the_same_settings_continue_in_their_directory(teacher: Path) -> None:
    first = begun(teacher, seed=3)
    assert job_of(teacher, seed=3, batch_size=4).provenance == first.provenance


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"seed": 4}, ["seed (0 there, 4 now)", "captions ("]),
        ({"steps": 9, "shift": 3.0}, ["steps", "shift"]),
    ],
)
def test_other_settings_are_refused_with_the_keys_that_differ(
    teacher: Path, changes: dict[str, Any], keys: list[str]
) -> None:
    job = begun(teacher)
    before = (job.out / PROVENANCE).read_bytes()
    with pytest.raises(UsageError, match="holds another data set") as error:
        job_of(teacher, **changes)
    assert all(key in error.value.message for key in keys)
    assert "guidance" not in error.value.message
    assert error.value.hint is not None
    assert "--runs" in error.value.hint  # `finetune` makes such data sets too, and has no --out
    assert (job.out / PROVENANCE).read_bytes() == before


def test_a_directory_with_other_files_is_refused(teacher: Path) -> None:
    (teacher / "holiday.jpg").touch()
    with pytest.raises(UsageError, match="not a data set"):
        job_of(teacher, out="wan")
    (teacher.parent / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        job_of(teacher, out="file")
