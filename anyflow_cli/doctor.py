"""What on this machine would stop a run: versions, devices, disk, memory, models.

Each check is one function from the recipe or a path to a ``Finding``. A check that fails is itself a finding.
Nothing is downloaded and nothing is left behind. The cost of a run is the subject of ``plan``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from anyflow_cli.errors import AnyflowError
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.utils.units import GIB

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "anyflow"
LEAST_DISK, LEAST_MEMORY = 1 * GIB, 2 * GIB  # what recipe `tiny` needs, with room to spare
FindingState = Literal["ok", "note", "stop"]


@dataclass(frozen=True)
class Finding:
    """Result of one check: ``stop`` prevents a run, ``note`` is worth knowing."""

    name: str
    state: FindingState
    text: str
    hint: str | None = None


def examine(recipe: Recipe, runs: Path) -> Iterator[Finding]:
    """Check everything a run of ``recipe`` under ``runs`` depends on, cheapest first."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", python),
        ("packages", packages),
        ("torch", torch_build),
        ("devices", devices),
        ("processors", processors),
        ("memory", memory),
        ("disk", lambda: disk(runs)),
        ("runs directory", lambda: writable(runs)),
        ("video files", check_ffmpeg),
        ("built-in models", built_in_models),
        ("precision", lambda: precision(recipe)),
        ("vbench", lambda: vbench(recipe)),
    ]
    for name, check in checks:
        yield _guarded(name, check)
    yield from models_and_data(recipe, runs)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """Run a check; one that fails is a finding, since environments break in ways that no list covers."""
    try:
        return check()
    except AnyflowError as error:
        return Finding(name, "stop", error.message, error.hint)
    except Exception as error:
        text = f"the check itself failed: {type(error).__name__}: {error}"
        return Finding(name, "stop", text, "reinstall anyflow in a fresh environment")


def python() -> Finding:
    """Check the interpreter: 3.10 to 3.13."""
    text = f"{platform.python_version()} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "ok", text)
    hint = "create an environment with one of these"
    return Finding("python", "stop", f"{text}; anyflow needs 3.10 to 3.13", hint)


def packages() -> Finding:
    """Compare installed versions with the ranges that this package requires."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding("packages", "note", "anyflow runs from a checkout, not installed", "pip install -e .")
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [problem for r in wanted if (problem := _mismatch(r.name, r.specifier.contains))]
    if wrong:
        return Finding("packages", "stop", "; ".join(wrong), "reinstall anyflow in a fresh environment")
    return Finding("packages", "ok", f"{len(wanted)} packages, all in range")


def _mismatch(name: str, accepts: Callable[[str, bool], bool]) -> str | None:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    return None if accepts(version, True) else f"{name} {version} is out of range"


def torch_build() -> Finding:
    """Name torch, what it is built for, and diffusers."""
    import diffusers
    import torch

    text = f"torch {torch.__version__} built for {_build(torch.version)}, diffusers {diffusers.__version__}"
    if not hasattr(diffusers, "AnyFlowPipeline"):
        return Finding("torch", "stop", f"{text} without AnyFlowPipeline", "pip install 'diffusers>=0.41'")
    if _build(torch.version) == "CPU" and shutil.which("nvidia-smi"):
        hint = "install a CUDA build: https://pytorch.org/get-started/locally"
        return Finding("torch", "note", f"{text}, but this machine has an NVIDIA driver", hint)
    return Finding("torch", "ok", text)


def _build(version: ModuleType) -> str:
    if version.cuda:
        return f"CUDA {version.cuda}"
    return f"ROCm {version.hip}" if version.hip else "CPU"


def devices() -> Finding:
    """List the accelerators that torch sees, with their free memory."""
    import torch

    if torch.cuda.is_available():
        return Finding("devices", "ok", ", ".join(map(_gpu, range(torch.cuda.device_count()))))
    if torch.version.cuda or torch.version.hip:
        text = "torch is built for GPUs but sees none; runs use the CPU"
        return Finding("devices", "note", text, "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return Finding("devices", "ok", "CPU only: enough for the tiny recipes")


def _gpu(index: int) -> str:
    import torch

    free = torch.cuda.mem_get_info(index)[0] / GIB
    return f"{torch.cuda.get_device_name(index)} ({free:.0f} GiB free)"


def processors() -> Finding:
    """Compare the cores this process may use with the number of threads."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    text = f"{cores} usable cores, {threads} threads"
    if threads > cores:
        text += "; more threads than cores is slow"
        return Finding("processors", "note", text, f"export OMP_NUM_THREADS={cores}")
    return Finding("processors", "ok", text)


