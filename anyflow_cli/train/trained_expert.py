"""Which expert of a model with two a step trains, and the times that belong to it.

An expert is trained on its own interval of times: the high-noise one on [b, 1], the low-noise one on [0, b).
With ``both``, each step draws one of them, alike on all processes: they then call the same networks, and
Eq. 7 compares losses of one expert. A model of one network has one interval, [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from anyflow_cli.flow.experts import ExpertName
from anyflow_cli.flow.times import WHOLE, TimeInterval
from anyflow_cli.recipe.schema import ExpertGuidance, scales_of
from anyflow_cli.train.rng import StepRng


@dataclass(frozen=True)
class StepExpert:
    """The expert that a step trains: its times, and its scale of guidance."""

    name: ExpertName = "low"
    interval: TimeInterval = WHOLE

    def scale(self, guidance: float | ExpertGuidance) -> float:
        """Scale of guidance of this expert."""
        high, low = scales_of(guidance)
        return high if self.name == "high" else low


@dataclass(frozen=True)
class TrainedExpert:
    """Chooses the expert of each step.

    Attributes:
        boundary: Where the experts meet; None: the model is one network.
        trains: Which of them is trained.
    """

    boundary: float | None = None
    trains: Literal["both", "high", "low"] = "both"

    def of_step(self, rng: StepRng) -> StepExpert:
        """The expert of a step: the same for every loss term and phase, and on every process."""
        if self.boundary is None:
            return StepExpert()
        if self.trains != "both":
            name: ExpertName = self.trains
        else:
            name = "high" if float(torch.rand((), generator=rng.generator("expert"))) < 0.5 else "low"
        return StepExpert(name, expert_times(self.boundary, name))

    def evaluations(self, t: float, r: float) -> int:
        """Network calls of a jump: two where it is composed at the boundary."""
        return 2 if self.boundary is not None and t > self.boundary > r else 1


ONE_NETWORK = TrainedExpert()


def expert_times(boundary: float, name: ExpertName) -> TimeInterval:
    """The interval of an expert; that of the low one ends with the last fp32 number below the boundary."""
    b = torch.tensor(boundary, dtype=torch.float32)
    below = float(torch.nextafter(b, torch.zeros(())))
    return TimeInterval(float(b), 1.0) if name == "high" else TimeInterval(0.0, below)
