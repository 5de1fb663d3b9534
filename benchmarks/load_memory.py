"""Peak memory of loading a transformer from one large file of random weights.

    python benchmarks/load_memory.py --layout safetensors --dtype bf16

Writes a file in the sizes of Wan 2.1 1.3B (fp32: 5.7 GB, fp8: 1.5 GB), then loads it in a process of its own
and prints the largest resident set of that process before and while it loads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.network import on_meta
from anyflow_cli.model.pipeline_io import load_network

WAN_1B = NetworkConfig(heads=12, head_dim=128, layers=30, ffn_dim=8960)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIGABYTE = 1e9


def write(layout: str, folder: Path) -> Path:
    """Random weights of Wan 2.1 1.3B in a layout."""
    weights = {}
    for name, tensor in on_meta(WAN_1B).state_dict().items():
        original = TRANSFORMER_NAMES.to_original(name)
        weights[original] = 0.02 * torch.randn(tensor.shape)
        if layout == "fp8" and tensor.dim() == 2 and name.endswith(".weight"):
            scale = weights[original].abs().max() / 448
            weights[original] = (weights[original] / scale).to(torch.float8_e4m3fn)
            weights[original.replace(".weight", ".scale_weight")] = scale
    if layout == "pickle":
        path = folder / "model.pt"
        torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in weights.items()}}, path)
    else:
        path = folder / "model.safetensors"
        save_file(weights, path)
    return path


def peak() -> float:
    """Largest resident set of this process so far, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) * 1024 / GIGABYTE


def load(path: Path, dtype: str) -> None:
    """Load the file and print the peaks."""
    before, start = peak(), time.perf_counter()
    network = load_network(path, DTYPES[dtype])
    seconds = time.perf_counter() - start
    held = sum(parameter.nbytes for parameter in network.parameters()) / GIGABYTE
    largest = max(parameter.numel() * 4 for parameter in network.parameters()) / GIGABYTE
    print(
        f"before {before:.2f} GB, weights {held:.2f} GB, largest tensor in fp32 {largest:.2f} GB, "
        f"peak {peak():.2f} GB: {peak() - before - held:+.2f} GB above the weights, {seconds:.0f} s"
    )


def main() -> None:
    """Write the file here, load it in another process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=("safetensors", "pickle", "fp8"), default="safetensors")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(arguments.load, arguments.dtype)
    with TemporaryDirectory() as folder:
        path = write(arguments.layout, Path(folder))
        print(
            f"{arguments.layout}, {path.stat().st_size / GIGABYTE:.2f} GB, as {arguments.dtype}: ",
            end="",
            flush=True,
        )
        command = [sys.executable, __file__, "--load", str(path), "--dtype", arguments.dtype]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
