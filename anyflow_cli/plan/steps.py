"""What one step of a stage costs: sizes of the roles, bytes by part at the peak, operations.

Networks are rehearsed with two and with three blocks. All but the first are alike, so whatever a stretch of a
step holds or computes is a straight line in their number, and the full depth follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from anyflow_cli.model.backbone import Backbone
from anyflow_cli.plan.calls import calls_of_step
from anyflow_cli.plan.ledger import Label, Segment
from anyflow_cli.plan.rehearsal import Rehearsal
from anyflow_cli.plan.setup import Setup, backbone_on_meta
from anyflow_cli.recipe import schema
from anyflow_cli.train.rng import StepRng

DEPTHS = (2, 3)  # the first block differs: where adapters train, its input needs no gradient
SAMPLED_STEPS = range(1, 65)  # of a run; the calls of a step are averaged over them
BASE = "frozen base"


class RoleSize(NamedTuple):
    """Weights that a role owns."""

    parameters: int
    trainable: int
    bytes: int
    trainable_bytes: int
    largest: int  # bytes of the largest trainable tensor


@dataclass(frozen=True)
class Step:
    """A step's costs on one process. ``operations``: of the average step, recomputation included."""

    roles: Mapping[str, RoleSize]
    segments: Sequence[Segment]
    operations: float
    keeps_gradients: bool

    @property
    def rollout(self) -> int:
        """Bytes of the student's own sample and its graph, as the scores are first asked."""
        return next((s.start for s in self.segments if s.label.role in ("real", "fake")), 0)


@lru_cache(maxsize=256)
def step_of(setup: Setup) -> Step:
    """Rehearse the heaviest micro batches of a training stage."""
    assert setup.settings is not None
    keeps = setup.ranks > 1 or setup.micro < setup.share or setup.shards is not None
    micros, calls = sampled(setup)
    draws = heaviest(setup, micros, calls)
    segments = at_full_depth(setup, lambda depth: Rehearsal(setup, depth, keeps_gradients=keeps).step(draws))
    every = [label for terms in calls for labels in terms for label in labels]
    spent = operations(setup, segments, every)
    return Step(roles_of(setup), segments, spent / len(SAMPLED_STEPS), keeps)


def sampled(setup: Setup) -> tuple[list[StepRng], list[list[list[Label]]]]:
    """Micro batches of many steps, and the calls of each term of theirs."""
    steps = [micro_batches(setup, step) for step in SAMPLED_STEPS]
    calls = [own for micros in steps for own in calls_of_step(setup, micros)]
    return [draws for micros in steps for draws in micros], calls


def heaviest(
    setup: Setup, micros: Sequence[StepRng], calls: Sequence[Sequence[Sequence[Label]]]
) -> tuple[StepRng, ...]:
    """For each term, of the micro batches of many steps, the one that holds most: with a graph first."""

    def weight(labels: Sequence[Label]) -> tuple[int, int]:
        forward = [label for label in labels if label.direction == "forward"]
        held = sum(_tokens(setup, label) for label in forward if label.with_gradient)
        return held, sum(_tokens(setup, label) for label in forward) - held

    def most(term: int) -> StepRng:
        return micros[max(range(len(micros)), key=lambda number: weight(calls[number][term]))]

    shares_rollout = isinstance(setup.settings, schema.DistillSection) and setup.settings.reuse_rollout
    return tuple(most(0 if shares_rollout else term) for term in range(len(calls[0])))


