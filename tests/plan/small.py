"""Small stages, each both as a setup to plan and as a real trainer to measure."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone, BackboneSources
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.experts import ExpertPair
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import apply_checkpointing
from anyflow_cli.plan.networks import SCORES, START, Setup
from anyflow_cli.plan.steps import SAMPLED_STEPS, CallCosts
from anyflow_cli.recipe import schema
from anyflow_cli.train import objectives
from anyflow_cli.train.rng import StepRng, micro_positions
from anyflow_cli.train.trainer import Trainer, make_accelerator

CONFIG = NetworkConfig(
    heads=2, head_dim=24, layers=2, ffn_dim=192, in_channels=8, out_channels=8, text_dim=32, freq_dim=32
)
LATENT = (4, 8, 8, 8)  # F, C, H, W
TEXT = (16, 32)  # L, D
LORA = schema.LoraSection(rank=8, alpha=8)
Kind = Literal["flow-map", "flow-matching", "consistency-ode", "on-policy"]


def heaviest_steps(wanted: Setup) -> set[int]:
    """Steps with the micro batches that a plan takes its memory from."""
    costs = CallCosts(wanted, [])
    own = wanted.settings
    assert own is not None
    draws = [
        StepRng(own.seed, step, own.global_batch, positions)
        for step in SAMPLED_STEPS
        for positions in micro_positions(own.global_batch, own.micro_batch, 0, 1)
    ]
    terms = [term for phase in objective(wanted, backbone(wanted)).phases for term in phase.terms]
    return {
        max(draws, key=lambda one: costs.weight(term.network_calls(wanted.latent, one))).step
        for term in terms
    }


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
    own_scores = scores if lora or scores else config
    return Setup(
        model, settings(kind, **changes), config, latent, TEXT, cast("Any", precision), gpu,
        two_time=kind != "flow-matching",
        scores=own_scores if kind == "on-policy" else None,
        ranks=ranks,
    )  # fmt: skip


def backbone(wanted: Setup) -> Backbone:
    """Built as training builds it, from random weights instead of files."""
    sizes = {START: wanted.network, SCORES: wanted.scores or wanted.network}
    lora, is_on_policy = wanted.model.lora is not None, isinstance(wanted.settings, schema.DistillSection)

    def load(path: Path, dtype: torch.dtype) -> FlowMapTransformer:
        config, boundary = replace(sizes[path], boundary=None), sizes[path].boundary
        network = FlowMapTransformer(config)
        if boundary is not None:
            network = ExpertPair(network, FlowMapTransformer(config), boundary)
        return network.store_as(dtype).requires_grad_(False)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sources = BackboneSources(START, objectives.roles_of(wanted.settings), two_time=wanted.two_time)
        if is_on_policy:
            sources = replace(sources, scores=None if wanted.scores is None else SCORES)
        if is_on_policy and lora and wanted.scores is None:
            tuned = Backbone.build(wanted.model, BackboneSources(START, two_time=False), load)
            sources = replace(sources, real_adapter=tuned.state_dict_of("student"))
        result = Backbone.build(wanted.model, sources, load, precision=wanted.precision)
    for network in result.networks():
        apply_checkpointing(network, wanted.model)
    return result


def objective(wanted: Setup, roles: Backbone) -> objectives.Objective:
    assert wanted.settings is not None
    return objectives.objective_of(wanted.model, wanted.settings, roles, torch.randn(*TEXT))


def batch(samples: int, latent: tuple[int, ...] = LATENT) -> Batch:
    return Batch(
        torch.randn(samples, *latent),
        Condition(torch.randn(samples, *TEXT)),
        [""] * samples,
        list(range(samples)),
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
    """The most that a real trainer's tensors take in a step: in some, and in those that the plan looks at.

    The first makes the states of the optimizers, and is not looked at.
    """
    assert wanted.settings is not None
    run, samples = trainer(wanted, directory), batch(wanted.settings.global_batch, wanted.latent)
    most = 0
    for run.step in (1, *sorted({2, 3, *heaviest_steps(wanted)} - {1})):
        states = [
            value
            for phase in run.optimizers
            for state in phase.optimizer.state.values()
            for value in state.values()
        ]
        there = [
            *run.backbone.parameters(),
            *run.ema.shadow.values(),
            samples.latents,
            samples.condition.text,
            *states,
        ]
        live = Live(there)
        with live:
            run.train_step(samples)
        most = max(most, live.peak if run.step > 1 else 0)
    return most
