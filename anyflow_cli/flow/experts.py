"""Two velocities over one boundary in time, as one velocity: the two experts of Wan 2.2 A14B.

``by_time`` evaluates the high-noise expert at t >= b and the low-noise one below. A jump across the boundary,
t > b > r, is composed there: the high expert jumps from t to b, the low one from b to r, and the result is
the average velocity of both. Where each expert is the exact flow map of its part, so is the composition.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from anyflow_cli.flow.velocity import Velocity, from_function, per_frame

ExpertName = Literal["high", "low"]
EXPERTS: tuple[ExpertName, ExpertName] = ("high", "low")
FindExpert = Callable[[ExpertName], Velocity]


class ByTime:
    """A velocity that picks its expert by time; an expert is looked up when it is first evaluated."""

    def __init__(self, find: FindExpert, boundary: float) -> None:
        self._find, self.boundary = find, boundary
        self._found: dict[ExpertName, Velocity] = {}

    def expert(self, name: ExpertName) -> Velocity:
        """One of the experts, under the same condition."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict u (B, F, C, H, W) of z at times t and r, (B,) or (B, F)."""
        b = self.boundary
        # A sample's expert follows from its latest frame; clean ones may have times of their own. Of a jump
        # from b itself nothing is left for the high expert.
        start, end = (times.reshape(len(times), -1).amax(1) for times in (t, r))
        is_high, is_low = (start > b) | ((start == b) & (end == b)), end < b
        high, low = is_high.nonzero().squeeze(1), is_low.nonzero().squeeze(1)
        if len(low) == 0:
            return self.expert("high")(z, t, r)
        if len(high) == 0:
            return self.expert("low")(z, t, r)
        across, u_high, u_low = self._across(z, t, r, high, low)
        return torch.where(
            per_frame(is_high & is_low, z), across, torch.where(per_frame(is_high, z), u_high, u_low)
        )

    def at_times(self, t: float, r: float) -> Velocity:
        """The velocity of a batch that is at times t and r as a whole, chosen as for tensors of times."""
        t, r, b = torch.tensor((t, r, self.boundary)).tolist()  # in single precision, like tensors of times
        if r >= b:
            return self.expert("high")
        if t <= b:
            return self.expert("low")
        return from_function(lambda *inputs: self._across(*inputs)[0])

    def _across(
        self, z: Tensor, t: Tensor, r: Tensor, high: Tensor | None = None, low: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Velocities of jumps across the boundary, and of their parts by the high and the low expert.

        Args:
            z: States (B, F, C, H, W).
            t: Times where the jumps start, (B,) or (B, F).
            r: Times where they end.
            high: Samples that the high expert is evaluated on; None: all.
            low: The same of the low expert.
        """
        between = torch.minimum(t, r.clamp(min=self.boundary))  # where the high expert's part ends
        u_high = self._evaluate("high", high, z, t, between)
        at_b = z - per_frame(t - between, z) * u_high
        u_low = self._evaluate("low", low, at_b, between, r)
        share = per_frame(torch.where(t > r, (t - between) / (t - r), 0), z)
        return share * u_high + (1 - share) * u_low, u_high, u_low

    def _evaluate(self, name: ExpertName, index: Tensor | None, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Evaluate an expert on the samples ``index``, by default all; 0 elsewhere."""
        if index is None or len(index) == len(z):
            return self.expert(name)(z, t, r)
        u = self.expert(name).select(index)(z[index], t[index], r[index])
        return torch.zeros_like(z, dtype=u.dtype).index_copy(0, index, u)

    def select(self, index: Tensor) -> Velocity:
        """Bind the conditions of the samples ``index`` (N,) only."""
        return ByTime(lambda name: self.expert(name).select(index), self.boundary)

    def concat(self, *others: Velocity) -> Velocity:
        """Bind the conditions of self and the others, concatenated along the batch."""
        if not others:
            return self
        parts = cast("tuple[ByTime, ...]", others)
        return ByTime(
            lambda name: self.expert(name).concat(*(part.expert(name) for part in parts)), self.boundary
        )


def by_time(find: FindExpert, boundary: float) -> ByTime:
    """One velocity of two experts.

    Args:
        find: Returns an expert, when it is needed: one that is never evaluated is never asked for.
        boundary: b, where the experts meet. The high expert answers at t = r = b.
    """
    return ByTime(find, boundary)


@dataclass(frozen=True)
class ExpertScale:
    """A scale of guidance for each of two experts, as a function of time."""

    high: float
    low: float
    boundary: float

    def __call__(self, t: Tensor) -> Tensor:
        """The scale of the expert that answers at t = r, in the shape of t."""
        return torch.where(t >= self.boundary, self.high, self.low)
