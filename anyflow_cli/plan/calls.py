"""Which network calls a training step makes, found by running its objective on small latents.

An objective asks its roles for velocities. Here it runs on small latents, where everything that decides
(times, shares, which samples, how many jumps, which chunks) is computed for real, and each velocity is
answered by a ``StandIn``, which tells a stage. For a ``CallLog`` that is all; a ``Rehearsal`` (there) then
runs the real network without storage.

Small latents have all frames of the true ones, each as large as the largest patch; so a layout of small
latents is that of the true ones with all numbers of tokens divided by one number.

Legend: B batch, F latent frames, h w small height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.layout import Layout
from anyflow_cli.plan.ledger import Label
from anyflow_cli.plan.setup import Setup, objective_of
from anyflow_cli.recipe.schema import DistillSection
from anyflow_cli.train.objectives import LossTerm
from anyflow_cli.train.rng import StepRng

SMALL = 2  # channels of small latents, and numbers that stand for a sample's text


class Bound(Protocol):
    """A condition as ``flow.Velocity`` has it, without the call."""

    def select(self, index: Tensor) -> Any:
        """These samples only."""

    def concat(self, *others: Any) -> Any:
        """One batch after another."""

    def with_layout(self, layout: Layout, keys: LayerKeys | None) -> Any:
        """Over a layout of small latents, and small keys where the layout has cached ones."""


class Stage(Protocol):
    """Whoever hears what the stand-ins are asked."""

    anchors: dict[Role, Tensor]
    network: SmallNetwork

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Note or rehearse one network call; gives its backward pass. ``into``: z needs gradient."""


class SmallNetwork(nn.Module):
    """What rollouts, caches and objectives ask of a network besides velocities."""

    def __init__(self, setup: Setup, depth: int) -> None:
        super().__init__()
        self.config = replace(setup.config, layers=setup.network.layers - setup.depth + depth)
        self.gradient_checkpointing = setup.model.gradient_checkpointing
        self.compute_dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
        self.device = torch.device("cpu")
        self.far_patch_embedding = nn.Linear(1, 1)


class StandIn:
    """A velocity of small latents (B, F, 2, h, w): zeros, and a word to the stage."""

    def __init__(self, stage: Stage, role: Role, bound: Bound, layout: Layout | None = None) -> None:
        self.stage, self.role, self.bound, self.layout = stage, role, bound, layout

    @property
    def network(self) -> SmallNetwork:
        """As ``Conditioned.network``."""
        return self.stage.network

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Velocity of the frames of z (B, F, 2, h, w) that the layout reads."""
        anchor = self.stage.anchors[self.role]
        wanted = torch.is_grad_enabled() and (anchor.requires_grad or z.requires_grad)
        label = Label(self.role, "forward", len(z), wanted, self.layout, t.dim() == 2)
        backward = self.stage.evaluate(label, self.bound, wanted and z.requires_grad)
        frames = z.shape[1]
        if self.layout is not None:
            frames = sum(segment.frames for segment in self.layout.inputs if segment.is_output)
        velocity: Tensor = _Evaluation.apply(z, anchor, frames, backward)  # type: ignore[no-untyped-call]
        return velocity

    def with_layout(self, layout: Layout, cache: LayerKeys | None = None) -> StandIn:
        """As ``Conditioned.over``."""
        return StandIn(self.stage, self.role, self.bound.with_layout(layout, cache), layout)

    def select(self, index: Tensor) -> StandIn:
        """These samples only."""
        return StandIn(self.stage, self.role, self.bound.select(index), self.layout)

    def concat(self, *others: Velocity) -> StandIn:
        """One batch after another."""
        bounds = [cast("StandIn", other).bound for other in others]
        return StandIn(self.stage, self.role, self.bound.concat(*bounds), self.layout)


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor, frames: int, backward: Callable[[], None]) -> Tensor:
        # The large graph lives as long as this storage, so as long as autograd keeps it: where an evaluation
        # is to be made again in the backward pass, not at all.
        kept = torch.empty(1)
        cast("Any", kept.untyped_storage()).backward = backward
        ctx.save_for_backward(kept)
        ctx.frames = z.shape[1]
        return z.new_zeros(len(z), frames, *z.shape[2:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (kept,) = ctx.saved_tensors
        kept.untyped_storage().backward()
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return gradient.new_zeros(len(gradient), ctx.frames, *gradient.shape[2:]), None, None, None


def small_batch(setup: Setup, samples: int) -> Batch:
    """A micro batch of small latents (B, F, 2, h, w) and texts (B, 2, 1)."""
    latents = torch.zeros(samples, setup.latent[0], SMALL, *setup.small)
    return Batch(latents, torch.zeros(samples, SMALL, 1), [""] * samples, [0] * samples)


SMALL_NEGATIVE = torch.zeros(SMALL, 1)


def anchors_of(setup: Setup) -> dict[Role, Tensor]:
    """For each role a weight that stands for its own."""
    return {role: torch.zeros(1, requires_grad=role in ("student", "fake")) for role in setup.roles}


def terms_of(setup: Setup, stage: Stage) -> list[tuple[Role, LossTerm]]:
    """The terms of all phases, and whose weights they move."""
    objective = objective_of(setup, cast("Backbone", stage), SMALL_NEGATIVE)
    return [(phase.role, term) for phase in objective.phases for term in phase.terms]


class _Unbound:
    def select(self, index: Tensor) -> _Unbound:
        return self

    def concat(self, *others: _Unbound) -> _Unbound:
        return self

    def with_layout(self, layout: Layout, keys: LayerKeys | None) -> _Unbound:
        return self


class CallLog:
    """Stands for a backbone, and lists the calls of its networks."""

    def __init__(self, setup: Setup) -> None:
        self.anchors = anchors_of(setup)
        self.network = SmallNetwork(setup, 1)
        self.network.config = replace(self.network.config, heads=1, head_dim=1)
        self.calls: list[Label] = []

    def velocity(self, role: Role, text: Tensor) -> StandIn:
        """As ``Backbone.velocity``."""
        return StandIn(self, role, _Unbound())

    def network_of(self, role: Role) -> SmallNetwork:
        """As ``Backbone.network_of``."""
        return self.network

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Write it down."""
        self.calls.append(label)
        return partial(self.calls.append, label._replace(direction="backward"))


def calls_of(setup: Setup, draws: StepRng, beside: Sequence[Sequence[Label]] = ()) -> list[list[Label]]:
    """The network calls of one micro batch, in order, forward and backward, of each term.

    ``beside``: those of another micro batch of the step. What an on-policy term asks for does not depend on
    which samples it is given, so that it need not be run again.
    """
    log = CallLog(setup)
    found = []
    for number, (_, term) in enumerate(terms_of(setup, log)):
        log.calls = []
        if beside and not _depends_on_samples(setup, number):
            log.calls = list(beside[number])
        else:
            loss, _ = term(small_batch(setup, len(draws.positions)), draws)
            loss.backward()  # type: ignore[no-untyped-call]
        found.append(log.calls)
    return found


def calls_of_step(setup: Setup, micros: Sequence[StepRng]) -> list[list[list[Label]]]:
    """The calls of all micro batches of a step."""
    first = calls_of(setup, micros[0])
    size = len(micros[0].positions)
    return [first, *(calls_of(setup, own, first if len(own.positions) == size else ()) for own in micros[1:])]


def _depends_on_samples(setup: Setup, term: int) -> bool:
    """Of stage 2's terms (matching, a flow map where it is joint, the fake score) only the flow map does."""
    settings = setup.settings
    return not isinstance(settings, DistillSection) or (settings.joint and term == 1)
