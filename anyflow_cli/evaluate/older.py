"""Variants that lie in an evaluation's directory and are no part of it: of earlier models and settings.

They are kept, since a variant found again need not be made again; a user who wants the room says so.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.store import is_store


@dataclass(frozen=True)
class Older:
    """Directories of variants, and the bytes they take."""

    directories: tuple[Path, ...]
    size: int


def older_variants(job: EvaluationJob) -> Older:
    """What the job's directory holds besides the job."""
    own = {one.key for one in job.variants}
    found = [path for path in sorted(job.out.iterdir()) if path.name not in own and is_store(path)]
    files = [file for path in found for file in path.rglob("*") if file.is_file()]
    return Older(tuple(found), sum(file.stat().st_size for file in files))


def remove(older: Older) -> None:
    """Delete them, videos and scores."""
    for directory in older.directories:
        shutil.rmtree(directory)
