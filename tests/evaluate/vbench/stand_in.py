"""Stand-ins for VBench's environment and for the workers that score with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyflow_cli.evaluate import registry
from anyflow_cli.evaluate.vbench import suite as vbench_suite
from anyflow_cli.evaluate.vbench.environment import Environment
from anyflow_cli.evaluate.vbench.weights import REQUIREMENTS
from anyflow_cli.evaluate.vbench.worker_pool import DimensionAnswer, JobFailure, WorkerJob


def environment(root: Path, modules: tuple[str, ...] = ()) -> Environment:
    return Environment(root, root / "bin" / "python", {"vbench": "0"}, modules, 0, root / "full_info.json")


class Answers:
    """A stand-in for the workers that returns fixed values and records the jobs."""

    def __init__(self, **values: Any) -> None:
        self.values, self.asked = values, list[tuple[str, list[str]]]()
        self.entries: dict[str, list[dict[str, Any]]] = {}

    def __call__(
        self, python: Path, jobs: Sequence[WorkerJob], scratch: Path, devices: Sequence[str],
        done: Callable[[WorkerJob, Any], None],
    ) -> None:  # fmt: skip
        for job in jobs:
            self.entries[job.name] = job.request["entries"]
            paths = [path for line in job.request["entries"] for path in line["video_list"]]
            self.asked.append((job.name, [Path(path).name for path in paths]))
            value = self.values.get(job.name, 0.5)
            if isinstance(value, JobFailure):
                done(job, value)
                continue
            values = value if isinstance(value, list) else [value] * len(paths)
            each = {path: one for path, one in zip(paths, values, strict=True) if one is not None}
            score = None if job.name == "static_filter" else float(np.mean(list(each.values())))
            done(job, DimensionAnswer(score, each, {}, dict.fromkeys(job.request["files"], "f" * 64)))


def with_weights(root: Path, *dimensions: str) -> Path:
    for name in dimensions:
        for file in REQUIREMENTS[name].files:
            path = root / file.path / "code.py" if file.path.endswith("/") else root / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("weights")
    return root


PROMPTS = ("a red cup on a table", "a blue car in the rain")


def install(monkeypatch: pytest.MonkeyPatch, root: Path) -> tuple[Answers, list[str]]:
    """Pretend that both benchmarks are installed in a directory, with two prompts and images each.

    Returns:
        The stand-in for the workers, and options of `evaluate` that lead to the directory.
    """
    answers = Answers()
    monkeypatch.setattr(vbench_suite, "run_jobs", answers)
    monkeypatch.setattr(registry, "open_environment", lambda directory: environment(root))
    images, python = root / "crops", root / "bin" / "python"
    for folder in (images, python.parent):
        folder.mkdir(parents=True, exist_ok=True)
    python.touch()
    dimensions = ["subject_consistency", "i2v_subject"]
    lines = []
    for number, (prompt, color) in enumerate(zip(PROMPTS, ("red", "blue"), strict=True)):
        Image.new("RGB", (70, 40), color).save(images / f"{number}.png")
        lines.append({"prompt_en": prompt, "dimension": dimensions, "image_name": f"{number}.png"})
    full_info = root / "full_info.json"
    full_info.write_text(json.dumps(lines))
    weights = with_weights(root / "weights", *dimensions)
    settings = {"environment": root, "images": images, "full_info": full_info, "weights": weights}
    return answers, [f"--set=evaluate.vbench.{key}={value}" for key, value in settings.items()]
