"""Recipe keys that were renamed: refused in a user's recipe with the new name, translated in a run's record.

The ``recipe.yaml`` of a run was written by this program, so an old key is not a mistake there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRAINING = ("train_flowmap", "distill", "finetune")
OPTIMIZERS = (*((stage, "optimizer") for stage in _TRAINING), ("distill", "fake_optimizer"))

# section -> old key -> new key; sections by their new names
RENAMED: dict[tuple[str, ...], dict[str, str]] = {
    ("model",): {"checkpointed_every": "checkpoint_every_n_blocks", "shipped": "pretrained_any_step"},
    ("launch",): {"checkpoints_wait": "async_checkpoint"},
    **{(name,): {"batch": "batch_size"} for name in ("synthesize", "sample", "evaluate")},
    **{(stage,): {"batch": "global_batch", "optimiser": "optimizer"} for stage in _TRAINING},
    **{(stage, "flow_map"): {"given": "conditioning_prob"} for stage in _TRAINING},
    **{(stage, "alarms"): {"then": "action"} for stage in _TRAINING},
    **{section: {"warmup": "warmup_steps", "clip": "grad_clip"} for section in OPTIMIZERS},
}
RENAMED[("distill",)] |= {
    "fake_optimiser": "fake_optimizer",
    "budgets": "step_budgets",
    "start": "init_from",
}
RENAMED[("finetune",)] |= {"start": "init_from"}
NEGATED = ("async_checkpoint",)  # its old key, checkpoints_wait, meant the opposite


def renamed_key(key: tuple[str | int, ...]) -> tuple[str, ...] | None:
    """Return the new spelling of an old key, e.g. of ``("distill", "start")``; None if the key is not old."""
    new: tuple[str, ...] = ()
    for part in key:
        new += (RENAMED.get(new, {}).get(str(part), str(part)),)
    return None if new == tuple(map(str, key)) else new


def with_new_keys(content: Mapping[str, Any], section: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a recorded recipe with the new spelling of its keys."""
    result = {}
    for key, value in content.items():
        new = RENAMED.get(section, {}).get(key, key)
        if new in NEGATED and new != key:
            value = not value
        result[new] = with_new_keys(value, (*section, new)) if isinstance(value, Mapping) else value
    return result
