"""Samples of a model in training, as contact sheets: rows are captions, columns step counts.

Each preview starts from the same noise and the same captions, the first of the data set with their stored
embeddings, so two sheets of a run differ by training alone.

Legend: B captions, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.video import to_pixels
from anyflow_cli.flow.noise import noise
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.recipe.schema import ExpertGuidance, ModelSection
from anyflow_cli.sample.sampler import Method, VideoSampler
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet
from anyflow_cli.utils.distributed import computed_by_first
from anyflow_cli.utils.files import atomic_write


@dataclass(frozen=True)
class PreviewSettings:
    """How the student is sampled for previews; ``guidance`` is for a teacher in tuning."""

    method: Method
    nfe: Sequence[int]
    captions: int
    guidance: float | ExpertGuidance | None = None


def make_preview(
    directory: Path,
    backbone: Backbone,
    data: LatentData,
    pipeline: Path,
    settings: PreviewSettings,
    model: ModelSection,
    writes: bool = True,
) -> Callable[[int], None]:
    """Return a function of the step that writes ``previews/step-...png``.

    Args:
        directory: The run.
        backbone: Its student is sampled.
        data: Gives captions, embeddings and the shape of the latents.
        pipeline: Folder of the VAE, which is loaded for each preview and then freed.
        settings: Method, step counts, number of captions, guidance.
        model: Shift and precision.
        writes: Whether this process writes. All processes call a network that is sharded or shares videos.
    """
    read = partial(data.batch, data.buckets[0].positions[: settings.captions])
    context = backbone.network_of("student").context
    batch = read() if context is None else computed_by_first(read, context.everyone)
    condition, seeds = batch.condition, range(len(batch.captions))

    @torch.no_grad()
    def preview(step: int) -> None:
        sampler = VideoSampler(
            backbone.network_of("student"), model, data.latent_shape,
            method=settings.method, guidance=settings.guidance, negative=data.negative,
            bind=partial(backbone.velocity, "student"), streams=_preview_streams,
        )  # fmt: skip
        # to the CPU: the average must not leave its place before the last weights were read
        latents = [next(sampler.latents(condition, seeds, nfe, len(seeds))).cpu() for nfe in settings.nfe]
        if not writes:
            return
        vae = VideoVAE.load(pipeline, sampler.device)
        columns = [to_pixels(vae.decode(column)) for column in latents]
        rows = [
            SheetRow(caption, [column[i] for column in columns]) for i, caption in enumerate(batch.captions)
        ]
        headings = [f"{nfe} step{'s' * (nfe > 1)}" for nfe in settings.nfe]
        with atomic_write(directory / "previews" / f"step-{step:06d}.png") as temporary:
            contact_sheet(rows, headings, title=f"step {step}").save(temporary, format="PNG")

    return preview


def _preview_streams(seed: int, shape: Sequence[int]) -> tuple[Tensor, torch.Generator]:
    """Starting noise of a seed; later noise is the next seed's, as in the previews of all earlier runs."""
    return noise(seed, shape), torch.Generator().manual_seed(seed + 1)
