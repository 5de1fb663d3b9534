"""The network with its condition bound: what ``flow/`` calls ``u(z, t, r)``.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.

The text's keys and values do not change between steps, so they are made once, on the first call that may
share them: only where nothing they depend on is being trained, since then they can neither age nor need a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.blocks import LayerKeys
from anyflow_cli.model.layout import Layout
from anyflow_cli.model.network import FlowMapTransformer

Scope = Callable[[], AbstractContextManager[None]]


class Conditioned:
    """Velocity of a network under text embeddings (B, L, D), run inside ``scope`` (a role, for adapters)."""

    def __init__(
        self,
        network: FlowMapTransformer,
        text: Tensor,
        scope: Scope = nullcontext,
        layout: Layout | None = None,
        keys: LayerKeys | None = None,
        cache: LayerKeys | None = None,
    ) -> None:
        self.network = network
        self.text = text
        self._scope = scope
        self._layout = layout
        self._keys = keys
        self._cache = cache

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Velocity (B, F, C, H, W) of ``z`` at ``t``, ``r``, (B,) or (B, F)."""
        keys = self._shared_keys()
        with self._scope():
            text = self.text if keys is None else keys
            velocity: Tensor = self.network(z, t, r, text, self._layout, self._cache)
            return velocity

    def with_layout(self, layout: Layout, cache: LayerKeys | None = None) -> Conditioned:
        """The same condition over another layout, and the cache that it names."""
        return Conditioned(self.network, self.text, self._scope, layout, self._shared_keys(), cache)

    def select(self, index: Tensor) -> Conditioned:
        """The condition of the samples ``index``, repeated or dropped as it says."""
        keys = self._shared_keys()
        return self._with(
            self.text[index], keys and keys.select(index), self._cache and self._cache.select(index)
        )

    def concat(self, *others: Velocity) -> Conditioned:
        """The conditions of several batches, one after another; all run the same network in the same role."""
        if not others:
            return self
        parts = [self]
        for other in others:
            assert isinstance(other, Conditioned), "only conditions of networks can be joined"
            assert other._scope is self._scope, "joined conditions differ in role"
            assert other.network is self.network, "joined conditions differ in network"
            assert other._layout == self._layout, "joined conditions differ in layout"
            parts.append(other)
        keys = _joined([part._shared_keys() for part in parts])
        return self._with(torch.cat([part.text for part in parts]), keys, _joined([p._cache for p in parts]))

    def _with(self, text: Tensor, keys: LayerKeys | None, cache: LayerKeys | None) -> Conditioned:
        return Conditioned(self.network, text, self._scope, self._layout, keys, cache)

    def _shared_keys(self) -> LayerKeys | None:
        """The text's keys, made at first need; None where each call has to make its own."""
        if self._keys is None and not any(p.requires_grad for p in self.network.text_parameters()):
            # Kept beyond this call: neither inference tensors nor a graph may stay in them.
            with torch.inference_mode(False), torch.no_grad(), self._scope():
                self._keys = self.network.text_keys(self.text)
        return self._keys


def _joined(parts: list[LayerKeys | None]) -> LayerKeys | None:
    """One batch after another; None where a part has none."""
    return LayerKeys.concat([part for part in parts if part is not None]) if None not in parts else None
