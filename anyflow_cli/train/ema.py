"""Exponential moving average (EMA) of the student's trainable weights.

Before step ``start`` the average equals the weights, so a short run does not average in its random start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyflow_cli.model.parallelize import shard_like


class WeightEma:
    """Averages of named parameters, with ``decay`` per step from step ``start`` (from 1) on."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, start: int) -> None:
        self.parameters = dict(parameters)
        self.decay, self.start = decay, start
        self.shadow = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update after an optimizer step: ``shadow = decay * shadow + (1 - decay) * weight``."""
        decay = self.decay if step >= self.start else 0.0
        shadow = [self.shadow[name] for name in self.parameters]
        torch._foreach_lerp_(shadow, list(self.parameters.values()), 1 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages in place of the weights for a block: for previews and for the saved model."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.parameters.items():
            weight = value.detach().clone()
            value.copy_(self.shadow[name])
            self.shadow[name].copy_(weight)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore saved averages.

        Raises:
            ValueError: They are of other parameters.
        """
        if {name: value.shape for name, value in shadow.items()} != {
            name: value.shape for name, value in self.shadow.items()
        }:
            raise ValueError("the averages are of other parameters")
        for name, value in self.shadow.items():
            value.copy_(shard_like(shadow[name], value))
