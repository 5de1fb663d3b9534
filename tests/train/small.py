"""A small run for the tests of this room: a random network, random latents, one thread."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.model.experts import ExpertPair
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.parallelize import parallelize
from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint, dcp
from anyflow_cli.train import objectives
from anyflow_cli.train.trained_expert import TrainedExpert
from anyflow_cli.train.trainer import Trainer, make_accelerator

CONFIG = NetworkConfig(
    heads=2, head_dim=8, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=16
)
LATENT = (3, 4, 4, 4)  # F, C, H, W
NEGATIVE = torch.zeros(5, 8)
OPTIMISER = schema.OptimizerSection(lr=1e-2, warmup_steps=2)
Kind = Literal[
    "flow-map", "flow-matching", "consistency-ode", "on-policy",
    "causal-flow-map", "causal-consistency-ode", "causal-on-policy",
    "experts-flow-map", "experts-on-policy",
]  # fmt: skip
BOUNDARY = 0.8  # between the experts
CAUSAL = schema.CausalSection(partition=(1, 1, 1), full_chunks=2, bidirectional=0.4)


class RandomData:
    """Eight fixed latents; the samples of a step are the next of them in turn."""

    def __init__(self, batch: int, latents: Tensor | None = None) -> None:
        self.batch = batch
        generator = torch.Generator().manual_seed(7)
        self.latents = torch.randn(8, *LATENT, generator=generator) if latents is None else latents
        self.text = torch.randn(8, *NEGATIVE.shape, generator=generator)

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Iterator[Batch]:
        for step in count(start):
            at = [(step * self.batch + i) % 8 for i in range(self.batch)][part]
            yield Batch(self.latents[at], Condition(self.text[at]), [""] * len(at), at)

    def account(self, step: int, places: Iterable[int]) -> None:
        raise AssertionError(f"corrupt at step {step}: {list(places)}")


def network(seed: int = 0, *, two_time: bool = True) -> FlowMapTransformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = FlowMapTransformer(CONFIG)
    return two_time_from(plain) if two_time else plain


def backbone(kind: Kind, lora: bool = False, seed: int = 0, **changes: Any) -> Backbone:
    """The networks of a stage; ``changes`` are those of its objective, which decide the roles."""
    roles = objectives.roles_of(
        schema.DistillSection(**changes)
        if "on-policy" in kind
        else schema.TrainFlowMapSection(flow_map=schema.FlowMapSection(**changes))
    )
    size = LoraSize(4, 4) if lora else None
    student = network(seed, two_time=kind != "flow-matching")
    if kind.startswith("causal"):
        student = causal_from(student, CausalConfig.from_recipe(CAUSAL))
    if kind.startswith("experts"):
        student = ExpertPair(student, network(seed + 1), BOUNDARY)
    return Backbone(student, roles, lora=size)


def objective(kind: Kind, roles: Backbone, **changes: Any) -> objectives.Objective:
    causal = CAUSAL if kind.startswith("causal") else None
    name = kind.removeprefix("causal-").removeprefix("experts-")
    experts = TrainedExpert(BOUNDARY if kind.startswith("experts") else None)
    if name == "on-policy":
        settings = schema.DistillSection(optimizer=OPTIMISER, **changes)
        return objectives.on_policy(roles, NEGATIVE, settings, 5.0, causal, experts)
    flow_map = schema.FlowMapSection(**changes)
    return objectives.stage_one(cast("Any", name), roles, NEGATIVE, flow_map, OPTIMISER, 5.0, causal, experts)


def training(**changes: Any) -> schema.TrainingSection:
    defaults: dict[str, Any] = {
        "steps": 6, "global_batch": 4, "optimizer": OPTIMISER, "ema": schema.EmaSection(decay=0.9, start=3),
        "checkpoint_every": 2, "log_every": 2, "preview_every": 0, "tensorboard": False,
    }  # fmt: skip
    return schema.TrainingSection(**(defaults | changes))


def trainer(
    directory: Path, kind: Kind = "flow-map", *, lora: bool = False, changes: dict[str, Any] | None = None,
    hooks: dict[str, Any] | None = None, source: Any = None, checkpointing: bool = False, **settings: Any,
) -> Trainer:  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    run = training(**settings)
    roles = backbone(kind, lora, **(changes or {}))
    accelerator, model = (
        make_accelerator(partly=kind.startswith(("causal", "experts"))),
        schema.ModelSection(gradient_checkpointing=checkpointing),
    )
    launch = (hooks or {}).get("launch", schema.LaunchSection())
    parallelize(roles.networks(), model, launch, accelerator.device)
    return Trainer(
        directory, objective(kind, roles, **(changes or {})), source or RandomData(run.global_batch), run,
        accelerator=accelerator, **(hooks or {}),
    )  # fmt: skip


def sharded_checkpoint(directory: Path) -> Path:
    """A checkpoint in the format of sharded runs, written by one process."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    plain = directory / "plain"
    trainer(plain, "on-policy", steps=1).run()
    source = checkpoint.newest(plain / "checkpoints")
    assert source is not None
    state = checkpoint.load(source)
    with checkpoint.writing(directory / "checkpoints", state.step) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed is not initialized
        checkpoint.begin(partial)
        flat = dcp.flattened(state.tensors, state.optimizers)
        save(flat, storage_writer=FileSystemWriter(partial / dcp.SHARDS), no_dist=True)
        written = checkpoint.commit(partial, state, 1)
    shutil.rmtree(plain)
    return written


def rows(directory: Path) -> list[dict[str, Any]]:
    """The metrics of a run, less what the clock decides."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "memory")} for line in lines]


def plain(value: torch.Tensor) -> torch.Tensor:
    """Numbers of a moment, which torchao may store in 8 bits."""
    return value if type(value) is torch.Tensor else value.dequantize()


def same_run(a: Path, b: Path) -> None:
    """Fail unless two runs end with the same bits."""
    paths = [checkpoint.newest(directory / "checkpoints") for directory in (a, b)]
    first, second = (checkpoint.load(path) for path in paths if path is not None)
    assert first.step == second.step
    assert first.tensors.keys() == second.tensors.keys()
    for part, tensors in first.tensors.items():
        assert tensors.keys() == second.tensors[part].keys()
        for name, value in tensors.items():
            assert torch.equal(value, second.tensors[part][name]), f"{part}: {name}"
    for part, state in first.optimizers.items():
        for number, moments in state["state"].items():
            for name, value in moments.items():
                other = second.optimizers[part]["state"][number][name]
                assert torch.equal(plain(value), plain(other)), f"{part}: {name}"
    assert rows(a) == rows(b)
