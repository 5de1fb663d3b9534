"""Seconds and memory of a sampling step and of training iterations at Wan 1.3B's shapes, random weights.

    python benchmarks/gpu.py                 one GPU: 81 frames of 480x832, bf16, adapters of rank 256
    python benchmarks/gpu.py --size small    a CPU: the same iterations of a small network

An iteration is forward and backward passes of all its terms on one batch, without the optimizer; blocks are
recomputed in the backward pass, as the large recipes do, unless --no-checkpointing is given. The table gives
the mean over steps (the random numbers of a step decide its calls), the ratios to plain flow matching, in
time (on a CPU processor time, which other work lengthens less) and in counted operations, and on a GPU the
share of its peak that these make (recomputation counts as work).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from anyflow_cli.data.dataset import Batch
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.precision import autocast
from anyflow_cli.plan.hardware import this_machine
from anyflow_cli.recipe import schema
from anyflow_cli.train import objectives
from anyflow_cli.train.rng import StepRng


@dataclass(frozen=True)
class Size:
    """A network, the latents (F, C, H, W) and text (L, D) it sees, and the rank of its adapters."""

    network: NetworkConfig
    latent: tuple[int, int, int, int]
    text: tuple[int, int]
    rank: int


SIZES = {
    "wan1b": Size(
        NetworkConfig(heads=12, head_dim=128, layers=30, ffn_dim=8960, in_channels=16, out_channels=16,
                      text_dim=4096, freq_dim=256),
        (21, 16, 60, 104), (512, 4096), 256,
    ),
    "small": Size(
        NetworkConfig(heads=4, head_dim=32, layers=4, ffn_dim=512, in_channels=8, out_channels=8,
                      text_dim=64, freq_dim=64),
        (9, 8, 16, 16), (32, 64), 8,
    ),
}  # fmt: skip
SHIFT = 5.0
STAGE_ONE = schema.FlowMapSection()
WITHOUT_QUOTIENT = schema.FlowMapSection(boundary=1.0, to_zero=0.0)
OPTIMISER = schema.OptimizerSection()


def on_policy(backbone: Backbone, negative: torch.Tensor, **changes: object) -> objectives.Objective:
    """Stage 2 without the joint loss, as Table 5 measures it."""
    return objectives.on_policy(
        backbone, negative, schema.DistillSection.model_validate({"joint": False, **changes}), SHIFT
    )


def iterations(backbone: Backbone, negative: torch.Tensor) -> dict[str, objectives.Objective]:
    """What is measured, by name; flow matching first."""

    def first(name: str, settings: schema.FlowMapSection) -> objectives.Objective:
        return objectives.stage_one(name, backbone, negative, settings, OPTIMISER, SHIFT)  # type: ignore[arg-type]

    return {
        "flow matching": first("flow-matching", STAGE_ONE),
        "stage 1, no quotient": first("flow-map", WITHOUT_QUOTIENT),
        "stage 1": first("flow-map", STAGE_ONE),
        "stage 2, flow map, N = 4": on_policy(backbone, negative, step_budgets=(4,)),
        "stage 2, flow map, N = 16": on_policy(backbone, negative, step_budgets=(16,)),
        "stage 2, consistency, 4": on_policy(
            backbone, negative, simulation="consistency", consistency_steps=4
        ),
        "stage 2, consistency, 16": on_policy(
            backbone, negative, simulation="consistency", consistency_steps=16
        ),
    }


def main() -> None:
    """Print the table."""
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--size", choices=SIZES, default="wan1b")
    made.add_argument("--batch", type=int, default=1)
    made.add_argument("--repeats", type=int, default=8)
    made.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    given = made.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, gpu = SIZES[given.size], device.type == "cuda"
    backbone, batch = _backbone(size, device), _batch(size, given.batch, device)
    backbone.student.gradient_checkpointing = given.checkpointing
    negative = torch.randn(size.text, device=device)
    peak = this_machine().peak
    print(f"{given.size}, batch {given.batch}, {device}, {given.repeats} steps, {torch.__version__}")
    print(f"blocks {'' if given.checkpointing else 'not '}recomputed in the backward pass\n")
    print(f"{'':28}{'seconds':>9}{'ratio':>8}{'of work':>8}{'TFLOP':>8}{'MFU':>7}{'GiB':>7}")
    base: tuple[float, float] | None = None
    for name, run in _runs(backbone, batch, negative, gpu):
        with FlopCounterMode(display=False) as counter:
            for step in range(1, given.repeats + 1):
                run(step)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = _mean_seconds(run, given.repeats, gpu)
        work = counter.get_total_flops() / given.repeats
        base = (seconds, work) if name == "flow matching" else base
        ratio = f"{seconds / base[0]:8.2f}{work / base[1]:8.2f}" if base else f"{'-':>8}{'-':>8}"
        use = f"{work / seconds / peak:7.0%}" if peak else f"{'-':>7}"
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:7.1f}" if gpu else f"{'-':>7}"
        print(f"{name:28}{seconds:9.3f}{ratio}{work / 1e12:8.3f}{use}{memory}", flush=True)


def _backbone(size: Size, device: torch.device) -> Backbone:
    torch.manual_seed(0)
    with device:
        plain = FlowMapTransformer(size.network).store_as(
            torch.bfloat16 if device.type == "cuda" else torch.float32
        )
    roles: tuple[Role, ...] = ("student", "real", "fake")
    return Backbone(two_time_from(plain), roles, lora=LoraSize(size.rank, size.rank)).to(device)


def _batch(size: Size, count: int, device: torch.device) -> Batch:
    latents, text = (
        torch.randn(count, *size.latent, device=device),
        torch.randn(count, *size.text, device=device),
    )
    return Batch(latents, text, [""] * count, [0] * count)


def _runs(
    backbone: Backbone, batch: Batch, negative: torch.Tensor, gpu: bool
) -> list[tuple[str, Callable[[int], None]]]:
    """Each thing to measure as a function of the step; a sampling step first."""
    count, kind = len(batch.latents), batch.latents.device

    def sample(step: int) -> None:
        t = torch.ones(count, device=kind)
        with torch.no_grad(), autocast("bf16" if gpu else "fp32", kind):
            backbone.velocity("student", batch.text)(batch.latents, t, t / 2)

    def iteration(objective: objectives.Objective) -> Callable[[int], None]:
        def run(step: int) -> None:
            rng = StepRng(0, step, count, tuple(range(count)))
            for phase in objective.phases:
                for term in phase.terms:
                    with autocast("bf16" if gpu else "fp32", kind):
                        loss, _ = term(batch, rng)
                    torch.autograd.backward(loss)
                for parameter in backbone.parameters_of(phase.role):
                    parameter.grad = None

        return run

    measured = iterations(backbone, negative).items()
    return [("sampling step", sample), *((name, iteration(objective)) for name, objective in measured)]


def _mean_seconds(run: Callable[[int], None], repeats: int, gpu: bool) -> float:
    def now() -> float:
        if not gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    run(1)
    start = now()
    for step in range(1, repeats + 1):
        run(step)
    return (now() - start) / repeats


if __name__ == "__main__":
    main()
