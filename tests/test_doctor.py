"""`doctor` names every obstacle with its next step, and one obstacle hides no other."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from anyflow_cli import doctor
from anyflow_cli.doctor import Finding, examine
from anyflow_cli.recipe.schema import ModelSection, Recipe
from tests.tiny_pipeline import make_wan_folder

Usage = namedtuple("Usage", "total used free")


def recipe(teacher: str = "tiny", precision: str = "fp32") -> Recipe:
    return Recipe(
        name="test", model=ModelSection.model_validate({"teacher": teacher, "precision": precision})
    )


def finding_of(name: str, recipe: Recipe, runs: Path) -> Finding:
    return next(finding for finding in examine(recipe, runs) if finding.name == name)


def test_every_check_gives_one_finding_and_every_obstacle_has_a_hint(tmp_path: Path) -> None:
    findings = list(examine(recipe(), tmp_path / "runs"))
    assert len({(finding.name, finding.text) for finding in findings}) == len(findings) == 16
    assert all(finding.hint for finding in findings if finding.state == "stop")
    assert not (tmp_path / "runs").exists()


def test_this_environment_can_run(tmp_path: Path) -> None:
    states = {finding.name: finding.state for finding in examine(recipe(), tmp_path)}
    for name in ("python", "torch", "disk", "runs directory", "video files", "precision"):
        assert states[name] == "ok", name
    assert states["devices"] != "stop"  # a note if torch is built for GPUs and there is none


def test_a_full_disk_stops_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 10, 2**20))
    assert doctor.disk(tmp_path).state == "stop"


def test_little_memory_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 2**30)
    assert doctor.memory().state == "stop"


def test_the_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 32000000 kB",
        "/sys/fs/cgroup/memory.max": str(3 * 2**30),
        "/sys/fs/cgroup/memory.current": str(2**30),
        "/sys/fs/cgroup/cpu.max": "150000 100000",
    }
    monkeypatch.setattr(doctor, "_read", lambda path: files[path])
    assert doctor.free_memory() == 2 * 2**30
    assert doctor.usable_cores() == 1


def test_a_directory_that_cannot_be_written_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    found = doctor.writable(tmp_path / "a" / "b")
    assert found.state == "stop"
    assert found.text == f"{tmp_path} cannot be written: Permission denied"


def test_a_version_out_of_range_stops_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=99", "numpy>=1", "no-such-package>=1", "pytest>=999; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    found = doctor.packages()
    assert found.state == "stop"
    assert "torch" in found.text
    assert "no-such-package is missing" in found.text
    assert "numpy" not in found.text
    assert "pytest" not in found.text


def test_more_threads_than_cores_gives_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert doctor.processors().hint == "export OMP_NUM_THREADS=1"


def test_models_and_data_of_the_recipe_are_checked_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = make_wan_folder(tmp_path / "wan")
    assert finding_of("teacher", recipe(str(folder)), tmp_path).state == "ok"
    assert finding_of("teacher", recipe("someone/model"), tmp_path).state == "note"
    data = finding_of("data set", recipe(), tmp_path)
    assert (data.state, data.hint) == ("note", "run `anyflow synthesize -r test`")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert finding_of("teacher", recipe("someone/model"), tmp_path).state == "stop"


def test_a_missing_teacher_stops_a_run(tmp_path: Path) -> None:
    assert finding_of("teacher", recipe(str(tmp_path / "no" / "model")), tmp_path).state == "stop"


def test_a_git_lfs_pointer_instead_of_weights_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyflow_cli.model import pipeline_io

    assets = shutil.copytree(pipeline_io.ASSETS, tmp_path / "assets")
    weights = assets / "tiny" / "text_encoder" / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    monkeypatch.setattr(pipeline_io, "ASSETS", assets)
    found = finding_of("built-in models", recipe(), tmp_path)
    assert found.state == "stop"
    assert "model.safetensors is a Git LFS pointer" in found.text


def test_a_check_that_raises_is_a_finding_and_the_others_still_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Finding:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor, "torch_build", broken)
    found = {finding.name: finding for finding in examine(recipe(), tmp_path)}
    assert found["torch"].state == "stop"
    assert "libcudart" in found["torch"].text
    assert found["disk"].state == "ok"


def test_bf16_slower_than_fp32_gives_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_matmul_seconds", lambda dtype: 2.0 if dtype == torch.bfloat16 else 1.0)
    found = doctor.precision(recipe(precision="bf16"))
    assert found.state == "note"
    assert found.hint is not None
    assert "precision=fp32" in found.hint
