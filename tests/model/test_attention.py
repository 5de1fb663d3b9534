"""Attention kernels: one function for all of them, the choice, and what is refused before a model loads."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model import attention
from anyflow_cli.model.attention import (
    BACKENDS,
    MAX_DISTANCE,
    SDPA,
    AttentionBackend,
    AttentionShape,
    backend_problem,
    choose_kernel,
)
from anyflow_cli.model.causal import teacher_forcing
from anyflow_cli.recipe.schema import ModelSection
from tests.model.helpers import inputs, ours, theirs

SHAPE = AttentionShape(queries=24, keys=40, heads=2, head_dim=16)
CPU = torch.device("cpu")


def slow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Exact, written out, and slower than any other."""
    torch.randn(600, 600) @ torch.randn(600, 2000)
    scores = torch.einsum("bqed,bked->beqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("beqk,bked->bqed", scores.softmax(-1), value)


def quick(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The exact result without its cost: the smallest work that has a gradient."""
    return torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    ).transpose(1, 2)


def unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return SDPA(query * query.shape[-1] ** 0.5, key, value)


def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def add(monkeypatch: pytest.MonkeyPatch, name: str, kernel: Any, **facts: Any) -> None:
    monkeypatch.setitem(BACKENDS, name, AttentionBackend(kernel, on_cpu=True, **facts))


def test_the_cpu_uses_torch_s_own_attention_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_random_inputs", broken)
    for setting in ("auto", "sdpa"):
        assert choose_kernel(setting, SHAPE, CPU, torch.float32) is SDPA


def test_a_close_kernel_is_used_and_its_distance_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(monkeypatch, "mine", slow)
    with caplog.at_level(logging.INFO):
        assert choose_kernel("mine", SHAPE, CPU, torch.float32) is slow
    assert "Attention: mine, at a distance of" in caplog.text


def test_a_kernel_off_by_more_than_the_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "mine", unscaled)
    with pytest.raises(UsageError, match=rf"is off by .* {MAX_DISTANCE:g} is allowed"):
        choose_kernel("mine", SHAPE, CPU, torch.float32)
    add(monkeypatch, "mine", lambda q, k, v: SDPA(q, k, v) * float("nan"))
    with pytest.raises(UsageError, match="is off by nan"):
        choose_kernel("mine", SHAPE, CPU, torch.float32)


def test_a_kernel_that_fails_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "mine", broken)
    with pytest.raises(UsageError, match=r"mine fails at 24 tokens .*: no kernel image is available$"):
        choose_kernel("mine", SHAPE, CPU, torch.float32)


@pytest.mark.parametrize("trains", [False, True])
def test_auto_takes_the_fastest_exact_kernel_that_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trains: bool
) -> None:
    for name in list(BACKENDS):
        monkeypatch.delitem(BACKENDS, name)
    add(monkeypatch, "slow", slow)
    add(monkeypatch, "wrong", lambda q, k, v: v[:, : q.shape[1]])
    add(monkeypatch, "broken", broken)
    add(monkeypatch, "int8", quick, is_exact=False)
    add(monkeypatch, "quick", quick)
    add(monkeypatch, "half", quick, dtypes=attention.HALF)
    drawn = attention._random_inputs(SHAPE, CPU, torch.float32)
    with caplog.at_level(logging.INFO):
        assert attention._fastest(drawn, trains=trains) == "quick"
    assert "Attention: quick (measured at 24 tokens: slow" in caplog.text


def test_what_cannot_be_used_is_known_before_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert "needs a GPU" in str(backend_problem("cudnn", "cpu"))
    assert "needs the Python package sageattention" in str(backend_problem("sage", "cuda"))
    assert "FlashAttention 3" in str(backend_problem("flash3", "cuda"))
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    assert "no gradient" in str(backend_problem("sage", "cuda", trains=True))
    assert "bf16 only" in str(backend_problem("flash3", "cuda", dtype=torch.float32))
    assert backend_problem("flash3", "cuda", dtype=torch.bfloat16, trains=True) is None
    assert backend_problem("sdpa", "cpu", dtype=torch.float32, trains=True) is None


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.dtypes is not None])
def test_a_kernel_of_half_precision_leaves_calls_in_fp32_to_torch(name: str) -> None:
    query, key, value = (torch.randn(2, 16, 2, 16, generator=torch.manual_seed(i)) for i in range(3))
    torch.testing.assert_close(BACKENDS[name].kernel(query, key, value), SDPA(query, key, value))


def test_a_package_s_function_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages take (B, L, E, d); FlashAttention 3 returned a tuple in its first versions."""
    called = []

    class Package:
        def sageattn(self, query: Tensor, key: Tensor, value: Tensor, *, tensor_layout: str) -> Tensor:
            called.append(tensor_layout)
            return SDPA(query, key, value)

        def flash_attn_func(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
            called.append("flash3")
            return SDPA(query, key, value), None

    monkeypatch.setattr(attention, "import_module", lambda name: Package())
    drawn = attention._random_inputs(SHAPE, CPU, torch.bfloat16)
    for name in ("sage", "flash3"):
        assert torch.equal(BACKENDS[name].kernel(*drawn), SDPA(*drawn))
    assert called == ["NHD", "flash3"]


def test_every_attention_of_a_network_goes_through_the_chosen_kernel() -> None:
    network = ours(theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=2))
    calls: list[tuple[int, int]] = []

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append((query.shape[1], key.shape[1]))
        return SDPA(query, key, value)

    network.use_kernel(counted)
    layout = teacher_forcing(network.config, (1, 1, 1), 8, 8)
    x = inputs(frames=layout.frames, height=8, width=8)
    network(x.z, x.t, x.r, x.text, layout)
    assert len(calls) == network.config.layers * (len(layout.groups) + 1)
    assert sum(queries * keys for queries, keys in calls) == network.config.layers * (
        layout.pairs + layout.tokens * x.text.shape[1]
    )


def test_the_recipe_names_every_backend() -> None:
    names = ModelSection.model_fields["attention"].annotation
    assert set(names.__args__) == {"auto", *BACKENDS}  # type: ignore[union-attr]
