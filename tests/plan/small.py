"""Small stages, each both as a setup to plan and as a real trainer to measure."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyflow_cli.data.dataset import Batch
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import as_causal
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.plan.setup import Kind, Setup
from anyflow_cli.plan.steps import heaviest, sampled
from anyflow_cli.recipe import schema
from anyflow_cli.train import objectives
from anyflow_cli.train.rng import StepRng
from anyflow_cli.train.trainer import Trainer, make_accelerator

CONFIG = NetworkConfig(
    heads=2, head_dim=24, layers=2, ffn_dim=192, in_channels=8, out_channels=8, text_dim=32, freq_dim=32
)
LATENT = (4, 8, 8, 8)  # F, C, H, W
TEXT = (16, 32)  # L, D
LORA = schema.LoraSection(rank=8, alpha=8)


def heaviest_of(wanted: Setup) -> tuple[StepRng, ...]:
    return heaviest(wanted, *sampled(wanted))


def settings(kind: Kind, **changes: Any) -> schema.TrainingSection:
    values: dict[str, Any] = {"global_batch": 8, "preview_every": 0, "tensorboard": False, **changes}
    if kind == "on-policy":
        return schema.DistillSection(**values)
    return schema.TrainFlowMapSection(objective=cast("Any", kind), **values)


def setup(
    kind: Kind, *, lora: bool = True, checkpointing: bool = False, precision: str = "fp32", ranks: int = 1,
    config: NetworkConfig = CONFIG, gpu: bool = False, scores: NetworkConfig | None = None,
    causal: schema.CausalSection | None = None, **changes: Any,
) -> Setup:  # fmt: skip
    frames = 4 * (sum(causal.partition) if causal else LATENT[0]) - 3
    model = schema.ModelSection(
        lora=LORA if lora else None, gradient_checkpointing=checkpointing, frames=frames, causal=causal
    )
    latent = ((frames - 1) // 4 + 1, *LATENT[1:])
    return Setup(
        kind, config, model, settings(kind, **changes), latent, TEXT, cast("Any", precision), ranks, gpu,
        separate=scores is not None, scores=scores,
    )  # fmt: skip


def backbone(wanted: Setup) -> Backbone:
    """Built as ``train.stages`` builds it, from random weights instead of files."""
    lora = LoraSize(LORA.rank, LORA.alpha) if wanted.lora else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = FlowMapTransformer(wanted.network)
        tuned = FlowMapTransformer(wanted.network)
        other = FlowMapTransformer(wanted.scores) if wanted.scores else None
    for one in (plain, other):
        if one is not None:
            one.store_as(torch.bfloat16 if lora and wanted.precision == "bf16" else torch.float32)
    network = plain.requires_grad_(False)
    if wanted.kind != "flow-matching":
        network = two_time_from(network)
        if wanted.model.causal is not None:
            network = as_causal(network, CausalConfig.from_recipe(wanted.model.causal))
    on_policy = wanted.kind == "on-policy"
    shared = lora and on_policy and other is None
    adapter = Backbone(tuned, lora=lora).state_dict_of("student") if shared else None
    teacher = tuned if on_policy and not lora else None
    result = Backbone(network, wanted.roles, lora=lora, teacher=other or teacher, real_adapter=adapter)
    for module in result.modules():
        if isinstance(module, FlowMapTransformer):
            module.gradient_checkpointing = wanted.model.gradient_checkpointing
    return result


def objective(wanted: Setup, roles: Backbone) -> objectives.Objective:
    if isinstance(wanted.settings, schema.DistillSection):
        return objectives.on_policy(roles, torch.randn(*TEXT), wanted.settings, 5.0, wanted.model.causal)
    assert isinstance(wanted.settings, schema.TrainFlowMapSection)
    own = wanted.settings
    return objectives.stage_one(
        own.objective,
        roles,
        torch.randn(*TEXT),
        own.flow_map,
        own.optimizer,
        wanted.model.shift,
        wanted.model.causal,
    )


def batch(samples: int, latent: tuple[int, ...] = LATENT) -> Batch:
    return Batch(
        torch.randn(samples, *latent), torch.randn(samples, *TEXT), [""] * samples, list(range(samples))
    )


def trainer(wanted: Setup, directory: Path) -> Trainer:
    assert wanted.settings is not None
    return Trainer(
        directory, objective(wanted, backbone(wanted)), cast("Any", None), wanted.settings,
        accelerator=make_accelerator(), precision=wanted.precision,
    )  # fmt: skip


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that are alive, from those there at the start; real tensors only."""

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0
        for tensor in there:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive[key] = weakref.ref(storage, lambda _: self._gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        del self._alive[key]
        self.now -= size


def measured_peak(wanted: Setup, directory: Path) -> int:
    """The most that a real trainer's tensors take in a step: in some, and in those that were rehearsed.

    The first makes the states of the optimizers, and is not looked at.
    """
    run, samples = trainer(wanted, directory), batch(wanted.share, wanted.latent)
    most = 0
    for run.step in (1, *sorted({2, 3, *(draws.step for draws in heaviest_of(wanted))} - {1})):
        states = [
            value
            for phase in run.optimizers
            for state in phase.optimizer.state.values()
            for value in state.values()
        ]
        there = [*run.backbone.parameters(), *run.ema.shadow.values(), samples.latents, samples.text, *states]
        live = Live(there)
        with live:
            run.train_step(samples)
        most = max(most, live.peak if run.step > 1 else 0)
    return most
