"""The one attention function, the kernels that compute it, and the choice between them.

``model.attention`` names a row of ``BACKENDS``; ``auto`` measures. A kernel sees dense queries, keys and
values without a mask: a layout's groups are separate calls, padding is removed before, and cached keys are
plain tensors, so every kernel serves every layout and cache. diffusers' dispatcher has the same kernels and
more, but FlashAttention 3 has no gradient there, so packages are called here directly.

Legend: B batch, L tokens, E heads, d channels per head.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_cli.errors import UsageError

# With fewer queries torch's fp32 attention is faster than bf16 on a CPU (backward: 2 to 6 times).
CPU_SHORT = 1024
# Largest distance of a kernel's result to fp32, relative to its root mean square. bf16 kernels are at 0.004,
# int8 ones at 0.02 to 0.03; a wrong scale or order of axes is at 1.
MAX_DISTANCE = 0.05
COMPARED_QUERIES = 512  # rows of attention are independent, so some of them suffice for the distance
TIMED_CALLS = 3
HALF = (torch.float16, torch.bfloat16)

FAILURES = (RuntimeError, ImportError, OSError, AttributeError, TypeError, ValueError, AssertionError)

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key, value (B, L, E, d) to the output

log = logging.getLogger(__name__)


class AttentionBackend(NamedTuple):
    """A kernel and where it can run.

    Attributes:
        function: Computes attention of tensors of a type that it takes.
        package: Python package that it needs besides torch.
        install: How to get that package.
        on_cpu: Whether it runs on a CPU.
        dtypes: Types that it takes; None for all.
        trains: Whether it has a gradient.
        is_exact: Whether it computes in its inputs' type; ``auto`` never chooses a quantized one.
    """

    function: Kernel
    package: str | None = None
    install: str = ""
    on_cpu: bool = False
    dtypes: tuple[torch.dtype, ...] | None = None
    trains: bool = True
    is_exact: bool = True

    @property
    def kernel(self) -> Kernel:
        """Attention of tensors of one type.

        Calls in a type that it does not take, such as those of a target in fp32, go to torch's choice.
        """
        function, dtypes = self.function, self.dtypes
        if dtypes is None:
            return function

        def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return (function if query.dtype in dtypes else SDPA)(query, key, value)

        return kernel


class AttentionShape(NamedTuple):
    """Sizes of the largest attention of a network call."""

    queries: int
    keys: int
    heads: int
    head_dim: int


def attend(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
    """Dense attention without a mask; all (B, L, E, d), the output in the type of ``value``."""
    dtype = kernel_dtype(query, value)
    with torch.autocast(query.device.type, enabled=False):  # it would override the kernel type
        return kernel(query.to(dtype), key.to(dtype), value.to(dtype)).to(value.dtype)


def kernel_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Type that queries (B, L, E, d) are multiplied in: that of the values, or fp32 for few on a CPU."""
    return torch.float32 if query.device.type == "cpu" and query.shape[1] < CPU_SHORT else value.dtype


