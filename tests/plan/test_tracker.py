"""Bytes and FLOPs as the tracker counts them, against torch's own tools."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from anyflow_cli.plan.networks import fake_tensors
from anyflow_cli.utils.memory_tracker import ATTENTION, ATTENTION_BACKWARD, MemoryTracker

KB = 1024


def numbers(count: int) -> Tensor:
    return torch.zeros(count * KB // 4)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))


def test_a_peak_outlives_what_made_it_and_a_restart_forgets_it() -> None:
    with MemoryTracker() as tracker:
        a = numbers(1)
        b = a + 1
        del a, b
        c = numbers(1)
    assert (tracker.peak, tracker.held) == (2 * KB, KB)
    assert tracker.restart() == tracker.peak == len(c) * 4


def test_views_and_changes_in_place_are_not_new() -> None:
    with MemoryTracker() as tracker:
        a = numbers(1)
        a.view(2, -1)[0].add_(1)
        _ = a.detach()
    assert tracker.peak == KB


def test_known_tensors_stay_out_with_their_views() -> None:
    weight = numbers(1)
    with MemoryTracker([weight]) as tracker:
        _ = weight.view(2, -1)
    assert tracker.peak == 0


def test_what_backward_needs_is_held_until_then() -> None:
    """y = x^2 saves x; it is alive until the backward pass, whatever names are left."""
    leaf = numbers(1).requires_grad_()
    with MemoryTracker([leaf]) as tracker:
        loss = ((leaf * 1) ** 2).sum()
        assert tracker.held == KB + loss.nbytes
        loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    assert tracker.held == KB + loss.nbytes  # the gradient, in place of what was saved


@pytest.mark.parametrize("fake", [False, True])
def test_memory_is_what_torchs_tracker_counts(fake: bool) -> None:
    def peak(tracker: MemTracker | MemoryTracker) -> None:
        with tracker:
            model(torch.ones(16, 32)).sum().backward()

    if fake:
        with fake_tensors():
            model = network()
            own = MemoryTracker(model.parameters())
            peak(own)
    else:
        model = network()
        own = MemoryTracker(model.parameters())
        peak(own)
    model = network()
    theirs = MemTracker()
    theirs.track_external(model)
    weights = sum(weight.nbytes for weight in model.parameters())
    peak(theirs)
    (found,) = theirs.get_tracker_snapshot("peak").values()
    assert own.peak == found["Total"] - weights


@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_what_torchs_counter_counts(backward: bool) -> None:
    model, x = network(), torch.randn(16, 32)
    with FlopCounterMode(display=False) as counter, MemoryTracker() as tracker:
        out = model(x)
        if backward:
            out.sum().backward()
    assert tracker.linear == counter.get_total_flops() > 0


def test_flops_of_attention() -> None:
    x = torch.randn(1, 2, 3, 4)
    with MemoryTracker() as tracker:
        nn.functional.scaled_dot_product_attention(x, x, x)
    assert (tracker.attention, tracker.linear) == (2 * (2 * 2 * 3 * 3 * 4), 0)


def test_attention_on_a_gpu_adds_its_working_memory_in_the_backward_pass() -> None:
    """The gradient of the queries in fp32, freed with the kernel's end."""
    query, key, value = (torch.randn(1, 2, 64, 8) for _ in range(3))
    out, norms = ATTENTION(query, key, value)

    def peak(gpu: bool) -> int:
        with MemoryTracker(gpu=gpu) as tracker:
            ATTENTION_BACKWARD(out, query, key, value, out, norms, 0.0, False)
        return int(tracker.peak)

    assert peak(gpu=False) == 3 * query.nbytes
    assert peak(gpu=True) == 4 * query.nbytes
