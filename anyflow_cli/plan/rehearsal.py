"""A training step rehearsed: the real objectives, and networks whose tensors have shapes but no storage.

An objective runs on small latents (``calls.py``). Each velocity that it asks for is also computed by the real
network, in its role, on hollow tensors of the true shapes, forward and, when the small graph's backward
reaches it, backward; a ``Ledger`` counts what that holds.

The rehearsal runs the network's path for CPUs, whose rotation of queries and keys makes fewer temporaries
than the one for GPUs; with checkpointing the peak lies elsewhere in the block.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width, E
heads, d channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.samplers import flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.backbone import Role
from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.causal import causal_of, partition_for, remembered_for
from anyflow_cli.model.chunk_sampling import sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.layout import Layout
from anyflow_cli.model.precision import autocast
from anyflow_cli.model.rotary import rotation
from anyflow_cli.plan.calls import (
    SMALL,
    SMALL_NEGATIVE,
    SmallNetwork,
    StandIn,
    anchors_of,
    small_batch,
    terms_of,
)
from anyflow_cli.plan.hollow import Hollow, Hollowing, hollow_out
from anyflow_cli.plan.ledger import BETWEEN, Label, Ledger, Segment, Watch, Weight, storage_bytes
from anyflow_cli.plan.setup import Setup, backbone_on_meta
from anyflow_cli.recipe.schema import DistillSection
from anyflow_cli.train.objectives import LossTerm
from anyflow_cli.train.rng import StepRng

STEPS = 2  # of a rehearsed sampling: one more would hold nothing more


@contextmanager
def own_rotations() -> Iterator[None]:
    """Keep hollow rotations out of the cache that real networks share, and real ones from the rehearsal."""
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
        self.network = SmallNetwork(setup, depth)
        self.ledger = Ledger()
        self._known: dict[Label, Segment] = {}  # calls that leave nothing behind, as they were before
        self._hollowing = Hollowing()
        self._recomputes = isinstance(setup.settings, DistillSection) and setup.settings.recompute_rollout
        self.backbone = backbone_on_meta(setup, depth)
        hollow_out(self.backbone)
        for parameter in self.backbone.parameters():
            self._settle(parameter)

    def _settle(self, parameter: nn.Parameter) -> None:
        """Weights are counted elsewhere; gradients as their own part, if here at all."""
        self.ledger.ignore(parameter)
        if not parameter.requires_grad:
            return
        if self.keeps_gradients:
            with self._hollowing:
                parameter.grad = torch.zeros_like(parameter)
            self.ledger.ignore(parameter.grad)
        else:
            parameter.register_post_accumulate_grad_hook(self._own_gradient)  # type: ignore[no-untyped-call]

    def _own_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.move(parameter.grad, "gradients")

    def velocity(self, role: Role, text: Tensor) -> StandIn:
        """As ``Backbone.velocity``, for small texts (B, 2, 1)."""
        embeddings = self._uncounted(len(text), *self.setup.text)  # as the small text's weight, or a view
        return StandIn(self, role, _Text(self, self.backbone.velocity(role, embeddings)))

    def network_of(self, role: Role) -> SmallNetwork:
        """As ``Backbone.network_of``."""
        return self.network

    @own_rotations()
    def step(self, draws: Sequence[StepRng]) -> list[Segment]:
        """All terms, each on a micro batch of its own, and what each stretch of them held."""
        before: Role = "student"
        batches = [self._ignored(small_batch(self.setup, len(own.positions))) for own in draws]
        terms = terms_of(self.setup, self)
        with Watch(self.ledger, self._true_size):
            for (role, term), batch, own in zip(terms, batches, draws, strict=True):
                if role != before and not self.keeps_gradients:
                    self._clear(before)
                self._differentiate(term, batch, own)
                before = role
        return self.ledger.segments

    def _clear(self, role: Role) -> None:
        for parameter in self.backbone.parameters_of(role):
            parameter.grad = None

    @own_rotations()
    @torch.no_grad()
    def sample(self, samples: int, *, is_guided: bool) -> list[Segment]:
        """Two steps of sampling (of a causal model: each chunk), of which any number would hold as much."""
        setup = self.setup
        batch = self._ignored(small_batch(setup, samples))
        velocity: Velocity = self.velocity("student", batch.text)
        times = grid(STEPS, setup.model.shift)
        with Watch(self.ledger, self._true_size), autocast(setup.precision, "cpu"):
            if setup.config.causal is not None:
                causal, frames = causal_of(setup.config), setup.latent[0]
                list(
                    sample_chunks(
                        cast("Conditioned", velocity),
                        batch.latents,
                        partition_for(causal, frames),
                        flow_map_euler,
                        [times],
                        remember=remembered_for(causal, frames),
                    )
                )
            else:
                if is_guided:
                    velocity = guided(velocity, self.velocity("student", batch.text), 2.0)
                flow_map_euler(velocity, batch.latents, times)
        return self.ledger.segments

    @own_rotations()
    def alone(self, labels: Iterable[Label]) -> list[Segment]:
        """Each of these calls by itself, and its backward pass where it has gradient."""
        for label in labels:
            bound = self.velocity(cast("Role", label.role), torch.zeros(label.samples)).bound
            if label.layout is not None:
                bound = bound.with_layout(label.layout, None)
            self.evaluate(label, bound, into=label.with_gradient)()
        return self.ledger.segments

    def _differentiate(self, term: LossTerm, batch: Batch, draws: StepRng) -> None:
        with autocast(self.setup.precision, "cpu", keeps_casts=self.setup.shards is None):
            loss, _ = term(batch, draws)
        loss.backward()  # type: ignore[no-untyped-call]

    def _ignored(self, batch: Batch) -> Batch:
        for given in (batch.latents, batch.text, SMALL_NEGATIVE):
            self.ledger.ignore(given)
        return batch

    def _true_size(self, tensor: Tensor) -> Weight | None:
        """Bytes of the latents, the text or the keys that a small tensor stands for."""
        if isinstance(tensor, Hollow):
            return None
        setup, shape = self.setup, tensor.shape
        if shape[2:] == (SMALL, *setup.small):
            frame = math.prod(setup.latent[1:]) * tensor.element_size()
            return Weight("latents", shape[0] * shape[1] * frame)
        if shape[1:] == (SMALL, 1):
            return Weight("latents", len(tensor) * math.prod(setup.text) * tensor.element_size())
        if shape[2:] == (setup.config.heads, setup.config.head_dim):
            return Weight("cache", tensor.nbytes * setup.small_tokens)
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is done inside, is done by hollow tensors and counted."""
        watch = Watch(self.ledger, storage_bytes, counts_operations=True, gpu=self.setup.gpu)
        # The watch over small tensors would see, and be slowed by, all that hollow tensors do inside. And the
        # checkpoint around a small evaluation must not take in the large one: that follows the small one.
        own = saved_tensors_hooks(Tensor.detach, Tensor.detach) if self._recomputes else nullcontext()
        with _disable_current_modes(), self._hollowing, watch, own:
            yield

    def _uncounted(self, *shape: int, dtype: torch.dtype = torch.float32, into: bool = False) -> Tensor:
        with _disable_current_modes(), self._hollowing:
            made = torch.empty(*shape, dtype=dtype, requires_grad=into)
        self.ledger.ignore(made)
        return made

    def keys(self, small: LayerKeys | None, layout: Layout, samples: int) -> LayerKeys | None:
        """Hollow keys for those that are counted as the small ones."""
        places = [write.cache for write in layout.writes]
        places += [place for group in layout.groups for place in group.cached]
        if not places:
            return None
        shape = (samples, max(place.stop for place in places), self.network.config.heads)
        dtype, width = self.network.compute_dtype, self.network.config.head_dim

        def empty() -> Tensor:
            return self._uncounted(*shape, width, dtype=dtype)

        return LayerKeys(tuple((empty(), empty()) for _ in range(self.network.config.layers)))

    def evaluate(self, label: Label, bound: Any, into: bool) -> Callable[[], None]:
        """Run the role's network forward; the result runs it backward."""
        self.ledger.begin(label)
        if label in self._known:
            self.ledger.repeat(self._known[label])
            self.ledger.begin(BETWEEN)
            return _nothing
        frames = self.setup.latent[0] if label.layout is None else label.layout.frames
        z = self._uncounted(label.samples, frames, *self.setup.latent[1:], into=into)  # as the small latents
        t = self._uncounted(label.samples, *[frames] * label.by_frame)
        with self.running(), torch.set_grad_enabled(label.with_gradient):
            u = bound.conditioned(z, t, t)
        if label.layout is not None and u.grad_fn is None:  # its text's keys are there: it leaves nothing
            self._known[label] = self.ledger.segments[-1]
        self.ledger.begin(BETWEEN)
        if u.grad_fn is None:
            return _nothing
        return partial(self._backward, label, get_gradient_edge(u), tuple(u.shape), bound.kept)

    def _backward(self, label: Label, edge: GradientEdge, shape: tuple[int, ...], kept: object) -> None:
        self.ledger.begin(label._replace(direction="backward"))
        gradient = self._uncounted(*shape)  # as z
        with self.running():
            torch.autograd.backward(edge, gradient)
        self.ledger.begin(BETWEEN)


def _nothing() -> None:
    """The backward pass of a call without gradient."""


class _Text:
    """A role's network with its text bound, while rehearsing. ``kept``: what its graph holds in truth."""

    def __init__(self, rehearsal: Rehearsal, conditioned: Conditioned, kept: object = None) -> None:
        self._rehearsal, self.conditioned, self.kept = rehearsal, conditioned, kept

    def select(self, index: Tensor) -> _Text:
        with self._rehearsal.running():
            hollow = torch.empty(index.shape, dtype=torch.int64)
            return _Text(self._rehearsal, self.conditioned.select(hollow))

    def concat(self, *others: _Text) -> _Text:
        with self._rehearsal.running():
            return _Text(self._rehearsal, self.conditioned.concat(*(other.conditioned for other in others)))

    def with_layout(self, layout: Layout, keys: LayerKeys | None) -> _Text:
        true = self._rehearsal.setup.true_layout(layout)
        hollow = self._rehearsal.keys(keys, true, len(self.conditioned.text))
        with self._rehearsal.running():
            conditioned = self.conditioned.with_layout(true, hollow)
        # a block that is computed again finds the keys that it saw
        kept = keys if self._rehearsal.network.gradient_checkpointing else None
        return _Text(self._rehearsal, conditioned, kept)
