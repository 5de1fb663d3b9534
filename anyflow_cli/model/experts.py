"""Two networks over one boundary in time (Wan 2.2 A14B), and what is the same for one network and for two.

The pair is bound to a condition like one network, and is then one velocity (``flow.experts``). Before an
expert is evaluated, the pair calls ``activate``, the only place that knows which expert is at work: there
``keep_idle_on_host`` exchanges the experts' weights.

Legend: B batch, F latent frames, C channels, H W latent height and width, N weights of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.experts import EXPERTS, ByTime, ExpertName, ExpertScale, by_time
from anyflow_cli.flow.velocity import GuidanceScale, Velocity
from anyflow_cli.model.blocks import Block, LayerKeys
from anyflow_cli.model.conditioned import Conditioned, Scope
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.context_parallel import ContextGroup
from anyflow_cli.model.layout import Layout
from anyflow_cli.model.network import FlowMapTransformer, on_meta, weight_dtype
from anyflow_cli.model.weights_io import LazyWeight, WeightSource, fill_module
from anyflow_cli.recipe.schema import ExpertGuidance

Part = TypeVar("Part")

# Boundary of Wan 2.2 by the channels that its experts take: text to video, image to video.
WAN_BOUNDARIES = {16: 0.875, 36: 0.9}


class ExpertPair(FlowMapTransformer):
    """The experts of a model: ``high`` at t >= ``boundary``, ``low`` below. Their sizes are equal.

    Called as one network is; what has to reach the parts of a network is applied to each of ``networks_of``.
    """

    def __init__(self, high: FlowMapTransformer, low: FlowMapTransformer, boundary: float) -> None:
        nn.Module.__init__(self)  # the parts of a network are in the experts
        self.high, self.low, self.boundary = high, low, boundary
        self.config: NetworkConfig = replace(high.config, boundary=boundary)
        self.activate: Callable[[ExpertName], None] = lambda name: None
        self.computes_on: torch.device | None = None  # where the weights are not to be found all the time
        self._scopes: dict[tuple[ExpertName, Scope], Scope] = {}

    def expert(self, name: ExpertName) -> FlowMapTransformer:
        """One of the experts."""
        return cast("FlowMapTransformer", getattr(self, name))

    @property
    def device(self) -> torch.device:
        """Device that the experts compute on."""
        return self.computes_on or self.high.device

    @property
    def context(self) -> ContextGroup | None:  # type: ignore[override]
        """Processes that share the experts' videos."""
        return self.high.context

    @property
    def compute_dtype(self) -> torch.dtype:
        """Type of the experts' matrix products."""
        return self.high.compute_dtype

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        text: Tensor | LayerKeys,
        layout: Layout | None = None,
        cache: LayerKeys | None = None,
        *,
        picture: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity, each sample by the expert of its time; layouts and caches are one network's.

        Returns:
            Velocity (B, F, C, H, W).
        """
        assert isinstance(text, Tensor), "experts have text keys of their own"
        assert layout is None, "two experts have no token layouts"
        assert cache is None, "two experts have no common cache"
        return bind(self, Condition(text, picture=picture))(z, t, r)

    @property
    def _typed_blocks(self) -> list[Block]:
        return [block for expert in networks_of(self) for block in expert._typed_blocks]

    @torch.no_grad()
    def embedding_norm(self) -> Tensor:
        """The larger of the experts' norms, ()."""
        return torch.maximum(self.high.embedding_norm(), self.low.embedding_norm())

    def scope_of(self, name: ExpertName, scope: Scope) -> Scope:
        """``scope`` in which an expert is active; the same object each time, so that conditions compare."""
        return self._scopes.setdefault((name, scope), partial(self._running, name, scope))

    @contextmanager
    def _running(self, name: ExpertName, scope: Scope) -> Iterator[None]:
        self.activate(name)
        with scope():
            yield


def networks_of(network: FlowMapTransformer) -> tuple[FlowMapTransformer, ...]:
    """The network itself, or both experts."""
    return (network.high, network.low) if isinstance(network, ExpertPair) else (network,)


def each_expert(
    network: FlowMapTransformer, change: Callable[[FlowMapTransformer], FlowMapTransformer]
) -> FlowMapTransformer:
    """The network that ``change`` makes of a network, or of each expert."""
    if isinstance(network, ExpertPair):
        return ExpertPair(change(network.high), change(network.low), network.boundary)
    return change(network)


def empty_network(config: NetworkConfig) -> FlowMapTransformer:
    """A network, or two experts, without storage; see ``on_meta``."""
    if config.boundary is None:
        return on_meta(config)
    each = replace(config, boundary=None)
    return ExpertPair(on_meta(each), on_meta(each), config.boundary)


