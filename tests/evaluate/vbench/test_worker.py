"""The worker's own rules, with stand-ins for VBench's functions and for a torchvision that does not fit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.evaluate.vbench import worker

UNFIT = """
import torch
torch.library.register_fake("torchvision::nms", lambda dets, scores, iou_threshold: dets)
"""


def ask(dimension: str, root: Path, monkeypatch: pytest.MonkeyPatch, videos: dict[str, float]) -> Any:
    """Score two videos, of which VBench speaks of those in ``videos``."""
    monkeypatch.setattr(worker, "import_torchvision", lambda: None)
    monkeypatch.setattr(
        worker, "compute", lambda *asked: (0.5, {str(root / k): v for k, v in videos.items()})
    )
    monkeypatch.chdir(root)  # the worker goes to its scratch directory
    for name in ("VBENCH_CACHE_DIR", "TORCH_HOME"):
        monkeypatch.setenv(name, "")  # which it sets
    entry = {"prompt_en": "p", "video_list": [str(root / name) for name in ("a.mp4", "b.mp4")]}
    request = {"dimension": dimension, "entries": [entry], "weights": str(root), "files": []}
    return worker.score(request | {"scratch": str(root / "scratch"), "device": "cpu"})


def test_a_video_that_is_skipped_fails_its_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"VBench skipped 1 of 2 videos: .*b\.mp4"):
        ask("temporal_flickering", tmp_path, monkeypatch, {"a.mp4": 0.5})


def test_color_has_no_word_on_videos_without_the_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ask("color", tmp_path, monkeypatch, {"a.mp4": 0.5})
    assert found["videos"] == {str(tmp_path / "a.mp4"): 0.5}


def test_a_torchvision_without_operators_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    package = tmp_path / "torchvision" / "__init__.py"
    package.write_text(UNFIT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(worker, "declared", [])
    worker.import_torchvision()
    del sys.modules["torchvision"]
    none = torch.zeros(0)
    with pytest.raises(NotImplementedError):  # declared, and never to be called
        torch.ops.torchvision.nms(none, none, 0.5)
    package.write_text("raise RuntimeError('another fault')")
    with pytest.raises(RuntimeError, match="another fault"):
        worker.import_torchvision()
