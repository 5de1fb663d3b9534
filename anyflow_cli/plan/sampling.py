"""What sampling holds and computes: the network, the text encoder, and the VAE that decodes.

Legend: F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.plan.hollow import Hollowing, hollow_out
from anyflow_cli.plan.ledger import Ledger, Segment, Watch, storage_bytes
from anyflow_cli.plan.rehearsal import STEPS, Rehearsal
from anyflow_cli.plan.setup import Setup
from anyflow_cli.plan.steps import at_full_depth

FRAMES = (3, 4)


class Call(NamedTuple):
    """Bytes at the peak of a sampling, its weights left out, and operations of a step and sample.

    ``cache``: the part of the peak that keys of finished chunks take. ``filling``: operations of a sample
    that do not depend on the number of steps, those of keeping its chunks.
    """

    peak: int
    cache: int
    operations: float
    filling: float

    def work(self, steps: int) -> float:
        """Operations of a sample in so many steps."""
        return steps * self.operations + self.filling

    @property
    def parts(self) -> dict[str, int]:
        """Its bytes by part."""
        return {"cache": self.cache, "activations": self.peak - self.cache}


class Decoding(NamedTuple):
    """Bytes of the VAE's weights, and of what decoding one video adds."""

    weights: int
    peak: int


@lru_cache(maxsize=64)
def sampling_of(setup: Setup, samples: int, is_guided: bool) -> Call:
    """Sample so many videos at once; guidance doubles the batch of every evaluation."""

    def run(depth: int) -> list[Segment]:
        return Rehearsal(setup, depth, keeps_gradients=False).sample(samples, is_guided=is_guided)

    segments = at_full_depth(setup, run)
    heaviest = max(segments, key=lambda segment: segment.peak)
    fills = sum(segment.operations for segment in segments if segment.label.fills)
    evaluated = sum(segment.operations for segment in segments) - fills
    return Call(heaviest.peak, heaviest.parts["cache"], evaluated / (STEPS * samples), fills / samples)


def decoding(vae: Mapping[str, Any], latent: tuple[int, int, int, int]) -> Decoding:
    """Decode latents (F, C, H, W) with diffusers' Wan VAE of this configuration; empty, it is Wan 2.1's.

    It decodes one latent frame after another, so that what it holds is a straight line in their number.
    """
    frames, config = latent[0], json.dumps(dict(vae))
    if frames <= FRAMES[1]:
        return _decoding(config, latent)
    low, high = (_decoding(config, (some, *latent[1:])) for some in FRAMES)
    return Decoding(low.weights, low.peak + (high.peak - low.peak) * (frames - FRAMES[0]))


@lru_cache(maxsize=16)
def _decoding(vae: str, latent: tuple[int, int, int, int]) -> Decoding:
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model: Any = AutoencoderKLWan.from_config(json.loads(vae))
    ledger = Ledger()
    hollow_out(model)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        ledger.ignore(parameter)
    with Hollowing(), Watch(ledger, storage_bytes):
        VideoVAE(model).decode(torch.empty(1, *latent))
    return Decoding(weights, max(segment.peak for segment in ledger.segments))
