"""Training windows: which frames of its videos a step noises, and what they attend to.

A bidirectional model noises whole videos, at one time per video, or all but a clean first frame. A causal
model trains on a drawn number of chunks from the start of its videos; the last of them are noised, each chunk
at its own time, and attend to the clean past (teacher forcing). It generates its own samples chunk by chunk
over a KV cache (``roll_out``). The objectives and ``flow/`` are the same for both.

Everything drawn here holds for the whole global batch, so one token layout serves all samples.

Legend: B batch, F latent frames, F' conditioning frames, K noised chunks, C channels, H W latent height and
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.velocity import Velocity, checkpointed
from anyflow_cli.model.backbone import Role
from anyflow_cli.model.causal import (
    Replayed,
    TeacherForced,
    causal_of,
    chunks_of,
    remembered_for,
    replaying,
    split_after,
    teacher_forcing,
)
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.context_parallel import ContextGroup
from anyflow_cli.model.experts import one_network
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.layout import Layout
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe import schema
from anyflow_cli.train.rng import StepRng

IMAGE = 0.5  # share of the drawn conditioning frames that are the first chunk alone: image to video


@dataclass(frozen=True)
class TrainingWindow:
    """The frames that a step noises.

    Attributes:
        x: Clean frames (B, F, C, H, W).
        bind: Turns a conditioned network into the velocity of these frames.
        frames: Where they are in the video.
        chunks: Frames per chunk, where every chunk has its own time; None: all frames share one.
        given: How many of the first frames stay clean.
    """

    x: Tensor
    bind: Callable[[Velocity], Velocity]
    frames: slice
    chunks: tuple[int, ...] | None = None
    given: int = 0

    @property
    def times_per_sample(self) -> int | None:
        """K; None for one time that all frames share."""
        return None if self.chunks is None else len(self.chunks)

    def of(self, video: Tensor) -> Tensor:
        """Cut the same frames out of another tensor."""
        return video[:, self.frames]

    def noise(self, eps: Tensor) -> Tensor:
        """Noise of the window; that of a clean frame is the frame itself, so that its velocity is 0."""
        return torch.cat((self.x[:, : self.given], eps[:, self.given :].to(self.x)), dim=1)

    def condition(self, condition: Condition) -> Condition:
        """The condition of the videos, with the frames that stay clean."""
        return condition.with_frames(self.x[:, : self.given])

    def by_frame(self, times: Tensor) -> Tensor:
        """Expand times (B,) or (B, K) to those that networks take, (B,) or (B, F), in the type of x."""
        if self.chunks is not None:
            times = times.repeat_interleave(torch.tensor(self.chunks), dim=1)
        return times.to(self.x.dtype)


WindowOf = Callable[[Tensor, StepRng], TrainingWindow]
Simulate = Callable[[Velocity, Tensor, int], Tensor]  # velocity, noise and number of a chunk -> its sample


@dataclass(frozen=True)
class WholeVideo:
    """Windows of a bidirectional model; ``conditioning_prob``: share of steps that give the first frame."""

    conditioning_prob: float = 0.0

    def __call__(self, x: Tensor, rng: StepRng) -> TrainingWindow:
        """Take the whole videos x (B, F, C, H, W)."""
        given = self.draw(rng.generator("given"))
        return TrainingWindow(x, lambda velocity: velocity, slice(None), given=given)

    def draw(self, generator: torch.Generator) -> int:
        """Draw how many first frames a step gives: 0 or 1."""
        return int(self.conditioning_prob > 0 and _happens(self.conditioning_prob, generator))


WHOLE_VIDEOS = WholeVideo()


class NetworkCall(NamedTuple):
    """One forward pass of a role's network in a training step.

    Attributes:
        role: Role that the network runs in.
        samples: Number of samples, B.
        gradient: Whether its graph is needed in the backward pass.
        layout: Token layout; None: whole videos, bidirectionally.
        group: Calls of one group run again in the backward pass, together; None: the graph is kept.
        cache: Number of the state of the key-value cache that the call reads or writes; None: no cache.
        joined: Whether it evaluates several conditions at once, for which their text keys are copied.
    """

    role: Role
    samples: int
    gradient: bool
    layout: Layout | None = None
    group: int | None = None
    cache: int | None = None
    joined: bool = False

    @property
    def only_caches(self) -> bool:
        """Whether the call has no output, and only fills the key-value cache."""
        return self.layout is not None and not any(segment.is_output for segment in self.layout.inputs)


class Window(NamedTuple):
    """Latent frames of each chunk that a step trains on; the last ``noisy`` chunks are noised."""

    partition: tuple[int, ...]
    noisy: int


@dataclass(frozen=True)
class TeacherForcing:
    """Windows of a causal model.

    ``conditioning_prob`` is the share of steps whose videos continue conditioning frames. These may end
    mid-chunk; the remainder becomes its own chunk, as in sampling (``split_after``).
    """

    settings: schema.CausalSection
    conditioning_prob: float = 0.0

    def __call__(self, x: Tensor, rng: StepRng) -> TrainingWindow:
        """Cut videos x (B, F, C, H, W) to the step's window."""
        chunks, noisy = self.of_length(x.shape[1]).window(rng)
        frames = slice(sum(chunks[:-noisy]), sum(chunks))
        bind = partial(TeacherForced, x=x[:, : frames.stop], partition=chunks, noisy=noisy)
        return TrainingWindow(x[:, frames], bind, frames, chunks[-noisy:])

    def of_length(self, frames: int) -> TeacherForcing:
        """Windows of videos of so many latent frames, the first chunks of the partition."""
        return replace(self, settings=first_chunks(self.settings, frames))

    def window(self, rng: StepRng) -> Window:
        """Draw a step's window: the same for every micro-batch, on every process."""
        full, generator = self.settings.full_chunks, rng.generator("window")
        known = draw_conditioning_frames(self.settings, self.conditioning_prob, rng.generator("given"))
        chunks = split_after(self.settings.partition, known)
        if known:
            begun = _chunks_within(chunks, known)
            count = _between(begun + 1, len(chunks), generator)
            return Window(chunks[:count], min(full, count - begun))
        count = shortest = min(full, len(chunks))
        if _happens(self.settings.long_context, generator):
            count = _between(shortest, len(chunks), generator)
        return Window(chunks[:count], shortest)


