"""Loss terms: the parts that an objective adds up, how they are combined, and what they report.

A term returns its mean loss over the micro-batch and, for reports, pairs (sum, count), which add up exactly
over micro-batches and processes. It also declares the network calls that it makes with the same random
numbers (``network_calls``), from which ``anyflow plan`` computes FLOPs and memory.

Legend: N global batch, B micro-batch, F latent frames, C channels, H W latent height and width, L text
tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.parallelize import local_tensor
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.rng import StepRng, stream_seed

Sums = Mapping[str, Tensor]  # name -> (sum, count), (2,)
LatentShape = tuple[int, int, int, int]  # F, C, H, W


class LossTerm(Protocol):
    """One loss of a phase, on a micro batch."""

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Evaluate the mean loss () of a micro-batch, and what is reported of it."""

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """List the forward passes that ``__call__`` makes with these random numbers, in order."""


@dataclass(frozen=True)
class FunctionTerm:
    """A loss term from two functions: the loss, and the declaration of its network calls."""

    loss: Callable[[Batch, StepRng], tuple[Tensor, Sums]]
    calls: Callable[[LatentShape, StepRng], list[NetworkCall]]

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Call ``loss``."""
        return self.loss(batch, rng)

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """Call ``calls``."""
        return self.calls(latent, rng)


def with_probability(term: LossTerm, share: float, stream: str) -> LossTerm:
    """The term in a ``share`` of the steps, drawn alike on all processes, with random numbers of its own.

    In the other steps its loss is 0 and it makes no calls.
    """

    def own_rng(rng: StepRng) -> StepRng | None:
        if float(torch.rand((), generator=rng.generator(stream))) >= share:
            return None
        return replace(rng, seed=stream_seed(rng.seed, stream))

    def loss(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        own = own_rng(rng)
        return (batch.latents.new_zeros(()), {}) if own is None else term(batch, own)

    def calls(latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        own = own_rng(rng)
        return [] if own is None else term.network_calls(latent, own)

    return FunctionTerm(loss, calls)


def touch_unused(term: LossTerm, backbone: Backbone) -> LossTerm:
    """The term with a zero gradient for the compressed patch embedding where no chunk is compressed.

    Every process needs a gradient for every weight, and the optimizer must treat a step in which only some
    processes have one like any other.
    """

    def loss(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        value, report = term(batch, rng)
        embedding = backbone.network_of("student").far_patch_embedding
        return value + 0 * sum(local_tensor(weight).sum() for weight in embedding.parameters()), report

    return FunctionTerm(loss, term.network_calls)


def weighted(term: LossTerm, weight: float, prefix: str) -> LossTerm:
    """The term times ``weight``; its report keeps its scale, and its names get a prefix."""

    def scaled(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        loss, report = term(batch, rng)
        return weight * loss, {prefix + name: value for name, value in report.items()}

    return FunctionTerm(scaled, term.network_calls)


def drop_text(batch: Batch, negative: Tensor, share: float, rng: StepRng) -> tuple[Batch, Tensor]:
    """Replace the text of a ``share`` of the samples by ``negative`` (L, D); and which, (B,) on the host."""
    own = batch.condition.text
    dropped = dropped_text(share, rng)
    text = torch.where(dropped.to(own.device)[:, None, None], negative.to(own), own)
    return replace(batch, condition=batch.condition.with_text(text)), dropped


def dropped_text(share: float, rng: StepRng) -> Tensor:
    """Draw which samples (B,) of a micro-batch lose their text."""
    return rng.local(torch.rand(rng.count, generator=rng.generator("text-dropout"))) < share


def sums(values: Tensor, of: Tensor | int) -> Tensor:
    """Sum and count (2,) of values (B,) where the mask (B,) is true, or of a mean () over ``of`` samples."""
    values = values.detach().double()
    if isinstance(of, int):
        return torch.stack([values * of, torch.full_like(values, of)])
    return torch.stack([values.where(of, 0).sum(), of.sum().double()])  # an index by a mask would wait


def power_and_motion(name: str, x: Tensor) -> Sums:
    """Mean square of videos x (B, F, C, H, W) and of the change between frames; the alarms compare both."""
    power, motion = x.detach().square().mean(), x.detach().diff(dim=1).square().sum() / x.numel()
    return {f"{name}_power": sums(power, len(x)), f"{name}_motion": sums(motion, len(x))}


def uncond_velocity(backbone: Backbone, role: Role, negative: Tensor, batch: Batch) -> Velocity:
    """The role's velocity under the negative prompt."""
    return backbone.velocity(role, batch.condition.with_text(negative))


def micro_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Cut samples ``start`` to ``stop`` out of a batch."""
    part = slice(start, stop)
    return Batch(batch.latents[part], batch.condition[part], batch.captions[part], batch.seeds[part])
