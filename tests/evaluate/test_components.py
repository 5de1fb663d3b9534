"""Connected components against a flood fill."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from anyflow_cli.evaluate.shapes.components import component_labels, largest_component


def flood(mask: NDArray[np.bool_], y: int, x: int) -> set[tuple[int, int]]:
    part, front = set(), [(y, x)]
    while front:
        y, x = front.pop()
        if (y, x) in part or not (0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]) or not mask[y, x]:
            continue
        part.add((y, x))
        front += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return part


@pytest.mark.parametrize("density", [0.3, 0.55, 0.6, 0.7])
def test_labels_are_those_of_a_flood_fill(density: float) -> None:
    mask = np.random.default_rng(0).random((20, 23)) < density
    labels = component_labels(mask)
    assert ((labels > 0) == mask).all()
    for number in range(1, labels.max() + 1):
        y, x = np.argwhere(labels == number)[0]
        assert {(int(i), int(j)) for i, j in np.argwhere(labels == number)} == flood(mask, int(y), int(x))


def test_the_component_with_the_largest_weight_is_kept_not_the_widest() -> None:
    mask = np.zeros((2, 8, 8), bool)
    mask[:, 1, 1:7] = True  # six light pixels
    mask[:, 4:6, 2] = True  # two heavy ones
    weight = np.where(mask, 1.0, 0.0).astype(np.float32)
    weight[1, 4:6, 2] = 5.0
    largest = largest_component(mask, weight)
    assert largest[0].sum() == 6
    assert largest[1].sum() == 2


def test_components_of_adjacent_frames_stay_separate() -> None:
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 3, :] = True  # adjacent to the first row of frame 1 only in memory
    mask[1, 0, :2] = True
    mask[1, 2:, :] = True
    largest = largest_component(mask, mask.astype(np.float32))
    assert not largest[1, 0].any()
    assert largest[1, 2:].all()


def test_an_empty_mask_has_no_component() -> None:
    assert not largest_component(np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), np.float32)).any()
    assert not component_labels(np.zeros((4, 4), bool)).any()