def first_chunks(settings: schema.CausalSection, frames: int) -> schema.CausalSection:
    """The settings with the first chunks of the partition that make up so many latent frames."""
    if sum(settings.partition) == frames:
        return settings
    ends = list(accumulate(settings.partition))
    return settings.model_copy(update={"partition": settings.partition[: ends.index(frames) + 1]})


def draw_conditioning_frames(settings: schema.CausalSection, share: float, generator: torch.Generator) -> int:
    """Draw how many frames a step's videos are conditioned on: 0 in all but a ``share`` of the steps."""
    if len(settings.partition) == 1 or not _happens(share, generator):
        return 0
    if _happens(IMAGE, generator):
        return settings.partition[0]
    return _between(1, sum(settings.partition) - 1, generator)


def roll_out(
    model: Velocity,
    noise: Tensor,
    partition: tuple[int, ...],
    simulate: Simulate,
    *,
    given: Tensor,
    recomputes: bool = False,
    skipped: int = 0,
) -> Tensor:
    """Generate the student's videos (B, F, C, H, W) chunk by chunk over a KV cache.

    The gradient flows through every chunk that begins after the ``skipped`` frames, and not through the
    cache, which is that of sampling: in a video longer than the partition it drops the oldest chunks.

    Args:
        model: Student under its text.
        noise: Noise (B, F, C, H, W).
        partition: Latent frames of each chunk.
        simulate: Jumps from a chunk's noise to its sample.
        given: Conditioning frames (B, F', C, H, W); F' is 0 for text to video.
        recomputes: Recompute a chunk's jumps, and the keys of its past, in the backward pass, so that the
            graph of one chunk is in memory at a time.
        skipped: First frames that are generated and not returned.
    """
    model, known = one_network(model), given.shape[1]
    chunks, size = split_after(partition, known), (noise.shape[-2], noise.shape[-1])
    prefills = recomputes and not skipped  # keys depend on dropped chunks, so a long past is not prefilled
    # what is recomputed has to find the same keys as the first time
    in_place = not ((recomputes or model.network.gradient_checkpointing) and torch.is_grad_enabled())
    remember = remembered_for(causal_of(model.network.config), noise.shape[1])
    empty = partial(KeyCache, model.network, chunks, size, len(noise), remember=remember)

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)

    def alone(past: Tensor, z: Tensor, number: int) -> Tensor:
        own = empty()
        own.prefill(past, model)
        return simulate(own.next_velocity(model), z, number)

    cache = None if prefills else empty(in_place=in_place)
    made = given[:, :0]
    for number, chunk in enumerate(chunks_of(chunks)):
        z = noise[:, chunk.slice]
        with torch.set_grad_enabled(torch.is_grad_enabled() and chunk.first >= skipped):
            if chunk.slice.stop <= known:
                x = given[:, chunk.slice]
            elif cache is None:
                x = again(alone, made.detach(), z, number)
            elif recomputes:
                x = again(simulate, cache.next_velocity(model), z, number)
            else:
                x = simulate(cache.next_velocity(model), z, number)
        made = torch.cat((made, x), dim=1)
        if cache is not None and number + 1 < len(chunks):
            cache.append(x, model)
    return made[:, skipped:]


