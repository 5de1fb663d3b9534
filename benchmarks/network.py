"""Time and peak memory of our network against diffusers' ``AnyFlowTransformer3DModel``, in one process.

    python benchmarks/network.py                       the tiny model's sizes, one thread
    python benchmarks/network.py --preset wan1b --layers 2 --frames 5 --device cuda

Both hold the same weights. Runs are interleaved, so that a machine that slows down slows both; the table
gives medians and the ratio of ours to theirs (below 1: ours is faster, or smaller). Memory is the peak above
what was held before the call: on CUDA the allocator's own, on a CPU the sum of the profiler's allocations and
frees.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer

PRESETS = {  # heads, head_dim, layers, ffn_dim, text_dim, channels
    "tiny": (6, 32, 6, 768, 64, 16),
    "wan1b": (12, 128, 30, 8960, 4096, 16),
    "wan14b": (40, 128, 40, 13824, 5120, 16),
}
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ours: Call
    theirs: Call
    backward: bool


def main() -> None:
    """Print the table."""
    args = _arguments()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    ours, theirs = _networks(args)
    print(f"{args.preset}: {args.layers} layers, B={args.batch} F={args.frames} {args.height}x{args.width},")
    print(f"{args.text} text tokens, {args.precision}, {args.device}, {args.threads} thread(s),")
    print(f"median of {args.repeats}\n")
    print(f"{'':34}{'ours ms':>10}{'theirs ms':>11}{'time':>8}{'ours MB':>10}{'theirs MB':>11}{'memory':>8}")
    for row in _rows(args, ours, theirs):
        _report(row, args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="default: the preset's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=9, help="latent frames")
    parser.add_argument("--height", type=int, default=8, help="latent height")
    parser.add_argument("--width", type=int, default=8, help="latent width")
    parser.add_argument("--text", type=int, default=32, help="text tokens")
    parser.add_argument("--precision", choices=("fp32", "autocast", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    args = parser.parse_args()
    args.layers = args.layers or PRESETS[args.preset][2]
    return args


def _networks(args: argparse.Namespace) -> tuple[FlowMapTransformer, Any]:
    from diffusers import AnyFlowTransformer3DModel

    heads, head_dim, _, ffn_dim, text_dim, channels = PRESETS[args.preset]
    with torch.device(args.device):
        theirs = AnyFlowTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            num_layers=args.layers,
            ffn_dim=ffn_dim,
            text_dim=text_dim,
            in_channels=channels,
            out_channels=channels,
        )
        config = NetworkConfig.from_diffusers(dict(theirs.config) | {"_class_name": type(theirs).__name__})
        ours = FlowMapTransformer(config)
    ours.load_state_dict(theirs.state_dict())
    if args.precision == "bf16":
        ours.store_as(torch.bfloat16)
        theirs.to(torch.bfloat16)
    if args.checkpointing:
        ours.gradient_checkpointing = True
        theirs.enable_gradient_checkpointing()
    return ours, theirs


def _rows(args: argparse.Namespace, ours: FlowMapTransformer, theirs: Any) -> list[Row]:
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    like = {"device": args.device, "dtype": kind}
    z = torch.randn(args.batch, args.frames, ours.config.in_channels, args.height, args.width, **like)
    text = torch.randn(args.batch, args.text, ours.config.text_dim, **like)
    t = torch.rand(args.batch, device=args.device)
    r = t / 2
    t_frames, r_frames = (x.unsqueeze(1).repeat(1, args.frames) for x in (t, r))
    with torch.no_grad(), _autocast(args):
        keys = ours.text_keys(text)

    def reference() -> Tensor:
        u: Tensor = theirs(z, 1000 * t_frames, 1000 * r_frames, text, return_dict=False)[0]
        return u

    return [
        Row("forward", lambda: ours(z, t, r, text), reference, False),
        Row("forward, times per frame", lambda: ours(z, t_frames, r_frames, text), reference, False),
        Row("forward, text keys kept", lambda: ours(z, t, r, keys), reference, False),
        Row("forward + backward", lambda: ours(z, t, r, text), reference, True),
        Row("forward + backward, per frame", lambda: ours(z, t_frames, r_frames, text), reference, True),
    ]


def _report(row: Row, args: argparse.Namespace) -> None:
    calls = [_call(each, row.backward, args) for each in (row.ours, row.theirs)]
    ours, theirs = _interleaved(calls, args)
    mine, reference = (_peak_bytes(call, args.device) / 1e6 for call in calls)
    times = f"{ours * 1e3:10.1f}{theirs * 1e3:11.1f}{ours / theirs:8.2f}"
    print(f"{row.name:34}{times}{mine:10.1f}{reference:11.1f}{mine / reference:8.2f}", flush=True)


def _call(forward: Call, backward: bool, args: argparse.Namespace) -> Callable[[], None]:
    def inference() -> None:
        with torch.no_grad(), _autocast(args):
            forward()

    def training() -> None:
        with _autocast(args):
            loss = forward().float().square().mean()
        torch.autograd.backward(loss)

    return training if backward else inference


def _autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    if args.precision != "autocast":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def _interleaved(calls: list[Callable[[], None]], args: argparse.Namespace) -> list[float]:
    """Median seconds of each call, after one run to warm up."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(args.repeats + 1):
        for call, kept in zip(calls, seconds, strict=True):
            _wait(args.device)
            start = time.perf_counter()
            call()
            _wait(args.device)
            if repeat:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _peak_bytes(call: Callable[[], None], device: str) -> int:
    """Highest memory held during the call, above what was held before it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    return _peak_of_profile(call)


def _peak_of_profile(call: Callable[[], None]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
