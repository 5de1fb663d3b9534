"""Which model a command uses, and how its address becomes a network.

An address is a built-in name, a Hub name, a pipeline folder, or a place in a training run: the run itself
(its finished model, else its newest checkpoint), or one checkpoint. A checkpoint holds only what was
trained, as a moving average; the rest is read from the model that the run started from. So a model can be
sampled and exported while its training goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from anyflow_cli.errors import UsageError
from anyflow_cli.model.folder import load_network, read_json, resolve
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe.paths import MODEL, RunPaths
from anyflow_cli.recipe.schema import Recipe


class Choice(NamedTuple):
    """A model and the reason why it was taken, for people to read."""

    address: str
    why: str


@dataclass(frozen=True)
class Opened:
    """A network, the pipeline folder with its text encoder and VAE, and where it comes from."""

    network: FlowMapTransformer
    pipeline: Path
    lineage: dict[str, Any]


def find_model(recipe: Recipe, paths: RunPaths, address: str | None, *, teacher: bool = False) -> Choice:
    """The model a command was given, else the furthest one trained here, else the one that ships."""
    if address is not None:
        return Choice(address, "given with --model")
    if teacher:
        return Choice(recipe.model.teacher, f"the teacher of recipe {recipe.name}")
    trained = paths.any_step_model()
    if trained is not None:
        return Choice(str(trained), f"the furthest model trained with recipe {recipe.name}")
    if recipe.model.shipped is not None:
        return Choice(recipe.model.shipped, f"shipped with anyflow, since {paths.home} holds no trained one")
    raise UsageError(
        f"Recipe {recipe.name} has no any-step model yet: {paths.stage_1() / MODEL} does not exist.",
        f"Train one with `anyflow train-flowmap -r {recipe.name}`, name one with --model, or use --teacher.",
    )


def open_model(address: str, recipe: Recipe) -> Opened:
    """Open what ``address`` names; a bare transformer takes encoder and VAE from the recipe's teacher."""
    path = resolve(address)
    if (path / MODEL).is_dir() and not (path / "model_index.json").is_file():
        path = path / MODEL
    whole = (path / "model_index.json").is_file()
    pipeline = path if whole else resolve(recipe.model.teacher)
    lineage = path / "lineage.json"
    return Opened(load_network(path), pipeline, read_json(lineage) if lineage.is_file() else {})


def check_address(address: str) -> None:
    """Refuse an address that leads nowhere; a name of the Hub is not asked for, since that would fetch it."""
    if address.count("/") != 1 or Path(address).expanduser().exists():
        resolve(address)
