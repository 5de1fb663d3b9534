"""Clips held out of fine-tuning, and the flow-map error of a model on them.

Held out is the last tenth of the clips of each latent shape, at most 64. A data set of fewer than ten clips
holds out none; the error is then that of clips trained on. Times and noise are fixed, so the errors before
and after fine-tuning differ by the model alone.

Legend: B clips, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from anyflow_cli.data.dataset import Bucket, LatentData
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.precision import autocast, resolve_precision
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.train.objectives import FlowMapTerm, windows_for
from anyflow_cli.train.rng import StepRng
from anyflow_cli.train.trained_expert import TrainedExpert

SHARE, MOST = 10, 64
DRAWS = 4  # of time and noise per clip
SEED = 2**40


class TrainingPart(LatentData):
    """A data set without the clips that are held out."""

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The clips to train on, by latent shape."""
        return tuple(
            Bucket(shape, positions[: len(positions) - held_out(len(positions))])
            for shape, positions in super().buckets
        )


def held_out(count: int) -> int:
    """Number of clips that are held out of ``count``."""
    return min(count // SHARE, MOST)


class FlowMapError(NamedTuple):
    """Unweighted mean squared error of Alg. 1 on so many clips; ``unseen`` ones were not trained on."""

    error: float
    clips: int
    unseen: bool


@torch.no_grad()
def flow_map_error(network: FlowMapTransformer, recipe: Recipe, clips: LatentData) -> FlowMapError:
    """Measure the error of a model on the clips held out of a data set."""
    unseen = [
        position for _, bucket in clips.buckets for position in bucket[len(bucket) - held_out(len(bucket)) :]
    ]
    positions = unseen or range(len(clips))
    own = {"adaptive": "off", "text_dropout": 0.0, "target": "data"}  # of the model alone
    settings = recipe.finetune.flow_map.model_copy(update=own)
    windows = windows_for(recipe.model.causal, settings)
    term = FlowMapTerm(
        Backbone(network, ("student",)), clips.negative, settings, recipe.model.shift, windows,
        TrainedExpert(network.config.boundary, recipe.model.expert),
    )  # fmt: skip
    total = torch.zeros(2, dtype=torch.float64)
    with autocast(resolve_precision(recipe.model.precision, network.device), network.device):
        for place, position in enumerate(positions):
            batch = clips.batch([position])
            for step in range(DRAWS):
                _, report = term(batch, StepRng(SEED, step, len(positions), (place,)))
                total += report["boundary"] + report["non_boundary"]
    return FlowMapError(float(total[0] / total[1]), len(positions), bool(unseen))
