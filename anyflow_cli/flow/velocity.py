"""What a velocity model is: the one contract between this room and everything that predicts ``u``.

Here: the protocol, closed-form models, classifier-free guidance, and the flow map that follows from ``u``.
Not here: networks (``anyflow_cli.model``). A model carries its condition with it, so whoever calls it may
drop, repeat or concatenate samples (``take``, ``join``) and text, chunks and caches follow.

Shapes: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for the batch, or one for each sample: then a sample's noise does not depend on its batch."""


class Velocity(Protocol):
    """Average velocity ``u(z, t, r)`` over ``[r, t]``, with the condition of each of the B samples bound."""

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict u (B, F, C, H, W) of z (B, F, C, H, W) at times t, r (B,) or (B, F) in [0, 1], r <= t."""

    def take(self, index: Tensor) -> Velocity:
        """Bind the conditions of these samples only; index (N,) may repeat and reorder."""

    def join(self, *others: Velocity) -> Velocity:
        """Bind the conditions of self and the others one after the other along the batch."""


@dataclass(frozen=True)
class VelocityInputs:
    """What a model is asked: u at states z (B, F, C, H, W) and times t, r, (B,) or (B, F)."""

    model: Velocity
    z: Tensor
    t: Tensor
    r: Tensor

    def take(self, index: Tensor) -> VelocityInputs:
        """Ask for these samples only."""
        return VelocityInputs(self.model.take(index), self.z[index], self.t[index], self.r[index])


def evaluate_together(*queries: VelocityInputs) -> tuple[Tensor, ...]:
    """Answer several queries to one network in one call; an answer has the shape and dtype of its z."""
    z = torch.cat([query.z for query in queries])
    if len(z) == 0:
        return tuple(query.z for query in queries)
    model = queries[0].model.join(*(query.model for query in queries[1:]))
    u = model(z, torch.cat([query.t for query in queries]), torch.cat([query.r for query in queries]))
    return torch.split(u.to(z.dtype), [len(query.z) for query in queries])


@dataclass(frozen=True)
class _Closed:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return self.function(z, t, r)

    def take(self, index: Tensor) -> Velocity:
        return self

    def join(self, *others: Velocity) -> Velocity:
        return self


@dataclass(frozen=True)
class _Guided:
    model: Velocity
    null: Velocity
    scale: float

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u, u_null = evaluate_together(VelocityInputs(self.model, z, t, r), VelocityInputs(self.null, z, t, r))
        return u_null + self.scale * (u - u_null)

    def take(self, index: Tensor) -> Velocity:
        return _Guided(self.model.take(index), self.null.take(index), self.scale)

    def join(self, *others: Velocity) -> Velocity:
        parts = cast("tuple[_Guided, ...]", others)
        assert all(part.scale == self.scale for part in parts)
        model = self.model.join(*(part.model for part in parts))
        null = self.null.join(*(part.null for part in parts))
        return _Guided(model, null, self.scale)


def from_function(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Velocity:
    """Make a function of (z, t, r) that has no condition a velocity model."""
    return _Closed(function)


def guided(model: Velocity, null: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance, ``u_null + scale (u - u_null)``, in one call of twice the batch."""
    return _Guided(model, null, scale)


@dataclass(frozen=True)
class _Recomputed:
    model: Velocity

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        u = checkpoint(self.model, z, t, r, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(u, Tensor)
        return u

    def take(self, index: Tensor) -> Velocity:
        return _Recomputed(self.model.take(index))

    def join(self, *others: Velocity) -> Velocity:
        parts = cast("tuple[_Recomputed, ...]", others)
        return _Recomputed(self.model.join(*(part.model for part in parts)))


def checkpointed(model: Velocity) -> Velocity:
    """The same velocity, evaluated again in the backward pass instead of keeping its graph until then.

    A chain of jumps then holds one evaluation's graph at a time. Nothing random may be in the model.
    """
    return _Recomputed(model)


def per_frame(t: Tensor, z: Tensor) -> Tensor:
    """Bring times t (B,) or (B, F) to z's rank, (B, 1, 1, 1, 1) or (B, F, 1, 1, 1)."""
    return t.reshape(*t.shape, *(1,) * (z.ndim - t.ndim))


def flow_map(model: Velocity, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Jump along the path from time t to time r (Eq. 2): ``f(z, t, r) = z - (t - r) u(z, t, r)``."""
    return z - per_frame(t - r, z) * model(z, t, r)


def batch_time(t: float, z: Tensor) -> Tensor:
    """Give one time to the whole batch of z (B, ...): (B,)."""
    return z.new_full((z.shape[0],), t)


def noise_like(z: Tensor, generator: Generators) -> Tensor:
    """Draw N(0, I) of z's shape where the generator lives: one of the CPU gives the same anywhere."""
    if isinstance(generator, Sequence):
        return torch.stack([noise_like(sample, own) for sample, own in zip(z, generator, strict=True)])
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
