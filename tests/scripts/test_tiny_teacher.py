"""The teacher's optimizer takes matrices of one shape together."""

from __future__ import annotations

import pytest
import torch

from tests.scripts.script import SCRIPTS, load


def test_matrices_together_are_updated_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS / "tiny"))
    script = load("tiny/teacher.py")
    torch.manual_seed(0)
    initial = [torch.randn(shape) for shape in ((16, 16), (64, 16), (16, 16), (16, 64))]
    together, separate = ([torch.nn.Parameter(matrix.clone()) for matrix in initial] for _ in range(2))
    own = script.Muon(together, lr=0.04)
    reference = torch.optim.Muon(separate, lr=0.02, weight_decay=0.0, momentum=0.95)
    for _ in range(3):
        for one, other in zip(together, separate, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        own.step(0.5)
        reference.step()  # type: ignore[no-untyped-call]
    for one, other, start in zip(together, separate, initial, strict=True):
        assert (one - other).norm() < 0.03 * (other - start).norm()  # torch iterates in bf16
