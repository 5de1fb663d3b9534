"""The account of bytes: booked once, freed with the storage, kept at the peak."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflow_cli.plan.ledger import (
    ATTENTION,
    ATTENTION_BACKWARD,
    BETWEEN,
    Label,
    Ledger,
    Watch,
    storage_bytes,
)

KB = 1024


def watch(ledger: Ledger) -> Watch:
    return Watch(ledger, storage_bytes, counts_operations=True)


def numbers(count: int) -> Tensor:
    return torch.zeros(count * KB // 4)


def test_a_peak_outlives_what_made_it() -> None:
    ledger = Ledger()
    with watch(ledger):
        a = numbers(1)
        b = a + 1
        del a, b
        c = numbers(1)
    assert ledger.segments[0].peak == 2 * KB
    ledger.begin(BETWEEN)
    assert ledger.segments[1].start == KB == len(c) * 4


def test_views_and_changes_in_place_are_not_new() -> None:
    ledger = Ledger()
    with watch(ledger):
        a = numbers(1)
        a.view(2, -1)[0].add_(1)
        _ = a.detach()
    assert ledger.segments[0].peak == KB


def test_what_is_ignored_stays_out_with_its_views() -> None:
    ledger, weight = Ledger(), numbers(1)
    ledger.ignore(weight)
    with watch(ledger):
        _ = weight.view(2, -1)
    assert ledger.segments[0].peak == 0


def test_what_backward_needs_is_held_until_then() -> None:
    """y = x^2 saves x; both are alive until the backward pass, whatever names are left."""
    ledger, leaf = Ledger(), numbers(1).requires_grad_()
    ledger.ignore(leaf)
    with watch(ledger):
        loss = ((leaf * 1) ** 2).sum()
        ledger.begin(BETWEEN)
        assert ledger.segments[1].start == KB + loss.nbytes
        loss.backward()  # type: ignore[no-untyped-call]
        ledger.begin(BETWEEN)
    assert leaf.grad is not None
    assert ledger.segments[2].start == KB + loss.nbytes  # the gradient, in place of what was saved


def test_parts_are_told_apart() -> None:
    ledger = Ledger()
    with watch(ledger):
        a, b = numbers(1), numbers(2)
        ledger.move(b, "gradients")
        ledger.begin(Label("student", "forward", 1, True))
        c = numbers(1)
    assert ledger.segments[1].parts == {"activations": 2 * KB, "gradients": 2 * KB}
    assert len(a) + len(b) + len(c) == KB


def test_passing_bytes_count_for_the_peak_alone() -> None:
    ledger = Ledger()
    with watch(ledger):
        _ = numbers(1)
        ledger.note(passing=5 * KB)
        _ = numbers(1)
    assert ledger.segments[0].peak == 6 * KB


def test_operations_of_products_and_attention() -> None:
    ledger, x = Ledger(), torch.randn(1, 2, 3, 4)
    with watch(ledger):
        nn.functional.scaled_dot_product_attention(x, x, x)
        torch.randn(5, 6) @ torch.randn(6, 7)
    assert ledger.segments[0].operations == 2 * (2 * 2 * 3 * 3 * 4) + 2 * 5 * 6 * 7


def test_attention_on_a_gpu_adds_its_working_memory_in_the_backward_pass() -> None:
    """The gradient of the queries in fp32, freed with the kernel's end."""
    query, key, value = (torch.randn(1, 2, 64, 8) for _ in range(3))
    out, norms = ATTENTION(query, key, value)

    def peak(gpu: bool) -> int:
        ledger = Ledger()
        with Watch(ledger, storage_bytes, counts_operations=True, gpu=gpu):
            ATTENTION_BACKWARD(out, query, key, value, out, norms, 0.0, False)
        return ledger.segments[0].peak

    assert peak(gpu=False) == 3 * query.nbytes
    assert peak(gpu=True) == 4 * query.nbytes
