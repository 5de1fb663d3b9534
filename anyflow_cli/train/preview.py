"""Samples of a model in training, as one contact sheet a time: rows are captions, columns step counts.

Each preview starts from the same noise and the same embedded captions, so that two sheets of a run differ by
training alone. The first captions of the data set are taken: their embeddings are at hand.

Legend: B captions, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.video import to_pixels
from anyflow_cli.flow.noise import batch_noise
from anyflow_cli.flow.samplers import SAMPLERS
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity, guided
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.chunk_sampling import sample_chunks
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.precision import Precision, autocast
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet
from anyflow_cli.utils.files import atomic_write


@dataclass(frozen=True)
class PreviewPlan:
    """How to sample: a teacher is guided (``guidance`` above 1), a student is not."""

    sampler: Literal["flow-map", "euler", "consistency"]
    nfe: Sequence[int]
    guidance: float
    shift: float
    captions: int


def make_preview(
    directory: Path,
    backbone: Backbone,
    data: LatentData,
    pipeline: Path,
    plan: PreviewPlan,
    precision: Precision,
    writes: bool = True,
) -> Callable[[int], None]:
    """Give a function of the step that writes ``previews/step-...png``; the VAE is loaded only for it.

    Where the network is sharded all processes have to sample, and one ``writes``.
    """
    batch = data.batch(range(min(plan.captions, len(data))))
    noise = batch_noise(range(len(batch.captions)), data.latent_shape)

    @torch.no_grad()
    def preview(step: int) -> None:
        device = backbone.network_of("student").device
        sample = _sampling(backbone, data, batch.text.to(device), plan)
        with autocast(precision, device):
            # to the CPU: the average must not leave its place before the last weights were read
            latents = [sample(noise.to(device), grid(nfe, plan.shift)).cpu() for nfe in plan.nfe]
        if not writes:
            return
        vae = VideoVAE.load(pipeline, device)
        columns = [to_pixels(vae.decode(part)) for part in latents]
        rows = [
            SheetRow(caption, [column[i] for column in columns]) for i, caption in enumerate(batch.captions)
        ]
        sheet = contact_sheet(
            rows, [f"{nfe} step{'s' * (nfe > 1)}" for nfe in plan.nfe], title=f"step {step}"
        )
        with atomic_write(directory / "previews" / f"step-{step:06d}.png") as temporary:
            sheet.save(temporary, format="PNG")

    return preview


def _sampling(
    backbone: Backbone, data: LatentData, text: Tensor, plan: PreviewPlan
) -> Callable[[Tensor, Tensor], Tensor]:
    """From noise (B, F, C, H, W) and a grid to videos: of a causal model chunk after chunk."""
    model, sampler = backbone.velocity("student", text), SAMPLERS[plan.sampler]
    causal = model.network.config.causal
    if causal is not None:
        partition = causal.partition
        return lambda noise, times: torch.cat(
            list(sample_chunks(model, noise, partition, sampler, [times], generator=_generators(len(noise)))),
            dim=1,
        )
    velocity: Velocity = model
    if plan.guidance != 1:
        null = backbone.velocity("student", data.negative.to(text).expand_as(text))
        velocity = guided(model, null, plan.guidance)
    return lambda noise, times: sampler(velocity, noise, times, generator=_generators(len(noise)))


def _generators(count: int) -> list[torch.Generator]:
    """For samplers that draw on the way; the same at each preview."""
    return [torch.Generator().manual_seed(seed + 1) for seed in range(count)]
