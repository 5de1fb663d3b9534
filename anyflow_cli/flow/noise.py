"""Starting noise that depends on its seed alone: not on the batch, the device or the rank that draws it.

So a preview at 2 steps and the final at 32 start from the same noise, and a restarted synthesis makes the
same bytes.

Legend: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Standard normal fp32 on the CPU, of the given shape, usually one sample's (F, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator)


def batch_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One draw a seed, (B, *shape): row b equals ``noise(seeds[b], shape)`` whatever else is in the batch."""
    return torch.stack([noise(seed, shape) for seed in seeds])
