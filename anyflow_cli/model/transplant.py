"""What training added to a base, added to another base of the same shapes, tensor by tensor.

    other + strength (distilled - base)

Strength 0 is the other base, and strength 1 onto the own base is the distilled model, both to the bit. Bases
with one time are first written as the flow map that training began with (``as_begun``), which equals them at
r = t: its second time embedder is a copy of the first, so its change is added to the other base's time
embedder. A causal model's compressed patch embedding is copied at any strength.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model.causal import FAR
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.experts import by_expert
from anyflow_cli.model.network import folded
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, listed, shown

FIRST_TIME, SECOND_TIME = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
PROJECTION = "condition_embedder.delta_proj.weight"
FOLDED = (0.5, "t-r")  # gate and input of the second time in a folded zero-init network


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
        trained = self.distilled.lazy_weights()
        base, other = (as_begun(one, self.config) for one in (self.base, self.other))
        for weights, name in ((base, self.names[1]), (other, self.names[2])):
            self._check(trained, weights, name)
        return {name: self._weight(name, weight, base, other) for name, weight in trained.items()}

    def _check(
        self, trained: Mapping[str, LazyWeight], weights: Mapping[str, LazyWeight], place: str
    ) -> None:
        """Refuse a base with other tensors."""
        hint = "Name models of the same family and size, as one folder or as HIGH,LOW."
        missing = sorted(name for name in trained.keys() - weights.keys() if FAR not in name)
        if names := missing or sorted(weights.keys() - trained.keys()):
            where = place if missing else self.names[0]
            raise UsageError(
                f"{place} is not of the shapes of {self.names[0]}: {listed(names)} missing in {where}.", hint
            )
        for name, own in weights.items():
            if own.shape != trained[name].shape:
                raise UsageError(
                    f"{shown(name)} has shape {tuple(own.shape)} in {place} and "
                    f"{tuple(trained[name].shape)} in {self.names[0]}.",
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
        before, target = (weights[name].load().float().to(trained.device) for weights in (base, other))
        return (target - self.strength * before + self.strength * trained).to(weight.dtype)


def as_begun(source: WeightSource, config: NetworkConfig) -> dict[str, LazyWeight]:
    """The weights of a base as the flow map of some settings that training begins with, read when used.

    A base with two times is that already. Weights of the zero-init conditioning are folded where those of the
    trained model are, see ``network.folded``: they are known by its gate and their t - r.

    Raises:
        UsageError: The base has two times, but conditions on them in another way.
    """
    weights = source.lazy_weights()
    if not config.two_time:
        return weights
    if source.config.two_time:
        settings = [(one.gate, one.delta, one.conditioning) for one in (config, source.config)]
        if settings[0] != settings[1]:
            raise UsageError(
                "The models condition on the second time in two ways (gate, input, kind): "
                f"{settings[0]} and {settings[1]}.",
                "Name the plain Wan that both began as, or one trained with the same settings.",
            )
        return weights
    begun: dict[str, LazyWeight] = {}
    is_folded = config.conditioning == "interpolate" and (config.gate, config.delta) == FOLDED
    for expert, own in by_expert(weights).items():
        own |= {name.replace(FIRST_TIME, SECOND_TIME): one for name, one in own.items() if FIRST_TIME in name}
        if is_folded or config.conditioning == "zero-init":
            shape = own[f"{FIRST_TIME}linear_2.weight"].shape
            own[PROJECTION] = LazyWeight(shape, torch.float32, partial(torch.zeros, shape))
        if is_folded:
            _, own = folded(replace(config, conditioning="zero-init"), own)
        begun |= {f"{expert}.{name}" if expert else name: one for name, one in own.items()}
    return begun
