"""The content and metadata of the wheel, and the scripts that set up a fresh machine."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci/run"]


def test_the_wheel_contains_recipes_assets_and_license(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"anyflow_cli/recipes/{path.name}" for path in ROOT.glob("recipes/*.yaml")} <= names
    tracked = subprocess.run(
        ["git", "ls-files", "anyflow_cli"], cwd=ROOT, check=False, capture_output=True, text=True
    ).stdout.split()
    assert set(tracked) <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "anyflow_cli/py.typed" in names  # type checkers read the package's annotations only with it


def test_the_metadata_names_each_supported_python() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'requires-python = ">=3.10,<3.14"' in project
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert named == ["3.10", "3.11", "3.12", "3.13"]
    assert "${PYTHONS:-3.10 3.13}" in (ROOT / "scripts/test_pythons.sh").read_text(encoding="utf-8")


WITHOUT_TORCH = """
import sys
import pytest
sys.modules["torch"] = None  # importing it fails
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_tests_for_other_pythons_need_no_torch() -> None:
    script = (ROOT / "scripts/test_pythons.sh").read_text(encoding="utf-8")
    light = re.search(r"light=\(\n(.*?)\n\)", script, flags=re.DOTALL)
    assert light is not None
    command = [sys.executable, "-c", WITHOUT_TORCH, *light[1].split()]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_large_file_ships_twice() -> None:
    sizes: dict[str, list[str]] = {}
    for path in (ROOT / "anyflow_cli").rglob("*"):
        if path.is_file() and path.stat().st_size > 1024 and "__pycache__" not in path.parts:
            sizes.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path.name)
    assert [names for names in sizes.values() if len(names) > 1] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_is_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def set_up(venv: Path, python: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/setup.sh"],
        env={**os.environ, "PYTHON": str(python), "VENV": str(venv)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def stand_in(path: Path, script: str) -> Path:
    """An interpreter that runs a shell script instead of Python."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_setup_refuses_another_python_with_one_message(tmp_path: Path) -> None:
    old = stand_in(tmp_path / "python2.7", "exit 1")
    done = set_up(tmp_path / "venv", old)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: {old} is not Python 3.10, 3.11, 3.12 or 3.13."
    assert not (tmp_path / "venv").exists()


def test_setup_refuses_a_directory_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep", encoding="utf-8")
    done = set_up(tmp_path / "mine", stand_in(tmp_path / "python", '[ "$2" != venv ]'))
    assert done.returncode == 2
    assert "mine is not a virtual environment" in done.stderr
    assert (tmp_path / "mine" / "notes.txt").read_text(encoding="utf-8") == "keep"


@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_setup_removes_only_the_directory_it_created(tmp_path: Path, existed: bool) -> None:
    if existed:
        (tmp_path / "venv").mkdir()
    fails = stand_in(tmp_path / "python", f'[ "$2" != venv ] || {{ mkdir -p {tmp_path}/venv/bin; exit 1; }}')
    assert set_up(tmp_path / "venv", fails).returncode == 1
    assert (tmp_path / "venv").exists() == existed
