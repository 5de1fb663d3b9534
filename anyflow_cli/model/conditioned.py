"""A network with its condition bound, as the ``u(z, t, r)`` of ``flow``.

Keys and values of the condition do not change between steps, so they are computed once, at the first call,
unless a parameter that they depend on is being trained (then they could become stale and would need
gradient), or weights are streamed (then they are not there).

Given frames are put in their place before every call and have time 0; their velocity is 0, so that no sampler
moves them.

Legend: B batch, F latent frames, C channels, H W latent height and width, N selected samples.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as nnf
from torch import Tensor

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.layout import Layout
from anyflow_cli.model.network import FlowMapTransformer

Scope = Callable[[], AbstractContextManager[None]]


class Conditioned:
    """Velocity of a network under a condition, called inside ``scope``, such as a role."""

    def __init__(
        self,
        network: FlowMapTransformer,
        condition: Condition,
        scope: Scope = nullcontext,
        layout: Layout | None = None,
        keys: LayerKeys | None = None,
        cache: LayerKeys | None = None,
    ) -> None:
        self.network = network
        self.condition = condition
        self._scope = scope
        self._layout = layout
        self._keys = keys
        self._cache = cache

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Predict the velocity of z (B, F, C, H, W) at t and r, (B,) or (B, F)."""
        condition, keys = self.condition, self._shared_keys()
        if condition.frames is not None:
            z, t, r = condition.put_back(z), self._clean(t, z), self._clean(r, z)
        x = z if condition.channels is None else torch.cat((z, condition.channels.to(z)), dim=2)
        with self._scope():
            velocity: Tensor = self.network(
                x, t, r, condition.text if keys is None else keys, self._layout, self._cache,
                picture=condition.picture,
            )  # fmt: skip
        if condition.frames is None:
            return velocity
        return nnf.pad(velocity[:, condition.given :], (0, 0, 0, 0, 0, 0, condition.given, 0))

    def _clean(self, t: Tensor, z: Tensor) -> Tensor:
        """Times of all frames (B, F) from those of z, (B,) or (B, F): 0 for the given frames."""
        by_frame = t.unsqueeze(1).expand(z.shape[:2]) if t.dim() == 1 else t
        return nnf.pad(by_frame[:, self.condition.given :], (self.condition.given, 0))

    def with_layout(self, layout: Layout, cache: LayerKeys | None = None) -> Conditioned:
        """The same condition over another layout and its cache."""
        return Conditioned(self.network, self.condition, self._scope, layout, self._shared_keys(), cache)

    def select(self, index: Tensor) -> Conditioned:
        """Conditions of the samples ``index`` (N,); it may repeat and reorder."""
        keys = self._shared_keys()
        return self._with(
            self.condition[index], keys and keys.select(index), self._cache and self._cache.select(index)
        )

    def concat(self, *others: Velocity) -> Conditioned:
        """Concatenate the conditions of several batches for the same network, role and layout."""
        if not others:
            return self
        parts = [self]
        for other in others:
            assert isinstance(other, Conditioned), "only conditions of networks can be concatenated"
            assert other._scope is self._scope, "the conditions differ in role"
            assert other.network is self.network, "the conditions differ in network"
            assert other._layout == self._layout, "the conditions differ in layout"
            parts.append(other)
        condition = self.condition.concat(*(part.condition for part in parts[1:]))
        keys = _concat([part._shared_keys() for part in parts])
        return self._with(condition, keys, _concat([part._cache for part in parts]))

    def _with(self, condition: Condition, keys: LayerKeys | None, cache: LayerKeys | None) -> Conditioned:
        return Conditioned(self.network, condition, self._scope, self._layout, keys, cache)

    def _shared_keys(self) -> LayerKeys | None:
        """Keys of the condition, computed once; None where each call has to compute its own."""
        if self.network.streamed:
            return None
        if self._keys is None and not any(p.requires_grad for p in self.network.key_parameters()):
            # They outlive this call, so they may be neither inference tensors nor part of a graph.
            with torch.inference_mode(False), torch.no_grad(), self._scope():
                self._keys = self.network.condition_keys(self.condition.text, self.condition.picture)
        return self._keys


def _concat(parts: list[LayerKeys | None]) -> LayerKeys | None:
    """Concatenate along the batch; None where a part has none."""
    return LayerKeys.concat([part for part in parts if part is not None]) if None not in parts else None
