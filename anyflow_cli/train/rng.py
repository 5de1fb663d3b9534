"""All randomness of a training step, as a function of (seed, step, name of the stream).

Nothing is drawn from a generator that lives longer than a step. So a run resumed at any step draws what
the undisturbed run draws, and because every draw is made for the whole global batch and then cut, it does
not depend on the number of processes or on the micro batch either.

Positions: the samples of a global batch are numbered 0..N-1. Process k of K holds k, k+K, k+2K, ...; its
micro batches are consecutive runs of these, so the m-th micro batches of all processes together are a
consecutive run of the global batch. The objectives order their draws boundary samples first, which makes
Eq. (7)'s mean exact under accumulation: see ``BoundaryMean``.

Legend: N global batch, B micro batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from anyflow_cli.flow.noise import batch_noise

Reduce = Callable[[Tensor], Tensor]
GENERATOR_BITS = 0xFFFFFFFF  # of a seed, which torch's CPU generator reads


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts: equal parts, equal seed, on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class BoundaryMean:
    """Mean over samples of the global batch (Eq. 7), exact with accumulation and over processes.

    Boundary samples come first in the global batch and the m-th micro batches of all processes are a
    consecutive run of it. So when the first other sample needs the mean, every boundary sample has had its
    forward pass, here or elsewhere: a running sum, reduced over processes in each micro batch, is then
    complete. One for each phase, term and step.
    """

    def __init__(self, reduce: Reduce) -> None:
        self._reduce = reduce
        self._total: Tensor | float = 0.0

    def __call__(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean of values (B,) where mask (B,) holds, over all seen in this step; NaN if it held nowhere."""
        total = self._total + self._reduce(torch.stack([values[mask].double().sum(), mask.sum().double()]))
        self._total = total
        return (total[0] / total[1]).to(values.dtype)


@dataclass(frozen=True)
class StepRng:
    """The random numbers of one micro batch."""

    seed: int
    step: int
    count: int  # N
    positions: tuple[int, ...]  # of this micro batch's samples in the global batch
    global_mean: BoundaryMean = field(default_factory=lambda: BoundaryMean(lambda values: values))

    def generator(self, stream: str) -> torch.Generator:
        """The same on every process; for what the whole global batch shares or is cut from by ``local``."""
        return torch.Generator().manual_seed(stream_seed(self.seed, self.step, stream) & GENERATOR_BITS)

    def local(self, values: Tensor) -> Tensor:
        """Cut a global draw (N, ...) to this micro batch (B, ...)."""
        return values[list(self.positions)]

    def generators(self, stream: str) -> list[torch.Generator]:
        """One for each sample (B); for draws that the callee makes."""
        return [torch.Generator().manual_seed(seed) for seed in self._seeds(stream)]

    def noise(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, *shape), a generator for each sample."""
        return batch_noise(self._seeds(stream), shape)

    def _seeds(self, stream: str) -> list[int]:
        seeds = [stream_seed(self.seed, self.step, stream, position) for position in self.positions]
        return [seed & GENERATOR_BITS for seed in seeds]