def _torch_kernel(kind: SDPBackend | None) -> Kernel:
    """One of torch's own kernels; None leaves the choice to torch."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with nullcontext() if kind is None else sdpa_kernel(kind):
            out = nnf.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            )
        return out.transpose(1, 2)

    return kernel


def _package_kernel(package: str, function: str, **options: Any) -> Kernel:
    """A function of another package, which is imported at the first call."""

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Any = getattr(import_module(package), function)(query, key, value, **options)
        result: Tensor = out[0] if isinstance(out, tuple) else out  # some versions add the log-sum-exp
        return result

    return kernel


SDPA = _torch_kernel(None)
BACKENDS = {
    "sdpa": AttentionBackend(SDPA, on_cpu=True),
    "flash": AttentionBackend(_torch_kernel(SDPBackend.FLASH_ATTENTION), dtypes=HALF),
    "efficient": AttentionBackend(_torch_kernel(SDPBackend.EFFICIENT_ATTENTION)),
    "cudnn": AttentionBackend(_torch_kernel(SDPBackend.CUDNN_ATTENTION), dtypes=HALF),
    "flash3": AttentionBackend(
        _package_kernel("flash_attn_interface", "flash_attn_func"),
        package="flash_attn_interface",
        install="build FlashAttention 3 from the folder hopper of github.com/Dao-AILab/flash-attention",
        dtypes=HALF,
    ),
    "sage": AttentionBackend(
        _package_kernel("sageattention", "sageattn", tensor_layout="NHD"),
        package="sageattention",
        install="pip install sageattention",
        dtypes=HALF,
        trains=False,
        is_exact=False,
    ),
}  # fmt: skip
OTHER = "set model.attention to auto"


def backend_problem(
    name: str, kind: str, *, dtype: torch.dtype | None = None, trains: bool = False
) -> tuple[str, str] | None:
    """Why a backend cannot be used, and what to do about it; None where it can.

    Args:
        name: Name in ``BACKENDS``.
        kind: Type of the device, such as ``cuda``.
        dtype: Type of its inputs, where it is known.
        trains: Whether it needs a gradient.
    """
    backend = BACKENDS[name]
    if kind == "cpu" and not backend.on_cpu:
        return f"The attention {name} needs a GPU.", OTHER
    if backend.package is not None and find_spec(backend.package) is None:
        message = f"The attention {name} needs the Python package {backend.package}, which is not installed."
        return message, f"{backend.install}, or {OTHER}"
    if backend.dtypes is not None and dtype not in (None, *backend.dtypes):
        return f"The attention {name} takes bf16 only, and this model runs in fp32.", OTHER
    if trains and not backend.trains:
        return f"The attention {name} has no gradient, which training needs.", OTHER
    return None


def choose_kernel(
    setting: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, *, trains: bool = False
) -> Kernel:
    """The kernel of ``model.attention`` for calls of this shape.

    ``auto`` times every exact kernel that runs here, with its backward pass where it trains, and takes the
    fastest. A kernel other than ``sdpa`` is compared with fp32 on random tensors first.

    Raises:
        UsageError: The named backend is missing, fails, or is further from fp32 than ``MAX_DISTANCE``.
    """
    if setting == "sdpa" or (setting == "auto" and device.type == "cpu"):
        return SDPA
    inputs = _random_inputs(shape, device, dtype)
    if setting == "auto":
        return BACKENDS[_fastest(inputs, trains=trains)].kernel
    problem = backend_problem(setting, device.type, dtype=dtype, trains=trains)
    if problem is not None:
        raise UsageError(problem[0], f"{problem[1][0].upper()}{problem[1][1:]}.", everywhere=True)
    kernel = BACKENDS[setting].kernel
    try:
        distance = distance_to_fp32(kernel, inputs)
    except FAILURES as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"The attention {setting} fails at {shape.queries} tokens of this model: {reason}"
        raise UsageError(message, "Set model.attention to auto.", everywhere=True) from error
    log.info("Attention: %s, at a distance of %.2g to fp32.", setting, distance)
    if not distance <= MAX_DISTANCE:
        raise UsageError(
            f"The result of the attention {setting} is off by {distance:.2g} of its size at "
            f"{shape.queries} tokens of this model; {MAX_DISTANCE:g} is allowed.",
            "Set model.attention to auto.",
            everywhere=True,
        )
    return kernel


def distance_to_fp32(kernel: Kernel, inputs: Sequence[Tensor]) -> float:
    """Root mean square of a kernel's error on (query, key, value), relative to that of the fp32 result."""
    query, key, value = inputs
    rows = query[:, :COMPARED_QUERIES]
    with torch.no_grad():
        exact = SDPA(rows.float(), key.float(), value.float())
        error = kernel(query, key, value)[:, :COMPARED_QUERIES].float() - exact
        return float(torch.linalg.vector_norm(error) / torch.linalg.vector_norm(exact))


def _random_inputs(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Normal query, key and value (1, L, E, d)."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, tokens, shape.heads, shape.head_dim, generator=generator, device=device).to(dtype)
        for tokens in (shape.queries, shape.keys, shape.keys)
    ]


def _fastest(inputs: Sequence[Tensor], *, trains: bool) -> str:
    """The fastest exact backend that gives the fp32 result on these inputs."""
    device, dtype, seconds = inputs[0].device, inputs[0].dtype, dict[str, float]()
    for name, backend in BACKENDS.items():
        if not backend.is_exact or backend_problem(name, device.type, dtype=dtype, trains=trains):
            continue
        try:
            if distance_to_fp32(backend.kernel, inputs) <= MAX_DISTANCE:
                seconds[name] = _seconds(backend.kernel, inputs, trains=trains)
        except FAILURES:
            log.debug("The attention %s does not run here.", name, exc_info=True)
    chosen = min(seconds, key=seconds.__getitem__, default="sdpa")
    listed = ", ".join(f"{name} {1000 * spent:.2f} ms" for name, spent in seconds.items())
    log.info("Attention: %s (measured at %d tokens: %s).", chosen, inputs[0].shape[1], listed)
    return chosen


def _seconds(kernel: Kernel, inputs: Sequence[Tensor], *, trains: bool) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    leaves, times = [x.detach().requires_grad_(trains) for x in inputs], list[float]()
    for _ in range(1 + TIMED_CALLS):
        _wait_for(leaves[0].device)
        start = time.perf_counter()
        with torch.set_grad_enabled(trains):
            out = kernel(*leaves)
        if trains:
            out.backward(out.detach())  # type: ignore[no-untyped-call]
        _wait_for(leaves[0].device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
