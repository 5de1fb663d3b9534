"""What training added to a base, added to another base of the same shapes, tensor by tensor.

    other + strength (distilled - base)

Strength 0 is the other base, and strength 1 onto the own base is the distilled model. The second time
embedder of an any-step model has no counterpart in a base with one time. It began as a copy of the base's
time embedder and is treated as that: its change is added to the other base's time embedder, so that at
strength 0 and r = t the result is the other base. A causal model's compressed patch embedding is copied at
any strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.causal import FAR
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, listed, shown

SECOND_TIME, FIRST_TIME, PROJECTION = "delta_embedder.", "time_embedder.", "delta_proj."


@dataclass(frozen=True)
class Transplanted:
    """The weights of a transplant; see ``WeightSource``.

    Attributes:
        distilled: The trained model.
        base: The model that it was trained from.
        other: The base that takes over its change.
        strength: How much of the change.
        names: How the messages name the three of them.
    """

    distilled: WeightSource
    base: WeightSource
    other: WeightSource
    strength: float
    names: tuple[str, str, str]

    @property
    def config(self) -> NetworkConfig:
        """Sizes and times of the trained model."""
        return self.distilled.config

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by name.

        Raises:
            UsageError: The three models differ in their tensors.
        """
        trained, base, other = (one.lazy_weights() for one in (self.distilled, self.base, self.other))
        for weights, name in ((base, self.names[1]), (other, self.names[2])):
            self._check(trained, weights, name)
        return {name: self._weight(name, weight, base, other) for name, weight in trained.items()}

    def _check(
        self, trained: Mapping[str, LazyWeight], weights: Mapping[str, LazyWeight], place: str
    ) -> None:
        """Refuse a base with other tensors."""
        hint = "Name models of the same family and size, as one folder or as HIGH,LOW."
        found = {_counterpart(name, weights) for name in trained}
        missing = sorted(
            name
            for name in trained
            if _counterpart(name, weights) is None and PROJECTION not in name and FAR not in name
        )
        if names := missing or sorted(weights.keys() - found):
            where = place if missing else self.names[0]
            raise UsageError(
                f"{place} is not of the shapes of {self.names[0]}: {listed(names)} missing in {where}.", hint
            )
        for name, weight in trained.items():
            own = weights.get(_counterpart(name, weights) or "")
            if own is not None and own.shape != weight.shape:
                raise UsageError(
                    f"{shown(name)} has shape {tuple(own.shape)} in {place} and {tuple(weight.shape)} in "
                    f"{self.names[0]}.",
                    hint,
                )

    def _weight(
        self, name: str, weight: LazyWeight, base: Mapping[str, LazyWeight], other: Mapping[str, LazyWeight]
    ) -> LazyWeight:
        if name.rpartition(FAR)[1]:
            return weight
        return LazyWeight(weight.shape, weight.dtype, lambda: self._load(name, weight, base, other))

    @torch.no_grad()
    def _load(
        self, name: str, weight: LazyWeight, base: Mapping[str, LazyWeight], other: Mapping[str, LazyWeight]
    ) -> Tensor:
        trained = weight.load().float()
        before, target = (
            weights[found].load().float() if found else torch.zeros_like(trained)
            for weights in (base, other)
            for found in [_counterpart(name, weights)]
        )
        change = trained - before.to(trained.device)
        return (target.to(trained.device) + self.strength * change).to(weight.dtype)


def _counterpart(name: str, weights: Mapping[str, LazyWeight]) -> str | None:
    """Name of the weight of a base that a trained one began as; None: it began as zero, or as a copy."""
    if name in weights:
        return name
    first = name.replace(SECOND_TIME, FIRST_TIME)
    return first if first in weights else None
