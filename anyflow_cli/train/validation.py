"""Clips that fine-tuning leaves out, and how well a model follows the flow map on them.

The last tenth of a data set, at most 64 clips; of fewer than ten clips none can be spared, and the error is
that of the clips trained on. Draws are fixed, so that before and after differ by the model alone.

Legend: B clips, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.precision import autocast, resolve_precision
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.train.objectives import FlowMapTerm, window_of
from anyflow_cli.train.rng import StepRng

SHARE, MOST = 10, 64
TRIES = 4  # times and noises a clip
SEED = 2**40


class TrainingPart(LatentData):
    """All but the clips that are held out."""

    def __len__(self) -> int:
        """How many there are to train on."""
        return self.manifest.count - held_out(self.manifest.count)


def held_out(count: int) -> int:
    """How many of ``count`` clips are left out."""
    return min(count // SHARE, MOST)


class FlowMapError(NamedTuple):
    """Mean squared error of Alg. 1, unweighted, on so many clips; ``unseen`` if not trained on."""

    error: float
    clips: int
    unseen: bool


@torch.no_grad()
def flow_map_error(network: FlowMapTransformer, recipe: Recipe, data: Path) -> FlowMapError:
    """The error of a model on the clips held out of ``data``."""
    clips = LatentData(data, recipe.model.max_text_tokens)
    unseen = held_out(len(clips))
    positions = range(len(clips) - unseen if unseen else 0, len(clips))
    settings = recipe.finetune.flow_map.model_copy(update={"adaptive": False, "text_dropout": 0.0})
    view = window_of(recipe.model.causal, settings)
    term = FlowMapTerm(Backbone(network, ("student",)), clips.negative, settings, recipe.model.shift, view)
    total = torch.zeros(2, dtype=torch.float64)
    with autocast(resolve_precision(recipe.model.precision, network.device), network.device):
        for place, position in enumerate(positions):
            batch = clips.batch([position])
            for step in range(TRIES):
                _, report = term(batch, StepRng(SEED, step, len(positions), (place,)))
                total += report["boundary"] + report["non_boundary"]
    return FlowMapError(float(total[0] / total[1]), len(positions), unseen > 0)
