"""What an evaluation will still take, said before it starts: room on the disk and, where known, time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import Variant
from anyflow_cli.evaluate.store import Scored

VIDEO_BITS = 0.25  # a pixel of an mp4 at the quality in which previews are kept, before any was measured


@dataclass(frozen=True)
class EvaluationCost:
    """What is still to be made: videos, bytes, and seconds where finished videos tell of them."""

    videos: int
    size: float
    seconds: float | None


def cost(job: EvaluationJob, processes: int = 1) -> EvaluationCost:
    """Room and time for what is missing, told from finished videos where there are any."""
    missing = {one.key: len(job.missing(one)) for one in job.variants}
    known = {one.key: list(job.store(one).read().values()) for one in job.variants}
    sizes = [float(record.size) for records in known.values() for record in records]
    model, total = job.recipe.model, sum(missing.values())
    guess = model.frames * model.height * model.width * VIDEO_BITS / 8
    seconds = [missing[one.key] * _seconds(one, job.variants, known) for one in job.variants]
    return EvaluationCost(
        videos=total,
        size=total * float(np.mean(sizes or [guess])),
        seconds=sum(seconds) / processes if sizes else None,
    )


def _seconds(one: Variant, variants: Sequence[Variant], known: Mapping[str, list[Scored]]) -> float:
    """Seconds a video: of its own finished ones, else by evaluations from those of another variant."""
    like = next((other for other in (one, *variants) if known[other.key]), None)
    if like is None:
        return 0.0
    network, decode = (
        float(np.median([getattr(record, part) for record in known[like.key]]))
        for part in ("network", "decode")
    )
    return network * one.evaluations / like.evaluations + decode


def check_room(out: Path, needed: float) -> None:
    """Refuse to start what the disk cannot hold."""
    place = next(path for path in (out, *out.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UsageError(
            f"The videos take about {needed / 1e6:.0f} MB, and {place} has {free / 1e6:.0f} MB left.",
            "Free space, use another --out, or evaluate fewer prompts with --limit.",
        )