def _tokens(setup: Setup, label: Label) -> int:
    """Of small latents, all samples together."""
    high, wide = (size // patch for size, patch in zip(setup.small, setup.config.patch, strict=True))
    return label.samples * (setup.latent[0] * high * wide if label.layout is None else label.tokens)


def micro_batches(setup: Setup, step: int) -> list[StepRng]:
    """The random numbers of each micro batch of a step, on the process that has most to do.

    That is the last one: boundary samples come first in the global batch, and cost least.
    """
    assert setup.settings is not None
    settings, ranks = setup.settings, setup.ranks
    positions = tuple(range(ranks - 1, settings.global_batch, ranks))
    return [
        StepRng(settings.seed, step, settings.global_batch, positions[start : start + setup.micro])
        for start in range(0, setup.share, setup.micro)
    ]


def operations(setup: Setup, segments: Sequence[Segment], calls: Iterable[Label]) -> float:
    """Operations of all ``calls``, at the price that a sample of such a call has in ``segments``.

    Those that are not there are rehearsed by themselves: the calls of other chunks than the heaviest.
    """
    calls = list(calls)
    priced = {_price_of(segment.label) for segment in segments}
    missing = dict.fromkeys(
        label._replace(samples=1, direction="forward") for label in calls if _price_of(label) not in priced
    )
    if missing:
        segments = [
            *segments,
            *at_full_depth(setup, lambda depth: Rehearsal(setup, depth, keeps_gradients=True).alone(missing)),
        ]
    spent: Counter[Hashable] = Counter()
    samples: Counter[Hashable] = Counter()
    for segment in segments:
        spent[_price_of(segment.label)] += segment.operations
        samples[_price_of(segment.label)] += segment.label.samples
    return sum(label.samples * spent[_price_of(label)] / samples[_price_of(label)] for label in calls)


def _price_of(label: Label) -> Hashable:
    """Calls that are alike in this cost the same."""
    return label.role, label.direction, label.layout


def at_full_depth(setup: Setup, run: Callable[[int], list[Segment]]) -> list[Segment]:
    """Segments of a run as they are with all blocks of the network."""
    layers = setup.depth
    unit = (
        setup.model.checkpoint_every_n_blocks if setup.model.gradient_checkpointing else 1
    )  # blocks that repeat
    depths = (DEPTHS[0] * unit, DEPTHS[1] * unit)
    if layers <= depths[1]:
        return run(layers)
    units = layers // unit
    return [_line(low, high, units) for low, high in zip(*map(run, depths), strict=True)]


def _line(low: Segment, high: Segment, layers: int) -> Segment:
    assert low.label == high.label
    parts = {part: _along(low.parts[part], high.parts[part], layers) for part in {**low.parts, **high.parts}}
    start = _along(low.start, high.start, layers)
    return Segment(low.label, start, Counter(parts), _along(low.operations, high.operations, layers))


def _along(low: int, high: int, layers: int) -> int:
    return low + (high - low) * (layers - DEPTHS[0]) // (DEPTHS[1] - DEPTHS[0])


def roles_of(setup: Setup) -> dict[str, RoleSize]:
    """Weights by role; what belongs to none is the frozen base."""
    layers = setup.depth
    if layers <= DEPTHS[1]:
        return _sizes(backbone_on_meta(setup, layers))
    low, high = (_sizes(backbone_on_meta(setup, depth)) for depth in DEPTHS)
    return {
        role: RoleSize(*(_along(a, b, layers) for a, b in zip(low[role], high[role], strict=True)))
        for role in low
    }


@lru_cache(maxsize=64)
def gathered_of(setup: Setup) -> int:
    """Bytes of sharded weights held whole at once: a block, the next one, and what is outside of blocks."""
    low, high = (
        sum(size.bytes for size in _sizes(backbone_on_meta(setup, depth)).values()) for depth in DEPTHS
    )
    block = high - low
    return low - DEPTHS[0] * block + 2 * block


def _sizes(backbone: Backbone) -> dict[str, RoleSize]:
    own = {role: backbone.named_parameters_of(role).values() for role in backbone.roles}
    owned = {id(parameter) for parameters in own.values() for parameter in parameters}
    rest = [parameter for parameter in backbone.parameters() if id(parameter) not in owned]
    groups: dict[str, list[nn.Parameter]] = {BASE: rest} | {role: list(own[role]) for role in own}
    return {role: _size(parameters) for role, parameters in groups.items() if parameters}


def _size(parameters: Sequence[nn.Parameter]) -> RoleSize:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return RoleSize(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in trained),
        sum(p.nbytes for p in parameters),
        sum(p.nbytes for p in trained),
        max((p.nbytes for p in trained), default=0),
    )
