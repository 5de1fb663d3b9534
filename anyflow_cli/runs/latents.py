"""Latents of a run: data sets of anyflow's, and published ones with what the run's model supplies to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.published import ModelSide, PublishedData
from anyflow_cli.data.shards import StoredShape
from anyflow_cli.errors import UsageError
from anyflow_cli.model.encoders import TextEncoder, VaeConfig
from anyflow_cli.model.layouts.components import STATISTICS_21, component_config
from anyflow_cli.model.pipeline_io import component
from anyflow_cli.recipe.schema import ModelSection, Recipe, latent_frames
from anyflow_cli.runs.paths import CACHE
from anyflow_cli.utils.distributed import default_device

Kind = TypeVar("Kind", bound=LatentData)


def open_latents(recipe: Recipe, address: str | Path, pipeline: Path, run: Path, kind: type[Kind]) -> Kind:
    """Open the data set that a run trains on.

    The first process to open a published one indexes it and embeds what it lacks; the others read that.

    Args:
        recipe: Text length, negative prompt, and whether longer clips are cut.
        address: The data set.
        pipeline: Folder with the VAE and the text encoder.
        run: Directory of the run; what is cached is beside it.
        kind: Which samples: all, or those that are not held out.
    """
    model = recipe.model
    frames = latent_frames(model.frames) if recipe.data.truncate else None
    lengths = None if model.causal is None else list(accumulate(model.causal.partition))
    supplied = model_side(recipe, pipeline, run.parent / CACHE)
    data = kind(address, model.max_text_tokens, supplied, frames, lengths)
    if isinstance(data.source, PublishedData):
        data.source.prepare()
    return data


def check_sizes(model: ModelSection, data: object, shapes: Sequence[StoredShape]) -> None:
    """Refuse latents of another size than the recipe's, the largest of several, with settings that fit."""
    frames, _, height, width = shapes[0]
    scale = model.vae_scale
    wanted = (latent_frames(model.frames), model.height // scale, model.width // scale)
    largest = [shape for shape in shapes if math.prod(shape) == math.prod(shapes[0])]
    if wanted in [(frames, height, width) for frames, _, height, width in largest]:
        return
    sizes = {"frames": 4 * frames - 3, "height": height * scale, "width": width * scale}
    fitting = ", ".join(f"model.{key}={size}" for key, size in sizes.items())
    if model.causal is not None:
        size = max(model.causal.partition)
        chunks = [*[frames % size] * (frames % size > 0), *[size] * (frames // size)]
        fitting += f", model.causal.partition=[{','.join(map(str, chunks))}]"
    cut = "; or cut the clips to the recipe's frames with data.truncate=true" if frames > wanted[0] else ""
    raise UsageError(
        f"{data} has latents of {frames} frames of {height}x{width}; the recipe's {model.frames} "
        f"frames of {model.height}x{model.width} have {wanted[0]} of {wanted[1]}x{wanted[2]}.",
        f"Set {fitting}{cut}.",
        everywhere=True,
    )


def model_side(recipe: Recipe, pipeline: Path, cache: Path) -> ModelSide:
    """What a pipeline supplies to a published data set; the text encoder is loaded when it is needed."""
    limit = recipe.model.max_text_tokens

    def embed(batches: Iterable[Sequence[str]]) -> Iterator[list[Tensor]]:
        device = default_device()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        encoder = TextEncoder.load(pipeline, dtype, device)
        for captions in batches:
            padded, lengths = encoder.encode(captions, limit).cpu(), encoder.tokens(captions)
            yield [text[: min(length, limit)].clone() for text, length in zip(padded, lengths, strict=True)]

    config = VaeConfig.model_validate(component_config(component(pipeline, "vae")))
    mean = config.latents_mean or STATISTICS_21["latents_mean"]
    std = config.latents_std or STATISTICS_21["latents_std"]
    encoder = f"{component(pipeline, 'text_encoder').resolve()}, {limit} tokens"
    return ModelSide(cache, mean, std, embed, encoder, recipe.model.negative_prompt)
