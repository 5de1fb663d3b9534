"""Rotary positions from their algebra: products depend on offsets, compressed tokens average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_cli.model.layout import Layout, Segment, bidirectional
from anyflow_cli.model.rotary import rotate, rotation

DIM = 16
CPU = torch.device("cpu")


def turned(layout: Layout, x: Tensor) -> Tensor:
    """One vector (d,) at every position of the layout, (L, d)."""
    turns = rotation(layout, DIM, CPU)
    return rotate(x.expand(1, turns.shape[0], 1, DIM).contiguous(), turns)[0, :, 0]


def test_products_depend_on_the_offset_only() -> None:
    q, k = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    layout = bidirectional(4, 6, 8)  # 4 frames of 3 x 4 patches
    grid = (turned(layout, q) @ turned(layout, k).T).reshape(4, 3, 4, 4, 3, 4)
    torch.testing.assert_close(grid[0, 0, 0, 1, 1, 2], grid[2, 1, 1, 3, 2, 3])
    torch.testing.assert_close(grid[1, 2, 3, 0, 0, 0], grid[2, 2, 3, 1, 0, 0])
    assert (grid[0, 0, 0, 1, 0, 0] - grid[0, 0, 0, 0, 1, 0]).abs() > 1e-3  # axes differ
    torch.testing.assert_close(grid[0, 0, 0, 0, 0, 0], q @ k)


def test_a_segment_is_positioned_by_its_first_frame() -> None:
    whole = rotation(bidirectional(5, 4, 4), DIM, CPU)
    later = Layout((Segment(3, 2, (0,)),), 4, 4)
    torch.testing.assert_close(rotation(later, DIM, CPU), whole[3 * 4 :], rtol=0, atol=0)


def test_a_compressed_token_is_the_unit_average_of_what_it_covers() -> None:
    full = torch.view_as_complex(rotation(bidirectional(2, 8, 12), DIM, CPU))
    compressed = Layout((Segment(0, 2, (0,), "compressed"),), 8, 12, compressed_patch=(4, 6))
    got = torch.view_as_complex(rotation(compressed, DIM, CPU)).reshape(2, 2, 2, -1)
    mean = full.reshape(2, 2, 2, 2, 3, -1).mean((2, 4))  # each covers 2 x 3 patches
    torch.testing.assert_close(got, mean / mean.abs())
    torch.testing.assert_close(got.abs(), torch.ones_like(got.abs()))


def test_real_arithmetic_and_the_cpu_kernel_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 12, 3, DIM, generator=torch.Generator().manual_seed(0))
    turns = rotation(bidirectional(3, 4, 4), DIM, CPU)
    complex_kernel = rotate(x, turns)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, turns), complex_kernel, rtol=1e-6, atol=1e-6)


def test_cached_tables_can_serve_a_backward_pass_after_inference() -> None:
    layout = bidirectional(2, 2, 6)
    with torch.inference_mode():
        first = rotation(layout, DIM, CPU)
    assert rotation(layout, DIM, CPU) is first
    x = torch.randn(1, 6, 1, DIM, requires_grad=True)
    torch.autograd.backward(rotate(x, first).square().sum())
    torch.testing.assert_close(x.grad, 2 * x.detach())  # a rotation keeps lengths
