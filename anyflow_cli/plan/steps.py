"""Peak memory and FLOPs of a training step and of sampling, from the network calls that they declare.

A call with gradient keeps its graph until the backward pass of its term, which frees the last graph first. A
group of calls that runs again in the backward pass keeps nothing until then. Of each kind of call the
heaviest is measured; others are scaled by tokens, or by pairs of query and key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from anyflow_cli.model.backbone import Role
from anyflow_cli.model.causal import causal_of, partition_for
from anyflow_cli.plan.networks import DEPTHS, CallCost, Setup, call_cost, fake_backbone, role_sizes
from anyflow_cli.train.causal_windows import NetworkCall, rollout_calls
from anyflow_cli.train.objectives import objective_of
from anyflow_cli.train.rng import StepRng, micro_positions

SAMPLED_STEPS = range(1, 65)  # of a run; FLOPs are averaged over them


class Moment(NamedTuple):
    """A moment of a stage, and the bytes held then by part."""

    name: str
    parts: Mapping[str, int]
    graphs: int = 0  # bytes that earlier calls of the term keep

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


class CallCosts:
    """Costs of a process's network calls."""

    def __init__(self, setup: Setup, calls: Iterable[NetworkCall]) -> None:
        self.setup, self._cache_tokens = setup, 0
        self._heaviest: dict[tuple[Role, bool, bool], NetworkCall] = {}
        for call in calls:
            kind = (call.role, call.gradient, call.cache is None)
            most = max(self._heaviest.get(kind, call), call, key=lambda one: self.weight([one]))
            self._heaviest[kind] = most
            self._cache_tokens = max(self._cache_tokens, setup.layout_of(call).cache_tokens)

    def cost(self, call: NetworkCall) -> CallCost:
        """Cost of one call, scaled from the heaviest of its kind: per token, those cost the same."""
        like = self._heaviest.get((call.role, call.gradient, call.cache is None), call)
        cost = call_cost(self.setup, like._replace(group=None, joined=False, cache=like.cache and 0))
        (_, tokens, pairs), (_, its_tokens, its_pairs) = self.weight([call]), self.weight([like])
        ratios = {True: pairs / its_pairs, False: tokens / its_tokens}
        return CallCost(*(int(ratios["attention" in key] * value) for key, value in cost._asdict().items()))

    def flops(self, call: NetworkCall) -> float:
        """FLOPs of one call, recomputation included."""
        cost = self.cost(call)
        forward = (cost.linear + cost.attention) * (1 if call.group is None else 2)
        return forward + cost.linear_backward + cost.attention_backward

    def weight(self, calls: Iterable[NetworkCall]) -> tuple[int, int, int]:
        """Tokens with gradient, all tokens, and pairs of query and key; of all samples."""
        with_gradient = tokens = pairs = 0
        for call in calls:
            layout = self.setup.layout_of(call)
            own = call.samples * layout.tokens
            with_gradient, tokens = with_gradient + own * call.gradient, tokens + own
            pairs += call.samples * layout.pairs + own * self.setup.text[0]
        return with_gradient, tokens, pairs

    def moments(
        self, calls: Sequence[NetworkCall], gradients: int = 0, *, are_there: bool = False
    ) -> Iterator[Moment]:
        """The peaks of a term that makes these calls; ``gradients``: bytes that the step itself allocates."""
        graphs, shared = list[NetworkCall](), dict[Role, int]()

        def moment(call: NetworkCall, what: str, peak: int, gradients: int) -> Moment:
            kept = sum(self.cost(graph).graph for graph in graphs) + sum(shared.values())
            states = {one.cache for one in (*graphs, call)} - {None}
            parts = {"gradients": gradients, "cache": len(states) * self._cache(call.samples)}
            name = f"{call.role}: {what}, {call.samples} sample{'s' * (call.samples > 1)}"
            return Moment(name, {**parts, "activations": kept + peak}, kept)

        for call in calls:
            keeps_graph = call.gradient and call.group is None
            cost = self.cost(call._replace(gradient=keeps_graph))
            shared[call.role] = max(cost.shared, shared.get(call.role, 0))
            what = "caching a chunk" if call.only_caches else "forward"
            yield moment(call, what, cost.forward + cost.shared * call.joined, gradients * are_there)
            graphs += [call] * keeps_graph
        shared = {graph.role: self.cost(graph).shared_backward for graph in graphs}
        while graphs:
            call = graphs.pop()
            cost, before, are_there = self.cost(call), are_there, True
            # the first backward pass trades its graph for gradients
            traded = 0 if before or gradients < cost.graph else cost.graph
            yield moment(call, "backward", cost.backward - traded, gradients if before or traded else 0)
        numbers = {call.group for call in calls} - {None}
        groups = [[one._replace(group=None) for one in calls if one.group == number] for number in numbers]
        if groups:  # which run one at a time
            yield from self.moments(max(groups, key=self.weight), gradients, are_there=are_there)

    def _cache(self, samples: int) -> int:
        """Bytes of one key-value cache."""
        config, element = self.setup.network, 2 if self.setup.precision == "bf16" else 4
        gathered = self.setup.context // math.gcd(config.heads, self.setup.context)
        return gathered * 2 * element * config.layers * config.dim * samples * self._cache_tokens


