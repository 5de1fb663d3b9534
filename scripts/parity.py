"""Measure how far our network is from each class of diffusers, in fp32 on small random weights.

    python scripts/parity.py

Prints one row per class and layout: the largest absolute difference of the velocities, and their largest
value. docs/models.md has the rows of one run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anyflow_cli.model.causal import teacher_forcing
from anyflow_cli.model.conditioned import Conditioned
from tests.model import test_pictures as pictures
from tests.model.helpers import Inputs, anyflow_velocity, inputs, ours, theirs, wan_velocity
from tests.sample.test_skyreels import network_beside_diffusers

PARTITION = (1, 2, 1, 2)
Row = tuple[str, str, Tensor, Tensor]  # class, what of it, our velocity, theirs


def rows() -> Iterator[Row]:
    """Every class of diffusers that our network can be."""
    x = inputs(frames=6, height=8, width=8)
    wan = theirs("WanTransformer3DModel")
    yield (
        "WanTransformer3DModel",
        "text to video",
        ours(wan)(x.z, x.t[:, 0], x.r, x.text),
        wan_velocity(wan, x),
    )
    yield (
        "WanTransformer3DModel",
        "a time per token (TI2V-5B)",
        ours(wan)(x.z, x.t, x.r, x.text),
        _by_token(wan, x),
    )
    for kind in pictures.KINDS:
        reference, condition, z = pictures.reference_of(kind), pictures.condition_of(kind), pictures.X.z
        t = pictures.X.t[:, 0]
        bound = Conditioned(ours(reference), condition)
        yield (
            "WanTransformer3DModel",
            kind,
            bound(z, t, t),
            pictures.their_velocity(reference, condition, z, t),
        )
    anyflow = theirs("AnyFlowTransformer3DModel")
    yield (
        "AnyFlowTransformer3DModel",
        "two times",
        ours(anyflow)(x.z, x.t, x.r, x.text),
        anyflow_velocity(anyflow, x),
    )
    far = theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=2, chunk_partition=PARTITION)
    network = ours(far)
    layout = teacher_forcing(network.config, PARTITION, 8, 8, clean=False)
    expected = far(x.z, 1000 * x.t, 1000 * x.r, x.text, list(PARTITION), return_dict=False)[0]
    yield (
        "AnyFlowFARTransformer3DModel",
        "chunks, two of them compressed",
        network(x.z, x.t, x.r, x.text, layout),
        expected,
    )
    for rate_input in (True, False):
        what = "with the input of the frame rate" if rate_input else "without it"
        yield "SkyReelsV2Transformer3DModel", what, *network_beside_diffusers(rate_input)


def _by_token(network: object, x: Inputs) -> Tensor:
    """Diffusers' network with the time of its frame for each token, as ``expand_timesteps`` gives it."""
    tokens = x.z.shape[3] // 2 * x.z.shape[4] // 2
    times = 1000 * x.t.repeat_interleave(tokens, dim=1)
    out: Tensor = network(x.z.transpose(1, 2), times, x.text, return_dict=False)[0]  # type: ignore[operator]
    return out.transpose(1, 2)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with torch.no_grad():
        print("| class of diffusers | what | largest difference | largest value |\n| --- | --- | --- | --- |")
        for name, what, got, expected in rows():
            print(f"| `{name}` | {what} | {(got - expected).abs().max():.1e} | {expected.abs().max():.1f} |")
