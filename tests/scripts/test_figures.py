"""Figures drawn from the files of finished commands contain every curve and every part."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from anyflow_cli.evaluate.per_chunk import ChunkCurves
from tests.scripts.script import load


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """``scripts/figures.py`` as a module."""
    return load("figures.py")


def finished(folder: Path, *, teacher: bool) -> Path:
    """Write the results of an evaluation at 4 and 32 steps."""
    chunks = {"partition": [1, 2], "groups": {"quality": [90.0, 80.0]}, "dimensions": {}}
    entries = [{"steps": steps, "teacher": False, "chunks": chunks} for steps in (4, 32)]
    entries += [{"steps": 50, "teacher": True, "chunks": chunks}] * teacher
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"scores": entries}))
    return folder


def drawn(figures: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> Path:
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, words)])
    figures.main()
    return Path(str(words[-1]))


def test_each_evaluation_and_step_count_is_a_curve_and_the_teacher_appears_once(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [f"{name}={finished(tmp_path / name, teacher=True)}" for name in ("before", "after")]
    seen: dict[str, ChunkCurves] = {}
    colors_used: list[int] = []

    def draw(curves: dict[str, ChunkCurves], colors: int) -> bytes:
        seen.update(curves)
        colors_used.append(colors)
        return b""

    monkeypatch.setattr(figures, "chunks_png", draw)
    drawn(figures, monkeypatch, "along", *sides, "--steps", 4, 32, "--out", tmp_path / "new" / "along.png")
    steps = [f"{name}, {n} steps" for n in (4, 32) for name in ("before", "after")]
    assert list(seen) == [*steps, "teacher"]
    assert colors_used == [2]  # curves of one evaluation share theirs
    assert seen["teacher"] == ChunkCurves((1, 2), {"quality": [90.0, 80.0]}, {})  # type: ignore[dict-item]


def test_the_progress_of_a_streamed_video_is_drawn(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"nfe": [4, 2], "parts": [[0.5, 1], [1.5, 9]]}
    record = {"settings": {"fps": 16, "frames": 9}, "samples": [entry]}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    with Image.open(drawn(figures, monkeypatch, "stream", tmp_path, "--out", tmp_path / "s.png")) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 2
