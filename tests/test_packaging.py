"""What the wheel holds, and the scripts that a fresh machine starts with."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.sh")), ROOT / ".ci/run"]


def test_the_wheel_holds_recipes_assets_and_licence(tmp_path: Path) -> None:
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


def test_no_large_file_ships_twice() -> None:
    sizes: dict[str, list[str]] = {}
    for path in (ROOT / "anyflow_cli").rglob("*"):
        if path.is_file() and path.stat().st_size > 1024 and "__pycache__" not in path.parts:
            sizes.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), []).append(path.name)
    assert [names for names in sizes.values() if len(names) > 1] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_may_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_set_up_refuses_another_python_in_one_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts/setup.sh"],
        env={**os.environ, "PYTHON": str(old), "VENV": str(tmp_path / "venv")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: {old} is not Python 3.10, 3.11, 3.12 or 3.13."
    assert not (tmp_path / "venv").exists()
