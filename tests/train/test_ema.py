"""The average's algebra."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anyflow_cli.train.ema import WeightEma


def moving(decay: float, start: int, values: list[float]) -> tuple[WeightEma, nn.Parameter]:
    weight = nn.Parameter(torch.tensor([values[0]], dtype=torch.float64))
    ema = WeightEma({"w": weight}, decay, start)
    for step, value in enumerate(values[1:], start=1):
        weight.data.fill_(value)
        ema.update(step)
    return ema, weight


def test_before_its_start_the_average_is_the_weights() -> None:
    ema, _ = moving(0.9, 10, [5.0, 1.0, 2.0, 3.0])
    assert ema.shadow["w"].item() == 3.0


def test_the_average_is_the_geometric_sum() -> None:
    ema, _ = moving(0.9, 2, [5.0, 1.0, 2.0, 3.0])
    assert ema.shadow["w"].item() == pytest.approx(0.81 * 1 + 0.09 * 2 + 0.1 * 3, rel=1e-12)


def test_constant_weights_are_their_own_average() -> None:
    ema, _ = moving(0.9, 1, [2.0, 2.0, 2.0])
    assert ema.shadow["w"].item() == pytest.approx(2.0)


def test_swap_exchanges_the_average_and_the_weights() -> None:
    ema, weight = moving(0.5, 1, [0.0, 4.0])
    seen = []

    def fail_inside() -> None:
        with ema.swapped():
            seen.append(weight.item())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert seen == [2.0]
    assert weight.item() == 4.0
    assert ema.shadow["w"].item() == 2.0


def test_loading_does_not_share_memory() -> None:
    ema, _ = moving(0.5, 1, [0.0, 4.0])
    saved = {"w": torch.tensor([7.0], dtype=torch.float64)}
    ema.load(saved)
    ema.update(2)
    assert saved["w"].item() == 7.0
    assert ema.shadow["w"].item() == 5.5
