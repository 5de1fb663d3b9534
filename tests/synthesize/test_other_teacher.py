"""A data set may be made by another model than the recipe's teacher: ``run_synthesis.teacher``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.schema import ModelSection, Recipe, SynthesizeSection
from anyflow_cli.synthesize.job import prepare_synthesis
from anyflow_cli.synthesize.run import run_synthesis
from tests.tiny_pipeline import make_wan_folder


def recipe(teacher: Path, other: Path | None) -> Recipe:
    model = ModelSection(
        teacher=str(teacher), precision="fp32", height=16, width=16, frames=5, max_text_tokens=8
    )
    made = SynthesizeSection(teacher=None if other is None else str(other), count=1, steps=1)
    return Recipe(name="t", model=model, synthesize=made)


def test_the_other_teacher_makes_the_videos_and_stands_in_the_provenance(tmp_path: Path) -> None:
    first, second = make_wan_folder(tmp_path / "1"), make_wan_folder(tmp_path / "2", seed=1)
    latents = {}
    for name, own, other in (("other", first, second), ("same", second, None), ("first", first, None)):
        job = prepare_synthesis(recipe(own, other), tmp_path / name)
        assert job.provenance["model"] == str(other or own)
        run_synthesis(job)
        latents[name] = LatentData(tmp_path / name, 8).sample(0).latents
    assert torch.equal(latents["other"], latents["same"])
    assert not torch.equal(latents["other"], latents["first"])


def test_a_missing_other_teacher_is_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    with pytest.raises(UsageError, match="There is no model at"):
        prepare_synthesis(recipe(tmp_path / "own", tmp_path / "a" / "b"), tmp_path / "out")


def test_clips_are_encoded_by_the_recipes_own_teacher(tmp_path: Path) -> None:
    for name in ("clips", "own"):
        (tmp_path / name).mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    (tmp_path / "clips" / "a.txt").write_text("a clip")
    job = prepare_synthesis(
        recipe(tmp_path / "own", tmp_path / "other"), tmp_path / "out", tmp_path / "clips"
    )
    assert job.teacher == str(tmp_path / "own")
