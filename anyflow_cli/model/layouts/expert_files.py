"""The two experts of a Wan 2.2 A14B on disk: in one folder, or in two places that the user names.

=====================  ==============================================================================
diffusers              ``transformer`` (high), ``transformer_2`` (low), ``boundary_ratio`` in the index
original Wan           ``high_noise_model`` and ``low_noise_model``
two places             ``HIGH,LOW`` or ``HIGH,LOW@BOUNDARY``: files or folders; of a folder with two
                       experts, the one of that place
=====================  ==============================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.experts import EXPERTS, ExpertName
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.experts import WAN_BOUNDARIES
from anyflow_cli.model.layouts.transformer import TransformerFiles, open_transformer
from anyflow_cli.model.weights_io import FETCH, LazyWeight
from anyflow_cli.utils.records import read_record

EXPERT_FOLDERS: dict[ExpertName, str] = {"high": "transformer", "low": "transformer_2"}
ORIGINAL_FOLDERS: dict[ExpertName, str] = {"high": "high_noise_model", "low": "low_noise_model"}
TWO_PLACES = re.compile(r"^(?P<high>[^,]+),(?P<low>[^,]+?)(@(?P<boundary>0?\.\d+))?$")


class ExpertIndex(BaseModel):
    """``model_index.json``: the second transformer of Wan 2.2 and the boundary; nulls or absent elsewhere."""

    transformer_2: tuple[str | None, str | None] | None = None
    boundary_ratio: Annotated[float, Field(gt=0, lt=1)] | None = None


@dataclass(frozen=True)
class ExpertFiles:
    """Two experts on disk.

    Attributes:
        path: Folder, or the two places as one path.
        high: Files of the high-noise expert.
        low: Files of the low-noise expert.
        stated_boundary: Where they meet; None: as in Wan 2.2.
    """

    path: Path
    high: TransformerFiles
    low: TransformerFiles
    stated_boundary: float | None = None

    @cached_property
    def config(self) -> NetworkConfig:
        """Sizes and kind of both experts, and their boundary.

        Raises:
            UsageError: They differ in size or kind.
        """
        high, low = self.high.config, self.low.config
        if high != low:
            names = [name for name in vars(high) if getattr(high, name) != getattr(low, name)]
            values = [", ".join(f"{name} {getattr(one, name)}" for name in names) for one in (high, low)]
            raise UsageError(
                f"{self.high.path} and {self.low.path} are not two experts of one model: "
                f"the first has {values[0]}, the second {values[1]}.",
                "Name the high-noise and the low-noise expert of the same model.",
            )
        boundary = self.stated_boundary or WAN_BOUNDARIES.get(high.in_channels, WAN_BOUNDARIES[16])
        return replace(high, boundary=boundary)

    @property
    def transformers(self) -> tuple[TransformerFiles, ...]:
        """Files of both, high first."""
        return self.high, self.low

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights of both experts by name; see ``WeightSource``."""
        experts = zip(EXPERTS, self.transformers, strict=True)
        return {f"{e}.{name}": weight for e, one in experts for name, weight in one.lazy_weights().items()}


def open_network(path: Path) -> TransformerFiles | ExpertFiles:
    """Find a transformer, or two experts, in a folder, a file, or the two places of a path."""
    places = expert_places(path)
    if places is None:
        return open_transformer(path)
    named = split_places(path)
    stated = named["boundary"] if named else None
    boundary = float(stated) if stated else _index(places["high"].parent).boundary_ratio
    return ExpertFiles(path, open_transformer(places["high"]), open_transformer(places["low"]), boundary)


def split_places(address: str | Path) -> re.Match[str] | None:
    """The groups ``high``, ``low`` and ``boundary`` of an address of two places; None for others."""
    return None if Path(address).expanduser().exists() else TWO_PLACES.match(str(address))


def expert_places(path: Path) -> dict[ExpertName, Path] | None:
    """Folder or file of each expert; None where the path leads to one transformer."""
    match = split_places(path)
    if match is None:
        if (path / "high_noise_model").is_dir():
            return {name: path / folder for name, folder in ORIGINAL_FOLDERS.items()}
        second = _index(path).transformer_2
        if second is None or second[0] is None:
            return None
        return {name: path / folder for name, folder in EXPERT_FOLDERS.items()}
    places: dict[ExpertName, Path] = {}
    for name in EXPERTS:
        place = Path(match[name]).expanduser()
        if not place.exists():
            raise UsageError(
                f"There is no {name}-noise expert at {place}.",
                "Name two experts as HIGH,LOW, or as HIGH,LOW@BOUNDARY: files or folders.",
            )
        places[name] = (expert_places(place) or {name: place})[name]
    return places


def _index(folder: Path) -> ExpertIndex:
    file = folder / "model_index.json"
    return read_record(file, ExpertIndex, FETCH) if file.is_file() else ExpertIndex()