class StepCost(NamedTuple):
    """What a training step costs one process."""

    moments: Sequence[Moment]  # of each call: activations, cache, and gradients that do not outlive a step
    flops: float  # of the average step, recomputation included
    rollout: int  # bytes of the student's own sample and its graph, when the scores are evaluated
    reads: float = 0.0  # how often each weight is read: once per call, again in a backward pass


@lru_cache(maxsize=256)
def step_cost(setup: Setup, steps: range = SAMPLED_STEPS) -> StepCost:
    """Memory of the heaviest micro batch of these steps, term by term, and FLOPs of the average step."""
    assert setup.settings is not None
    backbone, negative = fake_backbone(setup, DEPTHS[0]), torch.empty(*setup.text, device="meta")
    seed, count = setup.settings.seed, setup.settings.global_batch
    # the last process has most to do: boundary samples come first in the global batch, and cost least
    micro = micro_positions(count, setup.settings.micro_batch, setup.ranks - 1, setup.ranks)
    draws = [StepRng(seed, step, count, positions) for step in steps for positions in micro]
    declared = [
        (phase.role, number > 0, [term.network_calls(setup.latent, one) for one in draws])
        for phase in objective_of(setup.model, setup.settings, backbone, negative).phases
        for number, term in enumerate(phase.terms)
    ]
    every = [call for _, _, batches in declared for calls in batches for call in calls]
    costs, moments = CallCosts(setup, every), list[Moment]()
    for role, are_there, batches in declared:
        gradients = 0 if keeps_gradients(setup) else role_sizes(setup)[role]["trainable_bytes"]
        moments += costs.moments(max(batches, key=costs.weight), gradients, are_there=are_there)
    scores = (one.graphs for one in moments if not one.name.startswith("student"))
    reads = sum(1 + call.gradient for call in every) / len(steps)
    return StepCost(moments, sum(map(costs.flops, every)) / len(steps), next(scores, 0), reads)


def keeps_gradients(setup: Setup) -> bool:
    """Whether gradients outlive a backward pass: in DDP's buckets, sharded, or over micro batches."""
    settings = setup.settings
    alone = setup.ranks * setup.context == 1 and setup.shards is None
    return not alone or (settings is not None and 0 < (settings.micro_batch or 0) < settings.global_batch)


class SamplingCost(NamedTuple):
    """Bytes at the peak of sampling, weights aside, and FLOPs per sample."""

    cache: int
    activations: int
    step_flops: float
    cache_flops: float  # of caching the finished chunks


@lru_cache(maxsize=64)
def sampling_cost(setup: Setup, samples: int, *, is_guided: bool = False) -> SamplingCost:
    """Cost of sampling ``samples`` videos at once; guidance doubles the batch of every evaluation."""
    network = fake_backbone(setup, DEPTHS[0]).network_of("student")
    calls = [NetworkCall("student", samples * (1 + is_guided), gradient=False, joined=is_guided)]
    if network.config.causal is not None:
        causal, frames, step = causal_of(network.config), setup.latent[0], calls
        calls = rollout_calls(lambda number: step, network, partition_for(causal, frames), setup.latent)
    costs, flops = CallCosts(setup, calls), {True: 0.0, False: 0.0}
    for call in calls:
        flops[call.only_caches] += costs.flops(call) / samples
    peak = max(costs.moments(calls), key=lambda moment: moment.total)
    return SamplingCost(peak.parts["cache"], peak.parts["activations"], flops[False], flops[True])
