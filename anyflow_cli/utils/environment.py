"""Environment variables that would change results or start-up without a word: refused by name, or removed.

The recipe decides about precision, sharding, accumulation and compilation. Accelerate and its relatives also
read such settings from the environment, where a configuration file or another program may have left them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from anyflow_cli.errors import UsageError

log = logging.getLogger(__name__)

MAX_PROCESSES = 1_000_000
# variable -> the recipe's key for what it would switch on
SWITCHES = {
    "ACCELERATE_USE_FSDP": "launch.sharding",
    "ACCELERATE_USE_DEEPSPEED": "launch.sharding",
    "ACCELERATE_USE_MEGATRON_LM": "launch.sharding",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "launch.sharding",
    "ACCELERATE_USE_SAGEMAKER": "launch.processes",
}
# variable -> values with which products of fp32 are fp32
ARITHMETIC = {
    "NVIDIA_TF32_OVERRIDE": ("0",),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("0",),
    "ONEDNN_DEFAULT_FPMATH_MODE": ("STRICT",),
    "DNNL_DEFAULT_FPMATH_MODE": ("STRICT",),
}
IGNORED = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
# ignored settings that someone may count on -> the recipe's key
DECIDED_BY_RECIPE = {
    "ACCELERATE_MIXED_PRECISION": "model.precision",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "micro_batch",
    "ACCELERATE_GRADIENT_CLIPPING": "optimizer.grad_clip",
    "ACCELERATE_DYNAMO_BACKEND": "model.compile",
}
NO_EFFECT = ("", "0", "1", "no", "none", "false", "default")  # as `accelerate launch` sets them by itself


def check_environment() -> None:
    """Refuse variables that cannot be used, and remove those that the recipe replaces.

    Raises:
        UsageError: Names the first variable, and what to do.
    """
    for sentence, hint in _problems():
        raise UsageError(sentence, hint)
    for name in [name for name in os.environ if name.startswith(IGNORED)]:
        value = os.environ.pop(name)
        if name in DECIDED_BY_RECIPE and value.lower() not in NO_EFFECT:
            log.warning("%s=%s is ignored: %s decides.", name, value, DECIDED_BY_RECIPE[name])


def _problems() -> Iterator[tuple[str, str]]:
    yield from _launch_problems()
    for name, key in SWITCHES.items():
        if (value := os.environ.get(name, "")).lower() not in ("", "0", "no", "false"):
            yield f"{name}={value} has no effect in anyflow.", f"Set {key} in the recipe, and unset {name}."
    for name, harmless in ARITHMETIC.items():
        if (value := os.environ.get(name, "")) and value.upper() not in harmless:
            yield (
                f"{name}={value} changes the precision of all products.",
                f"Set model.precision in the recipe, and unset {name}.",
            )


def _launch_problems() -> Iterator[tuple[str, str]]:
    """Problems of the variables by which a launcher tells a process its place among the others."""
    hint = "Unset it, or start the processes with --nproc, torchrun or accelerate launch."
    numbers = {}
    for name, least in (("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = os.environ.get(name)
        numbers[name] = least
        if text is None:
            continue
        if not (text.isascii() and text.isdecimal()) or not least <= int(text[:10]) < MAX_PROCESSES:
            yield f"The environment variable {name} is {text[:100]!r}, not a number from {least} on.", hint
            continue
        numbers[name] = int(text)
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= numbers["WORLD_SIZE"]:
            processes = f"WORLD_SIZE is {numbers['WORLD_SIZE']}"
            yield f"The environment variable {name} is {numbers[name]}, and {processes}.", hint
    if numbers["WORLD_SIZE"] > 1 and "RANK" not in os.environ:
        yield f"WORLD_SIZE is {numbers['WORLD_SIZE']}, and RANK is not set.", hint
