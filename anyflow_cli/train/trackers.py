"""Where a run's rows go beside ``metrics.jsonl``: Weights & Biases and trackio, through accelerate.

TensorBoard is in ``metrics``, which takes back what a resumed run writes again; these keep it. A run keeps
its identity there over restarts, since it follows from its directory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from anyflow_cli.errors import UsageError

PROJECT = "anyflow"


def start_trackers(
    accelerator: Any, names: Sequence[str], directory: Path, config: Mapping[str, Any]
) -> None:
    """Begin or continue the run's records at each tracker; ``accelerator.log`` then reaches them."""
    for name in names:
        if find_spec(name) is None:
            hint = f"Install it (pip install {name}), or take it out of trackers."
            raise UsageError(f"The tracker {name} is not installed.", hint, everywhere=True)
    title = f"{directory.parent.name}-{directory.name}"
    identity = hashlib.blake2b(str(directory.resolve()).encode(), digest_size=8).hexdigest()
    accelerator.log_with = list(names)
    accelerator.init_trackers(
        PROJECT,
        dict(config),
        init_kwargs={
            "wandb": {"name": title, "id": identity, "resume": "allow", "dir": str(directory)},
            "trackio": {"name": f"{title}-{identity}", "resume": "allow"},
        },
    )


def finish_trackers(accelerator: Any) -> None:
    """Send what is still to be sent."""
    for tracker in accelerator.trackers:
        tracker.finish()
