"""A training step rehearsed: the real objectives, and networks whose tensors have shapes but no storage.

An objective asks its roles for velocities. Here it runs on latents of two numbers, where everything that
decides (times, shares, which samples, how many jumps) is computed for real, and each velocity is answered by
a ``StandIn``. For a ``CallLog`` that is all: it tells which network calls a step makes. For a ``Rehearsal``
the stand-in also runs the real network, in its role, on fake tensors of the true shapes, forward and, when
the small graph's backward reaches it, backward; a ``Ledger`` counts what that holds.

The rehearsal runs the network's path for CPUs, whose rotation of queries and keys makes fewer temporaries
than the one for GPUs; with checkpointing the peak lies elsewhere in the block.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._python_dispatch import _disable_current_modes

from anyflow_cli.data.batches import Batch
from anyflow_cli.flow.samplers import flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.precision import autocast
from anyflow_cli.model.roles import Backbone, Role
from anyflow_cli.model.rotary import rotation
from anyflow_cli.plan.ledger import BETWEEN, Label, Ledger, Segment, Watch, storage_bytes
from anyflow_cli.plan.setup import Setup, backbone_on_meta, objective_of
from anyflow_cli.train.draws import Draws

SMALL = 2  # numbers that stand for a sample's latents, and for its text


class Bound(Protocol):
    """A condition as ``flow.Velocity`` has it, without the call."""

    def take(self, index: Tensor) -> Any:
        """These samples only."""

    def join(self, *others: Any) -> Any:
        """One batch after another."""


class Stage(Protocol):
    """Whoever hears what the stand-ins are asked."""

    anchors: dict[Role, Tensor]

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Note or rehearse one network call; gives its backward pass. ``into``: z needs gradient."""


class StandIn:
    """A velocity of small latents (B, 2, 1, 1, 1): zeros, and a word to the stage."""

    def __init__(self, stage: Stage, role: Role, bound: Bound) -> None:
        self.stage, self.role, self.bound = stage, role, bound

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Velocity of z (B, 2, 1, 1, 1)."""
        anchor = self.stage.anchors[self.role]
        wanted = torch.is_grad_enabled() and (anchor.requires_grad or z.requires_grad)
        label = Label(self.role, "forward", len(z), wanted)
        backward = self.stage.evaluate(label, self.bound, wanted and z.requires_grad)
        velocity: Tensor = _Evaluation.apply(z, anchor, backward)  # type: ignore[no-untyped-call]
        return velocity

    def take(self, index: Tensor) -> StandIn:
        """These samples only."""
        return StandIn(self.stage, self.role, self.bound.take(index))

    def join(self, *others: Velocity) -> StandIn:
        """One batch after another."""
        bounds = [cast("StandIn", other).bound for other in others]
        return StandIn(self.stage, self.role, self.bound.join(*bounds))


class _Evaluation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, anchor: Tensor, backward: Callable[[], None]) -> Tensor:
        ctx.run = backward
        return torch.zeros_like(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.run()
        return torch.zeros_like(gradient) if ctx.needs_input_grad[0] else None, None, None


def small_batch(samples: int) -> Batch:
    """A micro batch of small latents (B, 2, 1, 1, 1) and texts (B, 2, 1)."""
    return Batch(
        torch.zeros(samples, SMALL, 1, 1, 1), torch.zeros(samples, SMALL, 1), [""] * samples, [0] * samples
    )


SMALL_NEGATIVE = torch.zeros(SMALL, 1)


def anchors_of(setup: Setup) -> dict[Role, Tensor]:
    """For each role a weight that stands for its own."""
    return {role: torch.zeros(1, requires_grad=role in ("student", "fake")) for role in setup.roles}


# --- which calls a step makes


class _Unbound:
    def take(self, index: Tensor) -> _Unbound:
        return self

    def join(self, *others: _Unbound) -> _Unbound:
        return self


class CallLog:
    """Stands for a backbone, and lists the forward calls of its networks."""

    def __init__(self, setup: Setup) -> None:
        self.anchors = anchors_of(setup)
        self.calls: list[Label] = []

    def velocity(self, role: Role, text: Tensor) -> StandIn:
        """As ``Backbone.velocity``."""
        return StandIn(self, role, _Unbound())

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Write it down."""
        self.calls.append(label)
        return _nothing


def calls_of(setup: Setup, draws: Draws) -> list[Label]:
    """The network calls of one micro batch, in order; none of the backward passes."""
    log = CallLog(setup)
    for phase in objective_of(setup, cast("Backbone", log), SMALL_NEGATIVE).phases:
        for term in phase.terms:
            term(small_batch(len(draws.positions)), draws)
    return log.calls


# --- what they hold and compute


@contextmanager
def own_rotations() -> Iterator[None]:
    """Keep fake rotations out of the cache that real networks share, and real ones from the rehearsal."""
    rotation.cache_clear()
    try:
        yield
    finally:
        rotation.cache_clear()


