"""How long an evaluation's videos take before the first of them tells: operations over what a GPU multiplies.

The network alone; decoding, and what VBench takes afterwards, are not in it.
"""

from __future__ import annotations

from dataclasses import replace

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import Variant
from anyflow_cli.plan.hardware import Hardware, this_machine
from anyflow_cli.plan.stages import Target, evaluation, target_of


def evaluation_seconds(
    job: EvaluationJob, processes: int = 1, cluster: Hardware | None = None
) -> float | None:
    """Seconds for the videos that are missing; None on a CPU, or for a model whose sizes are not known."""
    cluster = cluster or this_machine()
    if cluster.peak is None:
        return None
    try:
        target = target_of(job.recipe, cluster)
    except UsageError:
        return None
    each = ((len(job.missing(one)), _operations(target, one)) for one in job.variants)
    return cluster.seconds(sum(videos * operations for videos, operations in each) / processes)


def _operations(target: Target, one: Variant) -> float:
    """Of one video; a teacher makes all frames at once."""
    if one.model.teacher:
        model = target.recipe.model.model_copy(update={"causal": None})
        target = replace(target, recipe=target.recipe.model_copy(update={"model": model}))
    return evaluation(target, one.steps, is_guided=one.model.teacher).work.operations