def usable_cores() -> int:
    """Number of cores by affinity and by the container's quota, whichever is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() else cores


def memory() -> Finding:
    """Check the free main memory, within the container's limit."""
    free = free_memory()
    text = f"{free / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        hint = "close other programs, or raise the container's limit"
        return Finding("memory", "stop", f"{text}; anyflow needs {LEAST_MEMORY / GIB:.0f} GiB", hint)
    return Finding("memory", "ok", text)


def free_memory() -> int:
    """Bytes this process may still allocate, by the system and by its container, whichever is smaller."""
    known = re.search(r"MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"))
    free = int(known[1]) * 1024 if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def disk(runs: Path) -> Finding:
    """Check the free space where runs are written."""
    free = shutil.disk_usage(_existing(runs)).free
    text = f"{free / GIB:.1f} GiB free for {runs}"
    if free < LEAST_DISK:
        text += f"; anyflow needs {LEAST_DISK / GIB:.0f} GiB"
        return Finding("disk", "stop", text, "free some space, or choose another place with --runs")
    return Finding("disk", "ok", text)


def writable(runs: Path) -> Finding:
    """Check that a file can be created where runs are written; it is removed at once."""
    place = _existing(runs)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"anyflow doctor")
    except OSError as error:
        text = f"{place} cannot be written: {error.strerror}"
        return Finding("runs directory", "stop", text, "choose another place with --runs")
    return Finding("runs directory", "ok", f"{runs} can be written")


def check_ffmpeg() -> Finding:
    """Encode one frame with ffmpeg, which writes and reads every video."""
    from anyflow_cli.data.video import ffmpeg, require_ffmpeg

    require_ffmpeg()
    version = ffmpeg(["-version"]).stdout.decode(errors="replace")
    return Finding("video files", "ok", " ".join(version.split()[:3]))


def built_in_models() -> Finding:
    """Check the headers of the package's own models: a clone without LFS has pointers instead of weights."""
    from anyflow_cli.model.folder_check import check_folder
    from anyflow_cli.model.pipeline_io import BUILT_IN, resolve_pipeline

    problems = [problem for name in BUILT_IN for problem in check_folder(resolve_pipeline(name))]
    if problems:
        return Finding("built-in models", "stop", problems[0], "reinstall anyflow")
    return Finding("built-in models", "ok", ", ".join(BUILT_IN))


def models_and_data(recipe: Recipe, runs: Path) -> Iterator[Finding]:
    """Check what the commands of the recipe start from, each path or address once."""
    from anyflow_cli.runs.paths import RunPaths
    from anyflow_cli.runs.resources import Resource, inputs

    states: dict[str, FindingState] = {"ready": "ok", "optional": "ok", "unusable": "stop"}
    found: dict[str, Resource] = {}
    for command in ("synthesize", "train-flowmap", "distill", "sample"):
        for resource in inputs(recipe, RunPaths(runs, recipe.name), command):
            found.setdefault(resource.place, resource)
    for place, resource in found.items():
        state = states.get(resource.state, "stop" if resource.problem else "note")
        text = resource.problem or f"{place}: {resource.state}"
        yield Finding(resource.name, state, text, resource.how_to_get_it or None)


def precision(recipe: Recipe) -> Finding:
    """Resolve ``model.precision`` for this machine; on a CPU, measure whether it is the faster one."""
    import torch

    from anyflow_cli.model.precision import resolve_precision

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, setting = resolve_precision(recipe.model.precision, device), recipe.model.precision
    text = f"{chosen} on {device}" + (" (auto)" if setting == "auto" else "")
    if device != "cpu":
        return Finding("precision", "ok", text)
    gain = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
    text += f"; bf16 multiplies {gain:.1f} times as fast as fp32"
    if chosen == "bf16" and gain < 1:
        return Finding("precision", "note", text, "--set model.precision=fp32 is faster here")
    return Finding("precision", "ok", text)


def vbench(recipe: Recipe) -> Finding:
    """Report VBench's environment and weights, which only its own suites need."""
    from anyflow_cli.evaluate.vbench.environment import environment_report

    return Finding("vbench", "ok", environment_report(recipe.evaluate.vbench))


def _matmul_seconds(dtype: torch.dtype, size: int = 512, tries: int = 5) -> float:
    """Shortest time of a few products of two square matrices; the first ones warm up."""
    import torch

    a, best = torch.ones(size, size, dtype=dtype), float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best


def _existing(path: Path) -> Path:
    """The nearest existing directory above ``path``."""
    path = path.absolute()
    return path if path.is_dir() else _existing(path.parent)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
