"""What a training step's cost follows from, taken from a recipe, and the networks it is about.

Mirrors what ``train/stages.py`` builds from folders, without the folders: roles, adapters, types of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from anyflow_cli.model.backbone import Backbone, BackboneSources, Role
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.layout import Layout, Segment
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.precision import Precision
from anyflow_cli.recipe import schema
from anyflow_cli.train import objectives

Kind = Literal["flow-map", "flow-matching", "consistency-ode", "on-policy", "sampling", "synthesis"]
TEACHER, SCORES = Path("teacher"), Path("scores")  # stand for folders
ONE_TIME = ("flow-matching", "synthesis")  # kinds that run a teacher as it is


@dataclass(frozen=True)
class Setup:
    """One process of one stage, or of sampling: then ``settings`` are of no matter.

    ``separate``: the start is no adapter of the teacher, so it is a base too. ``scores``: sizes of a real
    score that is another model than the teacher. ``shards``: processes that share one copy (FSDP2); None:
    each has its own.
    """

    kind: Kind
    network: NetworkConfig  # of the teacher
    model: schema.ModelSection
    settings: schema.TrainingSection | None
    latent: tuple[int, int, int, int]  # F, C, H, W
    text: tuple[int, int]  # L, D
    precision: Precision
    ranks: int
    gpu: bool
    separate: bool = False
    shards: int | None = None
    offload: bool = False
    scores: NetworkConfig | None = None

    @property
    def depth(self) -> int:
        """Blocks of the network that has fewest; a rehearsal takes away as many of each."""
        return min(self.network.layers, (self.scores or self.network).layers)

    @property
    def config(self) -> NetworkConfig:
        """Of the student."""
        causal = self.model.causal
        if self.kind in ONE_TIME:
            return self.network
        own = None if causal is None else CausalConfig.from_recipe(causal)
        return replace(self.network, causal=own, two_time=True)

    @property
    def small(self) -> tuple[int, int]:
        """Height and width of latents that stand for the true ones: the largest patch."""
        return self.config.patch if self.config.causal is None else self.config.causal.compressed_patch

    @property
    def small_tokens(self) -> int:
        """True tokens for one of small latents."""
        return self.latent[2] * self.latent[3] // (self.small[0] * self.small[1])

    def true_layout(self, small: Layout) -> Layout:
        """The layout of the true latents for one of small ones."""

        def moved(segment: Segment) -> Segment:
            offset = segment.cache_offset
            return segment if offset is None else replace(segment, cache_offset=offset * self.small_tokens)

        return replace(
            small,
            segments=tuple(map(moved, small.segments)),
            height=self.latent[2],
            width=self.latent[3],
        )

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles its backbone has."""
        return ("student", "real", "fake") if self.kind == "on-policy" else ("student",)

    @property
    def trains(self) -> bool:
        """Whether anything does."""
        return self.settings is not None

    @property
    def lora(self) -> LoraSize | None:
        """Size of the adapters, None where whole networks train or nothing does."""
        lora = self.model.lora if self.trains else None
        return LoraSize(lora.rank, lora.alpha) if lora else None

    @property
    def share(self) -> int:
        """Samples a step and process."""
        assert self.settings is not None
        return max(self.settings.global_batch // self.ranks, 1)

    @property
    def micro(self) -> int:
        """Samples a forward pass, as the trainer cuts them."""
        assert self.settings is not None
        return min(self.settings.micro_batch or self.share, self.share)

    @property
    def stored(self) -> torch.dtype:
        """Type of frozen weights; those that train are fp32."""
        frozen = self.lora is not None or (self.gpu and not self.trains)
        return torch.bfloat16 if frozen and self.precision == "bf16" else torch.float32


def backbone_on_meta(setup: Setup, depth: int) -> Backbone:
    """The stage's backbone on the meta device, its shallowest network cut to ``depth`` blocks.

    Others lose as many, so that whatever is a straight line in the blocks of each stays one in ``depth``.
    """
    config, scores = (
        replace(each, layers=each.layers - setup.depth + depth)
        for each in (setup.network, setup.scores or setup.network)
    )
    networks = {TEACHER: config, SCORES: scores}

    def load(path: Path, dtype: torch.dtype) -> FlowMapTransformer:
        return _plain(networks[path], setup.stored)

    on_policy = setup.kind == "on-policy"
    apart = on_policy and (setup.lora is None or setup.separate)
    with torch.device("meta"):
        sources = BackboneSources(
            TEACHER,
            setup.roles,
            two_time=setup.kind not in ONE_TIME,
            scores=SCORES if apart else None,
            real_adapter=_tuned_adapter(setup, config) if on_policy and not apart else None,
        )
        model = setup.model if setup.trains else setup.model.model_copy(update={"lora": None})
        backbone = Backbone.build(model, sources, load, precision=setup.precision)
    for module in backbone.modules():
        if isinstance(module, FlowMapTransformer):
            module.gradient_checkpointing = setup.model.gradient_checkpointing
            module.checkpoint_every_n_blocks = setup.model.checkpoint_every_n_blocks
    return backbone if setup.trains else backbone.requires_grad_(False)


def _tuned_adapter(setup: Setup, config: NetworkConfig) -> dict[str, Tensor]:
    """What tuning the teacher leaves; as the paper does, a plan counts on it."""
    tuned = Backbone(_plain(replace(config, two_time=False), torch.float32), lora=setup.lora)
    return tuned.state_dict_of("student")


def _plain(config: NetworkConfig, dtype: torch.dtype) -> FlowMapTransformer:
    return FlowMapTransformer(config).store_as(dtype).requires_grad_(False)


def objective_of(setup: Setup, backbone: Backbone, negative: Tensor) -> objectives.Objective:
    """The objective that the trainer would run."""
    settings, shift, causal = setup.settings, setup.model.shift, setup.model.causal
    if isinstance(settings, schema.DistillSection):
        return objectives.on_policy(backbone, negative, settings, shift, causal)
    assert isinstance(settings, (schema.TrainFlowMapSection, schema.FinetuneSection))
    name = setup.kind
    assert name == "flow-map" or name == "flow-matching" or name == "consistency-ode"
    return objectives.stage_one(
        name, backbone, negative, settings.flow_map, settings.optimizer, shift, causal
    )
