"""Export for VBench's leaderboard: videos named ``PROMPT-K.mp4`` and raw scores in the benchmark's JSON.

Scores are those VBench wrote, neither normalized nor summed; the protocol card is beside them. Videos are
hard links where the file system allows it, else copies.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.results import Evaluation, Measured
from anyflow_cli.evaluate.store import ANSWERS
from anyflow_cli.evaluate.vbench.dimensions import SAMPLES
from anyflow_cli.evaluate.vbench.suite import PERCENT
from anyflow_cli.model.pipeline_io import link_or_copy
from anyflow_cli.utils.files import write_json
from anyflow_cli.utils.records import read_record


class _Answer(BaseModel):
    score: float


def check_export(directory: Path) -> None:
    """Raise a UsageError unless the export gets an empty or new directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not an empty directory.", "Give a new directory to --export.")


def export_leaderboard(job: EvaluationJob, found: Evaluation, directory: Path) -> list[Path]:
    """Write a folder for each model and step count; return the paths of their JSON files."""
    check_export(directory)
    paths = [_export(job, one, directory / one.title.replace(" ", "-")) for one in found.columns]
    write_json(directory / "protocol.json", found.card.as_json())
    return paths


def _export(job: EvaluationJob, one: Measured, place: Path) -> Path:
    (place / "videos").mkdir(parents=True)
    names: dict[Path, str] = {}
    for prompt, indices in _by_prompt(job, one).items():
        for k, index in enumerate(indices):
            source = one.files[index]
            names[source] = f"{prompt}-{k}.mp4"
            target = place / "videos" / names[source]
            if target.exists():
                raise UsageError(
                    f"{target} is the name of two prompts that differ only in case.",
                    "Give --export a directory on a case-sensitive file system.",
                )
            link_or_copy(source, target)
    results = {dimension: _result(job, one, dimension, names) for dimension in one.result.dimensions}
    write_json(place / f"{place.name}_eval_results.json", results)
    return place / f"{place.name}_eval_results.json"


def _by_prompt(job: EvaluationJob, one: Measured) -> dict[str, list[int]]:
    """Five videos per prompt, as indices; of temporal flickering those that passed the static filter."""
    titles = job.protocol.suite_prompts
    found: dict[str, list[int]] = defaultdict(list)
    for index, request in enumerate(job.protocol.requests):
        found[titles[request.number]].append(index)
    return {
        title: sorted(indices, key=lambda index: not one.records[index].score.scores)[:SAMPLES]
        for title, indices in found.items()
    }


def _result(job: EvaluationJob, one: Measured, dimension: str, names: dict[Path, str]) -> list[Any]:
    answer = job.out / one.key / ANSWERS / f"{dimension}.json"
    scale = PERCENT.get(dimension, 1.0)
    videos = [
        {"video_path": names[path], "video_results": record.score.scores[dimension] / scale}
        for path, record in zip(one.files, one.records, strict=True)
        if dimension in record.score.scores and path in names
    ]
    return [read_record(answer, _Answer).score, videos]