def replay_rollout(
    model: Velocity,
    noise: Tensor,
    partition: tuple[int, ...],
    simulate: Simulate,
    *,
    given: Tensor,
    recomputes: bool = False,
) -> Tensor:
    """Generate videos by ``roll_out`` without gradient, then again with it, all chunks at once.

    In the second pass a chunk starts from the same noise and attends to the finished chunks before it, which
    are part of the pass (``Replayed``). The result is that of the first pass up to rounding, but its gradient
    also reaches how earlier chunks are encoded for later ones (self gradient forcing). The chunks themselves
    get none through their clean copies.
    """
    known = given.shape[1]
    with torch.no_grad():
        x = roll_out(model, noise, partition, simulate, given=given)
    velocity: Velocity = Replayed(model, x, split_after(partition, known), known)
    again = simulate(checkpointed(velocity) if recomputes else velocity, noise[:, known:], 1)
    return torch.cat((given, again), dim=1)


def replay_calls(
    simulated: Sequence[NetworkCall],
    network: FlowMapTransformer,
    partition: tuple[int, ...],
    latent: tuple[int, int, int, int],
    known: int,
) -> list[NetworkCall]:
    """List the network calls of ``replay_rollout``, in order; arguments as in ``rollout_calls``."""
    alone = [call._replace(gradient=False, group=None) for call in simulated]
    layout = replaying(network.config, split_after(partition, known), *latent[2:], known)
    return [
        *rollout_calls(lambda number: alone, network, partition, latent, known=known),
        *(call._replace(layout=layout) for call in simulated),
    ]


def rollout_calls(
    simulated: Callable[[int], Sequence[NetworkCall]],
    network: FlowMapTransformer,
    partition: tuple[int, ...],
    latent: tuple[int, int, int, int],
    *,
    known: int = 0,
    recomputes: bool = False,
    skipped: int = 0,
) -> list[NetworkCall]:
    """List the network calls of ``roll_out``, in order.

    Args:
        simulated: The calls that generate a chunk, by its number.
        network: The causal network; only its configuration counts.
        partition: Latent frames of each chunk.
        latent: Shape of a video's latents, (F, C, H, W).
        known: Frames that are given and not generated.
        recomputes: Whether each chunk runs again in the backward pass, over a cache of its own.
        skipped: First frames that are generated without gradient.
    """
    probe = _LayoutProbe(replace(network.config, layers=0), network.context)  # caches without memory
    model, chunks = cast("Conditioned", probe), split_after(partition, known)
    remember = remembered_for(causal_of(network.config), latent[0])
    empty = partial(KeyCache, model.network, chunks, latent[2:], 1, remember=remember)
    prefills = recomputes and not skipped
    copies = (network.gradient_checkpointing or recomputes) and any(call.gradient for call in simulated(0))
    cache, calls = empty(), list[NetworkCall]()
    for number, chunk in enumerate(chunks_of(chunks)):
        state, trains = number if copies else 0, chunk.first >= skipped
        group = number if recomputes and trains else None
        keep = simulated(number)[0]._replace(gradient=False, group=group if prefills else None, cache=state)
        if chunk.slice.stop > known:
            if prefills:
                cache = empty()
                cache.prefill(torch.empty(1, chunk.first, *latent[1:], device="meta"), model)
                calls += [keep._replace(layout=probe.layout)] * (number > 0)
            cache.next_velocity(model)
            jumps = [
                call._replace(gradient=call.gradient and trains, group=group) for call in simulated(number)
            ]
            calls += [jump._replace(layout=probe.layout, cache=state) for jump in jumps]
        if not prefills and number + 1 < len(chunks):
            cache.append(torch.empty(1, chunk.frames, *latent[1:], device="meta"), model)
            calls.append(keep._replace(layout=probe.layout, cache=state + copies))
    return calls


class _LayoutProbe:
    """Takes the place of a network and of a conditioned one, and records the layout that a cache binds."""

    compute_dtype, device = torch.float32, torch.device("meta")
    layout: Layout | None = None

    def __init__(self, config: NetworkConfig, context: ContextGroup | None) -> None:
        self.config, self.context = config, context

    @property
    def network(self) -> _LayoutProbe:
        return self

    def with_layout(self, layout: Layout, cache: object) -> Callable[..., None]:
        self.layout = layout
        return lambda *inputs: None


def layout_of(
    window_of: WindowOf, network: FlowMapTransformer, latent: tuple[int, int, int, int], rng: StepRng
) -> tuple[Layout | None, int | None]:
    """Token layout of a step's window, and times per sample; None and None for whole videos."""
    if not isinstance(window_of, TeacherForcing):
        return None, None
    chunks, noisy = window_of.of_length(latent[0]).window(rng)
    return teacher_forcing(network.config, chunks, *latent[2:], noisy), noisy


def _chunks_within(partition: tuple[int, ...], frames: int) -> int:
    """Count the chunks that the first ``frames`` frames fill."""
    return next(count for count in range(len(partition)) if sum(partition[:count]) >= frames)


def _happens(share: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < share


def _between(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer from ``low`` to ``high``, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))
