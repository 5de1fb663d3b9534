"""The worker's own logic, with stand-ins for VBench's functions and for a mismatched torchvision."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.evaluate.vbench import worker
from anyflow_cli.evaluate.vbench.worker_pool import WORKER

UNFIT = """
import torch
torch.library.register_fake("torchvision::nms", lambda dets, scores, iou_threshold: dets)
"""


def ask(dimension: str, root: Path, monkeypatch: pytest.MonkeyPatch, videos: dict[str, float]) -> Any:
    """Score two videos, of which VBench returns those in ``videos``."""
    monkeypatch.setattr(worker, "import_torchvision", lambda: None)
    monkeypatch.setattr(
        worker, "compute", lambda *request: (0.5, {str(root / k): v for k, v in videos.items()})
    )
    monkeypatch.chdir(root)  # the worker changes to its scratch directory
    for name in ("VBENCH_CACHE_DIR", "TORCH_HOME"):
        monkeypatch.setenv(name, "")  # which the worker sets
    entry = {"prompt_en": "p", "video_list": [str(root / name) for name in ("a.mp4", "b.mp4")]}
    request = {"dimension": dimension, "entries": [entry], "weights": str(root), "files": []}
    return worker.score(request | {"scratch": str(root / "scratch"), "device": "cpu"})


def test_a_skipped_video_fails_its_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"VBench skipped 1 of 2 videos: .*b\.mp4"):
        ask("temporal_flickering", tmp_path, monkeypatch, {"a.mp4": 0.5})


def test_color_may_skip_videos_without_the_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask("color", tmp_path, monkeypatch, {"a.mp4": 0.5})
    assert found["videos"] == {str(tmp_path / "a.mp4"): 0.5}


def test_videos_with_other_suffixes_are_linked_as_mp4(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.mp4", "b.MP4", "c.webm", "d.gif")]
    for path in paths:
        path.write_text(path.name)
    entry = {"prompt_en": "p", "video_list": [str(path) for path in paths]}
    (seen,), original = worker.with_required_names("scene", [entry], tmp_path / "scratch")
    names = [Path(path).suffix for path in seen["video_list"]]
    assert names == [".mp4", ".mp4", ".mp4", ".gif"]
    assert seen["video_list"][0] == str(paths[0])
    assert [Path(path).read_text() for path in seen["video_list"]] == [path.name for path in paths]
    assert [original[path] for path in seen["video_list"]] == entry["video_list"]


def test_a_worker_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """The parent is killed and cannot end its worker."""
    code = f"import sys; sys.path.insert(0, {str(WORKER.parent)!r}); import time, worker, os; "
    code += f"worker.end_with_parent(); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    code += "time.sleep(60)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    parent = subprocess.Popen([sys.executable, "-c", start])
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text() != "")
    child = Path("/proc") / (tmp_path / "pid").read_text()
    parent.kill()
    parent.wait()
    wait_for(lambda: not child.exists() or (child / "stat").read_text().split()[2] == "Z")


def wait_for(happens: Callable[[], bool]) -> None:
    for _ in range(100):
        if happens():
            return
        time.sleep(0.1)
    pytest.fail("the condition was never met")


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
    with pytest.raises(NotImplementedError):  # declared, not implemented
        torch.ops.torchvision.nms(none, none, 0.5)
    package.write_text("raise RuntimeError('another error')")
    with pytest.raises(RuntimeError, match="another error"):
        worker.import_torchvision()
