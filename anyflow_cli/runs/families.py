"""The recipe of a model: size, frames, rate, shift, token limit, negative prompt and steps it is made for.

A model of a training run has the run's own recipe. Others are recognized by their address, or by the sizes of
their network, and have the shipped recipe of their family.
"""

from __future__ import annotations

from pathlib import Path

from anyflow_cli.errors import AnyflowError
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.pipeline_io import BUILT_IN, read_config
from anyflow_cli.runs.open import locate
from anyflow_cli.runs.paths import RECIPE
from anyflow_cli.utils.hub import cached_snapshot, is_hub_name

RECIPE_BY_SIZES = {  # by heads, layers, and whether causal
    (4, 6, False): "tiny", (12, 30, False): "bidirectional1b", (40, 40, False): "bidirectional14b",
    (4, 6, True): "tiny-causal", (12, 30, True): "causal1b", (40, 40, True): "causal14b",
    (24, 30, False): "bidirectional5b", (24, 30, True): "causal5b",
}  # fmt: skip


def family_recipe(address: str) -> str | None:
    """Name or path of the recipe of the model at ``address``; None if it belongs to no known family."""
    if address in BUILT_IN:
        return "tiny"
    if address in KNOWN_MODELS:
        return _by_sizes(KNOWN_MODELS[address].network)
    snapshot = cached_snapshot(address) if is_hub_name(address) else Path(address)
    if snapshot is None:
        return None
    try:
        path = locate(str(snapshot))
        recorded = (parent / RECIPE for parent in (path, *path.parents[:2]))
        found = next((file for file in recorded if file.is_file()), None)
        return str(found) if found is not None else _by_sizes(read_config(path))
    except AnyflowError:  # what is wrong with a model is for the command to say that opens it
        return None


def _by_sizes(config: NetworkConfig) -> str | None:
    takes_pictures = config.in_channels != config.out_channels
    if config.boundary is not None:
        name = "i2v-a14b" if takes_pictures else "bidirectional-a14b"
        return name if (config.heads, config.layers) == (40, 40) else None
    if takes_pictures:
        name = "i2v14b" if config.image_tokens is None else "flf2v14b"
        return name if (config.heads, config.layers) == (40, 40) else None
    return RECIPE_BY_SIZES.get((config.heads, config.layers, config.causal is not None))