class Rehearsal:
    """Stands for a backbone whose networks have ``depth`` blocks; ``step`` fills the ledger.

    ``keeps_gradients``: they exist before the step and outlive it, as with several processes (DDP's buckets)
    or micro batches; then they are not counted here.
    """

    def __init__(self, setup: Setup, depth: int, *, keeps_gradients: bool) -> None:
        self.setup, self.keeps_gradients = setup, keeps_gradients
        self.anchors = anchors_of(setup)
        self.ledger = Ledger()
        self._fakes = FakeTensorMode()
        self.backbone = backbone_on_meta(setup, depth)
        without_storage(self.backbone, self._fakes)
        for parameter in self.backbone.parameters():
            self._settle(parameter)

    def _settle(self, parameter: nn.Parameter) -> None:
        """Weights are counted elsewhere; gradients as their own part, if here at all."""
        self.ledger.ignore(parameter)
        if not parameter.requires_grad:
            return
        if self.keeps_gradients:
            with self._fakes:
                parameter.grad = torch.zeros_like(parameter)
            self.ledger.ignore(parameter.grad)
        else:
            parameter.register_post_accumulate_grad_hook(self._own_gradient)  # type: ignore[no-untyped-call]

    def _own_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.move(parameter.grad, "gradients")

    def velocity(self, role: Role, text: Tensor) -> StandIn:
        """As ``Backbone.velocity``, for small texts (B, 2, 1)."""
        with self._fakes:
            embeddings = torch.empty(len(text), *self.setup.text)
        self.ledger.ignore(embeddings)  # as the small text's weight, or a view of it
        return StandIn(self, role, _Text(self, self.backbone.velocity(role, embeddings)))

    @own_rotations()
    def step(self, draws: Draws) -> list[Segment]:
        """All phases on one micro batch, and what each stretch of them held."""
        batch = small_batch(len(draws.positions))
        for given in (batch.latents, batch.text, SMALL_NEGATIVE):
            self.ledger.ignore(given)
        objective = objective_of(self.setup, cast("Backbone", self), SMALL_NEGATIVE)
        with Watch(self.ledger, self._true_size, "latents"):
            for phase in objective.phases:
                for term in phase.terms:
                    self._differentiate(term, batch, draws)
                for parameter in self.backbone.parameters_of(phase.role):
                    if not self.keeps_gradients:
                        parameter.grad = None
        return self.ledger.segments

    @own_rotations()
    @torch.no_grad()
    def sample(self, samples: int, *, is_guided: bool) -> list[Segment]:
        """Two steps of sampling, of which any number more would hold as much."""
        batch = small_batch(samples)
        velocity: Velocity = self.velocity("student", batch.text)
        if is_guided:
            velocity = guided(velocity, self.velocity("student", batch.text), 2.0)
        with Watch(self.ledger, self._true_size, "latents"), autocast(self.setup.precision, "cpu"):
            flow_map_euler(velocity, batch.latents, grid(2, self.setup.model.shift))
        return self.ledger.segments

    def _differentiate(self, term: Any, batch: Batch, draws: Draws) -> None:
        with autocast(self.setup.precision, "cpu"):
            loss, _ = term(batch, draws)
        loss.backward()

    def _true_size(self, tensor: Tensor) -> int:
        """Bytes of the latents or the text that a small tensor stands for."""
        small = not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu"
        if not small or tensor.dim() not in (3, 5) or tensor.shape[1] != SMALL:
            return 0
        sample = self.setup.latent if tensor.dim() == 5 else self.setup.text
        return len(tensor) * math.prod(sample) * tensor.element_size()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is done inside, is done by fake tensors and counted."""
        watch = Watch(self.ledger, storage_bytes, "activations", counts_operations=True, gpu=self.setup.gpu)
        # The watch over small tensors would see, and be slowed by, all that fake tensors do inside.
        with _disable_current_modes(), self._fakes, watch:
            yield

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Run the role's network forward; the result runs it backward."""
        self.ledger.begin(label)
        conditioned: Conditioned = bound.conditioned
        with self._fakes:
            z = torch.empty(label.samples, *self.setup.latent, requires_grad=into)
            t = torch.empty(label.samples)
        self.ledger.ignore(z)  # counted as the small latents
        with self.running(), torch.set_grad_enabled(label.with_gradient):
            u = conditioned(z, t, t)
        self.ledger.begin(BETWEEN)
        return _nothing if u.grad_fn is None else partial(self._backward, label, get_gradient_edge(u))

    def _backward(self, label: Label, edge: GradientEdge) -> None:
        self.ledger.begin(label._replace(direction="backward"))
        with self._fakes:
            gradient = torch.empty(label.samples, *self.setup.latent)
        self.ledger.ignore(gradient)  # as z
        with self.running():
            torch.autograd.backward(edge, gradient)
        self.ledger.begin(BETWEEN)


def _nothing() -> None:
    """The backward pass of a call without gradient."""


class _Text:
    """A role's network with its text bound, while rehearsing."""

    def __init__(self, rehearsal: Rehearsal, conditioned: Conditioned) -> None:
        self._rehearsal, self.conditioned = rehearsal, conditioned

    def take(self, index: Tensor) -> _Text:
        with self._rehearsal.running():
            fake = torch.empty(index.shape, dtype=torch.int64)
            return _Text(self._rehearsal, self.conditioned.take(fake))

    def join(self, *others: _Text) -> _Text:
        with self._rehearsal.running():
            return _Text(self._rehearsal, self.conditioned.join(*(other.conditioned for other in others)))


def without_storage(module: nn.Module, fakes: FakeTensorMode) -> None:
    """Turn a module's meta tensors into fake ones, which know a device and may be mixed with no others."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                with fakes:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                part._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                with fakes:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
