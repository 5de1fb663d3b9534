"""Resident memory and seconds of opening and sampling a random model of 1.3 billion weights on a CPU.

    python benchmarks/opening.py write DIR --dtype bf16     a pipeline folder: tiny's VAE and text encoder
    python benchmarks/opening.py measure DIR --precision bf16

``measure`` prints the resident set after opening and its high-water mark, in GB above what the imports take,
beside the size of the weights as they are used and of the largest tensor; then the seconds of an evaluation
of 48 tokens. Seconds are the processor's, which other work lengthens less. With PYTHONPATH on another
checkout it measures that one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import read_config, resolve_pipeline, save_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.sample.sampler import VideoSampler

WAN_1B = NetworkConfig(heads=12, head_dim=128, layers=30, ffn_dim=8960)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VIDEO = ["model.frames=9", "model.height=64", "model.width=64"]  # 48 tokens with tiny's VAE
GIGABYTE = 1e9


def write(folder: Path, dtype: str) -> None:
    """Write a random one-time network in the sizes of Wan 2.1 1.3B, for tiny's latents and text."""
    tiny = resolve_pipeline("tiny")
    own = read_config(tiny)
    config = replace(
        WAN_1B, in_channels=own.in_channels, out_channels=own.out_channels, text_dim=own.text_dim
    )
    torch.manual_seed(0)
    network = FlowMapTransformer(config).to(DTYPES[dtype])
    save_pipeline(folder, network, tiny, {})


def resident(field: str) -> float:
    """The resident set of this process (VmRSS) or its high-water mark (VmHWM), in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if field in line)
    return int(line.split()[1]) * 1024 / GIGABYTE


def measure(folder: Path, precision: str) -> None:
    """Open the model and sample it twice."""
    recipe = load_recipe("tiny", [*VIDEO, f"model.precision={precision}"])
    VideoSampler.load("tiny", recipe, device="cpu")  # libraries and tables
    before, start = resident("VmRSS"), time.process_time()
    sampler = VideoSampler.load(str(folder), recipe, device="cpu")
    opened, stays, peak = time.process_time() - start, resident("VmRSS") - before, resident("VmHWM") - before
    weights = list(sampler._network.parameters())
    held, largest = sum(w.nbytes for w in weights), max(w.nbytes for w in weights)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        next(sampler.latents(["a small red circle moving left"], [0], 2))
        seconds.append(time.process_time() - start)
    evaluations = 4  # two steps, each guided
    print(
        f"products in {precision}: weights {held / GIGABYTE:.2f} GB, largest {largest / GIGABYTE:.3f} GB; "
        f"opened in {opened:.1f} s, stays {stays:.2f} GB, peak {peak:.2f} GB (+{peak - stays:.2f}); "
        f"sampled at a peak of {resident('VmHWM') - before:.2f} GB, "
        f"{seconds[-1] / evaluations:.2f} s per evaluation"
    )


def main() -> None:
    """Write or measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("write", "measure"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    options = parser.parse_args()
    if options.action == "write":
        write(options.folder, options.dtype)
    else:
        measure(options.folder, options.precision)


if __name__ == "__main__":
    main()
