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
from anyflow_cli.model.blocks import TextKeys
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
        keys: TextKeys | None = None,
    ) -> None:
        self.network = network
        self.text = text
        self._scope = scope
        self._layout = layout
        self._keys = keys

    def __call__(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Velocity (B, F, C, H, W) of ``z`` at ``t``, ``r``, (B,) or (B, F)."""
        keys = self._shared_keys()
        with self._scope():
            velocity: Tensor = self.network(z, t, r, self.text if keys is None else keys, self._layout)
            return velocity

    def take(self, index: Tensor) -> Conditioned:
        """The condition of the samples ``index``, repeated or dropped as it says."""
        keys = self._shared_keys()
        return self._with(self.text[index], keys and keys.take(index))

    def join(self, *others: Velocity) -> Conditioned:
        """The conditions of several batches, one after another; all run the same network in the same role."""
        if not others:
            return self
        parts = [self]
        for other in others:
            assert isinstance(other, Conditioned), "only conditions of networks can be joined"
            assert other._scope is self._scope, "joined conditions differ in role"
            assert other.network is self.network, "joined conditions differ in network"
            parts.append(other)
        keys = [part._shared_keys() for part in parts]
        joined = TextKeys.join([part for part in keys if part is not None]) if None not in keys else None
        return self._with(torch.cat([part.text for part in parts]), joined)

    def _with(self, text: Tensor, keys: TextKeys | None) -> Conditioned:
        return Conditioned(self.network, text, self._scope, self._layout, keys)

    def _shared_keys(self) -> TextKeys | None:
        """The text's keys, made at first need; None where each call has to make its own."""
        if self._keys is None and not any(p.requires_grad for p in self.network.text_parameters()):
            # Kept beyond this call: neither inference tensors nor a graph may stay in them.
            with torch.inference_mode(False), torch.no_grad(), self._scope():
                self._keys = self.network.text_keys(self.text)
        return self._keys
