"""Gaussian noise that depends on its seed or generator only: not on the batch, the device or the rank.

So a 2-step preview and the 32-step final video start from the same noise, and a restarted synthesis writes
the same bytes.

Legend: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for the batch, or one per sample: then a sample's noise does not depend on its batch."""


def fold_seed(seed: int) -> int:
    """Map a seed of any size to 32 bits; smaller seeds map to themselves.

    torch's CPU generator reads the lower 32 bits only, so 0, 2^32 and 2^63 would give the same numbers.
    """
    if seed < 1 << 32:
        return seed
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "big")


def noise_stream(seed: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """Draw a seed's starting noise, and return it with the generator that continues the seed's stream."""
    generator = torch.Generator().manual_seed(fold_seed(seed))
    return torch.randn(tuple(shape), generator=generator), generator


def noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Draw standard normal fp32 on the CPU in the given shape, usually (F, C, H, W) of one sample."""
    return noise_stream(seed, shape)[0]


def batch_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw one sample per seed, (B, *shape): row b equals ``noise(seeds[b], shape)`` in any batch."""
    return torch.stack([noise(seed, shape) for seed in seeds])


def noise_like(z: Tensor, generator: Generators) -> Tensor:
    """Draw N(0, I) in the shape of z on the generator's device, so that a CPU generator serves any device."""
    if isinstance(generator, Sequence):
        return torch.stack([noise_like(sample, own) for sample, own in zip(z, generator, strict=True)])
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype).to(z.device)
