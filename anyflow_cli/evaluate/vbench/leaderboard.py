"""A result as VBench's leaderboard takes it: videos named ``PROMPT-K.mp4``, scores in its own JSON.

Raw scores, as VBench wrote them; nothing is normalised or summed. The protocol card lies beside. Videos are
linked where the disk allows it and copied otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.results import Evaluation, Measured
from anyflow_cli.evaluate.store import Scored
from anyflow_cli.evaluate.vbench.assess import ANSWERS, PERCENT
from anyflow_cli.evaluate.vbench.prompts import SAMPLES
from anyflow_cli.model.pipeline_io import link_or_copy
from anyflow_cli.utils.files import read_json, write_json


def export_leaderboard(job: EvaluationJob, found: Evaluation, directory: Path) -> list[Path]:
    """A folder for each model and step count; the paths of their JSON files."""
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} holds files already.", "Choose a new directory for --export.")
    paths = [_export(job, one, directory / one.title.replace(" ", "-")) for one in found.columns]
    write_json(directory / "protocol.json", found.card)
    return paths


def _export(job: EvaluationJob, one: Measured, place: Path) -> Path:
    (place / "videos").mkdir(parents=True)
    names: dict[str, str] = {}
    for prompt, records in _by_prompt(job, one).items():
        for k, record in enumerate(records):
            names[record.file] = f"{prompt}-{k}.mp4"
            _put(one.directory / record.file, place / "videos" / names[record.file])
    results = {dimension: _result(one, dimension, names) for dimension in one.result.dimensions}
    write_json(place / f"{place.name}_eval_results.json", results)
    return place / f"{place.name}_eval_results.json"


def _by_prompt(job: EvaluationJob, one: Measured) -> dict[str, list[Scored]]:
    """Five videos a prompt; of flickering's twenty-five those that the static filter let through."""
    titles = job.protocol.own_prompts
    found: dict[str, list[Scored]] = defaultdict(list)
    for item, record in zip(job.protocol.items, one.scored, strict=True):
        found[titles[item.number]].append(record)
    return {
        title: sorted(records, key=lambda record: not record.score.scores)[:SAMPLES]
        for title, records in found.items()
    }


def _result(one: Measured, dimension: str, names: dict[str, str]) -> list[Any]:
    score = read_json(one.directory / ANSWERS / f"{dimension}.json")["score"]
    scale = PERCENT.get(dimension, 1.0)
    scored = [record for record in one.scored if dimension in record.score.scores and record.file in names]
    return [
        score,
        [
            {"video_path": names[record.file], "video_results": record.score.scores[dimension] / scale}
            for record in scored
        ],
    ]


def _put(source: Path, target: Path) -> None:
    if target.exists():
        raise UsageError(
            f"{target} stands for two prompts that differ in case alone.",
            "Choose a directory on a disk that tells upper from lower case for --export.",
        )
    link_or_copy(source, target)
