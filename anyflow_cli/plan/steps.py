"""What one step of a stage costs: sizes of the roles, bytes by part at the peak, operations.

Networks are rehearsed with two and with three blocks. Blocks are alike, so whatever a stretch of a step holds
or computes is a straight line in their number, and the full depth follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from anyflow_cli.model.roles import Backbone
from anyflow_cli.plan.ledger import Label, Segment
from anyflow_cli.plan.rehearsal import Rehearsal, calls_of
from anyflow_cli.plan.setup import Setup, backbone_on_meta
from anyflow_cli.train.draws import Draws

DEPTHS = (2, 3)
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
    """Rehearse the heaviest micro batch of a training stage."""
    assert setup.settings is not None
    keeps = setup.ranks > 1 or setup.micro < setup.share or setup.shards is not None
    draws = heaviest(setup)
    segments = at_full_depth(setup, lambda depth: Rehearsal(setup, depth, keeps_gradients=keeps).step(draws))
    micros = [draws for step in SAMPLED_STEPS for draws in micro_batches(setup, step)]
    calls = [call for draws in micros for call in calls_of(setup, draws)]
    return Step(roles_of(setup), segments, operations(segments, calls) / len(SAMPLED_STEPS), keeps)


def heaviest(setup: Setup) -> Draws:
    """Of the micro batches of many steps, the one that holds most: those with a graph first."""

    def weight(draws: Draws) -> tuple[int, int]:
        calls = calls_of(setup, draws)
        held = sum(call.samples for call in calls if call.with_gradient)
        return held, sum(call.samples for call in calls) - held

    return max((draws for step in SAMPLED_STEPS for draws in micro_batches(setup, step)), key=weight)


def micro_batches(setup: Setup, step: int) -> list[Draws]:
    """The random numbers of each micro batch of a step, on the process that has most to do.

    That is the last one: boundary samples come first in the global batch, and cost least.
    """
    assert setup.settings is not None
    settings, ranks = setup.settings, setup.ranks
    positions = tuple(range(ranks - 1, settings.batch, ranks))
    return [
        Draws(settings.seed, step, settings.batch, positions[start : start + setup.micro])
        for start in range(0, setup.share, setup.micro)
    ]


def operations(segments: Sequence[Segment], calls: Iterable[Label]) -> float:
    """Operations of all ``calls`` and their backward passes, at the price a sample has in ``segments``."""
    spent: Counter[tuple[str, str]] = Counter()
    samples: Counter[tuple[str, str]] = Counter()
    for segment in segments:
        key = segment.label.role, segment.label.direction
        spent[key] += segment.operations
        samples[key] += segment.label.samples
    total = 0.0
    for call in calls:
        for direction in ("forward", "backward") if call.with_gradient else ("forward",):
            key = call.role, direction
            total += call.samples * spent[key] / samples[key]
    return total


def at_full_depth(setup: Setup, run: Callable[[int], list[Segment]]) -> list[Segment]:
    """Segments of a run as they are with all blocks of the network."""
    layers = setup.depth
    unit = setup.model.checkpointed_every if setup.model.gradient_checkpointing else 1  # blocks that repeat
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
