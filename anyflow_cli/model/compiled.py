"""``torch.compile`` of a network's blocks, one by one: what they are alike in is compiled once.

A block's ``forward`` is compiled, not the module, so that whatever is around a block stays around it: FSDP2's
hooks, which gather its weights, and checkpointing, which calls it again. A role's adapter is part of what a
compiled block is told apart by: each role, number of samples and token layout is compiled when first met.

Sizes are never made symbolic: a recomputation must run the very code that its forward ran, and a later,
more general version would also fit.
"""

from __future__ import annotations

import torch

from anyflow_cli.model.network import FlowMapTransformer

VERSIONS = 128  # of a block: roles, with gradient and without, times numbers of samples and layouts


def apply_compile(network: FlowMapTransformer) -> None:
    """Compile each block when it is first called; before the network is sharded."""
    torch._dynamo.config.recompile_limit = VERSIONS
    for block in network.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
