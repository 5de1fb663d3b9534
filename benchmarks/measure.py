"""Shared parts of the benchmarks: sizes, interleaved timing of two calls, peak memory, and the table.

Runs are interleaved, so that a machine that slows down slows both; the table gives medians and the ratio of
ours to theirs (below 1: ours is faster, or smaller). Memory is the peak above what was held before the call:
on CUDA the allocator's own, on a CPU the sum of the profiler's allocations and frees.
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

PRESETS = {  # heads, head_dim, layers, ffn_dim, text_dim, channels
    "tiny": (6, 32, 6, 768, 64, 16),
    "wan1b": (12, 128, 30, 8960, 4096, 16),
    "wan14b": (40, 128, 40, 13824, 4096, 16),
}
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """Row of the table; ``theirs`` is None where they cannot run."""

    name: str
    ours: Call
    theirs: Call | None
    backward: bool = False


def parser(description: str, *, batch: int, repeats: int) -> argparse.ArgumentParser:
    """Options of all benchmarks."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--preset", choices=PRESETS, default="tiny")
    made.add_argument("--layers", type=int, help="default: the preset's")
    made.add_argument("--batch", type=int, default=batch)
    made.add_argument("--height", type=int, default=8, help="latent height")
    made.add_argument("--width", type=int, default=8, help="latent width")
    made.add_argument("--text", type=int, default=32, help="text tokens")
    made.add_argument("--precision", choices=("fp32", "autocast", "bf16"), default="fp32")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    return made


def sizes(args: argparse.Namespace) -> dict[str, int]:
    """Arguments of a diffusers class for the preset."""
    heads, head_dim, layers, ffn_dim, text_dim, channels = PRESETS[args.preset]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_layers": args.layers or layers,
        "ffn_dim": ffn_dim,
        "text_dim": text_dim,
        "in_channels": channels,
        "out_channels": channels,
    }


def print_head(args: argparse.Namespace, shape: str) -> None:
    """Print what is measured, above the table."""
    depth = args.layers or PRESETS[args.preset][2]
    print(f"{args.preset}: {depth} layers, B={args.batch} {shape} {args.height}x{args.width},")
    print(f"{args.text} text tokens, {args.precision}, {args.device}, {args.threads} thread(s),")
    print(f"median of {args.repeats}\n")
    print(f"{'':34}{'ours ms':>10}{'theirs ms':>11}{'time':>8}{'ours MB':>10}{'theirs MB':>11}{'memory':>8}")


def report(row: Row, args: argparse.Namespace) -> None:
    """Measure and print one row."""
    calls = [_call(each, row.backward, args) for each in (row.ours, row.theirs) if each is not None]
    seconds = _interleaved(calls, args)
    peaks = [_peak_bytes(call, args.device) / 1e6 for call in calls]
    print(f"{row.name:34}{_pair([1e3 * s for s in seconds])}{_pair(peaks)}", flush=True)


def _pair(values: list[float]) -> str:
    """Ours, theirs and their ratio; a dash where theirs cannot run."""
    if len(values) == 1:
        return f"{values[0]:10.1f}{'-':>11}{'-':>8}"
    ours, theirs = values
    return f"{ours:10.1f}{theirs:11.1f}{ours / theirs:8.2f}"


def _call(forward: Call, backward: bool, args: argparse.Namespace) -> Callable[[], None]:
    def inference() -> None:
        with torch.no_grad(), autocast(args):
            forward()

    def training() -> None:
        with autocast(args):
            loss = forward().float().square().mean()
        torch.autograd.backward(loss)

    return training if backward else inference


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Autocast where the precision is autocast."""
    if args.precision != "autocast":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def _interleaved(calls: list[Callable[[], None]], args: argparse.Namespace) -> list[float]:
    """Median seconds of each call, after a warm-up run."""
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
    """Peak memory of the call above that before it, in bytes."""
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
