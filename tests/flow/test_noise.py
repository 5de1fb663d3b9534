from __future__ import annotations

import torch

from anyflow_cli.flow.noise import batch_noise, fold_seed, noise, noise_like


def test_noise_depends_on_its_seed_only() -> None:
    alone = noise(7, (3, 2, 4, 4))
    torch.manual_seed(1)
    batch = batch_noise([5, 7], (3, 2, 4, 4))
    assert torch.equal(batch[1], alone)
    assert not torch.equal(batch[0], alone)
    assert batch_noise([7], (3, 2, 4, 4)).dtype == torch.float32


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    noise(3, (4,))
    assert torch.equal(torch.rand(1), expected)


def test_noise_is_standard_normal() -> None:
    x = noise(0, (100_000,))
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02


def test_noise_like_follows_its_generator_in_the_shape_and_type_of_the_state() -> None:
    z = torch.zeros(4, 3, 2, 4, 4, dtype=torch.float64)
    first, second = (noise_like(z, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert (first.shape, first.dtype) == (z.shape, z.dtype)
    assert not torch.equal(first, noise_like(z, torch.Generator().manual_seed(6)))


def test_noise_of_one_generator_per_sample_does_not_depend_on_the_batch() -> None:
    z = torch.zeros(2, 3, 2, 4, 4)
    both = noise_like(z, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
    assert torch.equal(both[1:], noise_like(z[1:], [torch.Generator().manual_seed(6)]))


def test_every_bit_of_a_seed_counts_and_small_seeds_keep_their_noise() -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**62, 2**63 - 1]
    assert len({noise(seed, (4,)).sum().item() for seed in seeds}) == len(seeds)
    for seed in (0, 7, 2**32 - 1):
        assert fold_seed(seed) == seed
        assert torch.equal(noise(seed, (4,)), torch.randn(4, generator=torch.Generator().manual_seed(seed)))