def network_from(
    source: WeightSource,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    storage: torch.dtype | None = None,
) -> FlowMapTransformer:
    """Load a frozen network, or two experts, tensor by tensor, straight onto a device.

    Args:
        source: Its configuration and weights.
        dtype: Type of the weights, except for those on the path of times and norms, which are then fp32;
            None: as stored.
        device: Device of the weights.
        storage: Type of the blocks' matrices, see ``weight_dtype``.
    """
    network, weights = empty_network(source.config), source.lazy_weights()

    def dtype_of(name: str) -> torch.dtype:
        return weights[name].dtype if dtype is None else weight_dtype(name, dtype, storage)

    fill_module(network, weights, dtype_of, device)
    return network


def by_expert(weights: Mapping[str, Part]) -> dict[str, dict[str, Part]]:
    """Weights under their own names by the expert they belong to; by "" where they are of one network."""
    parts: dict[str, dict[str, Part]] = {}
    for name, weight in weights.items():
        expert = next((expert for expert in EXPERTS if name.startswith(f"{expert}.")), "")
        parts.setdefault(expert, {})[name.removeprefix(f"{expert}.")] = weight
    return parts


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one of two experts as those of one network; see ``WeightSource``."""

    pair: WeightSource
    expert: ExpertName

    @property
    def config(self) -> NetworkConfig:
        """Sizes of the expert."""
        return replace(self.pair.config, boundary=None)

    def lazy_weights(self) -> dict[str, LazyWeight]:
        """Weights by the expert's own names."""
        return by_expert(self.pair.lazy_weights())[self.expert]


def bind(network: FlowMapTransformer, condition: Condition, scope: Scope = nullcontext) -> Velocity:
    """The velocity of a network, or of two experts, under a condition, called in ``scope``."""
    if not isinstance(network, ExpertPair):
        return Conditioned(network, condition, scope)
    return by_time(
        lambda name: Conditioned(network.expert(name), condition, network.scope_of(name, scope)),
        network.boundary,
    )


def guidance_of(network: FlowMapTransformer, guidance: float | ExpertGuidance) -> GuidanceScale:
    """The scale of guidance at each time.

    Raises:
        UsageError: There is a scale for each of two experts, and the model is one network.
    """
    if not isinstance(guidance, ExpertGuidance):
        return guidance
    if not isinstance(network, ExpertPair):
        raise UsageError(
            f"The guidance has a scale for each of two experts ({guidance.high:g} and {guidance.low:g}), and "
            "the model is one network.",
            "Give one number.",
        )
    return ExpertScale(guidance.high, guidance.low, network.boundary)


def one_network(velocity: Velocity) -> Conditioned:
    """The same velocity, of a single network: it takes token layouts, which two experts do not share."""
    assert isinstance(velocity, Conditioned), "two experts have no token layouts"
    return velocity


def networks_under(velocity: Velocity) -> list[Conditioned]:
    """The network that a velocity is of, or both experts, under its condition."""
    parts = [velocity.expert(name) for name in EXPERTS] if isinstance(velocity, ByTime) else [velocity]
    return [cast("Conditioned", part) for part in parts]


def with_networks(velocity: Velocity, networks: Sequence[Velocity]) -> Velocity:
    """The same velocity of other networks, or of the same ones over another layout."""
    if not isinstance(velocity, ByTime):
        return networks[0]
    return by_time(dict(zip(EXPERTS, networks, strict=True)).__getitem__, velocity.boundary)


def keep_idle_on_host(
    pair: ExpertPair, device: torch.device, move: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Keep the weights of the idle expert in host memory from now on, and those of the other on ``device``.

    The weights are frozen: the host keeps both experts, and an exchange copies one of them to the device,
    where it takes the place of the other. A sampling pass from 1 to 0 exchanges them once.

    Args:
        pair: The experts, which are to be moved by nothing else.
        device: Device to compute on.
        move: Copies a weight from the host to the device; by default ``Tensor.to``.
    """
    move = move or (lambda stored: stored.to(device))
    host = {name: [weight.data.cpu() for weight in pair.expert(name).parameters()] for name in EXPERTS}
    active: ExpertName | None = None

    def activate(name: ExpertName) -> None:
        nonlocal active
        if name == active:
            return
        if active is not None:  # first, so that the device never holds both
            for weight, stored in zip(pair.expert(active).parameters(), host[active], strict=True):
                weight.data = stored
        for weight, stored in zip(pair.expert(name).parameters(), host[name], strict=True):
            weight.data = move(stored)
        active = name

    pair.activate, pair.computes_on = activate, device
    activate("high")  # with which sampling begins
