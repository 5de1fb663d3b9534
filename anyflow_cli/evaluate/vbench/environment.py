"""VBench's own Python environment: where it is, how it is made, what it holds.

It is made only by ``anyflow doctor --fix vbench``, in ``~/.cache/anyflow/vbench`` or where
``evaluate.vbench.environment`` or ``ANYFLOW_VBENCH`` says, by uv where there is one and by venv and pip
otherwise, from the pins in ``requirements.txt``. Any other environment with these packages may be named
instead. What pip and uv read from their own settings (an index, ``PIP_FIND_LINKS``) holds here too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.vbench.weights import NEEDS
from anyflow_cli.evaluate.vbench.worker_pool import ask

PINS = Path(__file__).with_name("requirements.txt")
PYTHONS = ((3, 8), (3, 11))  # the oldest and the newest that its pins have wheels for
LOOK_SECONDS = 600.0  # the first import after an installation compiles everything
COMMAND = "anyflow doctor --fix vbench"


@dataclass(frozen=True)
class Environment:
    """A place with VBench in it, and what was found there."""

    directory: Path
    python: Path
    versions: dict[str, str]
    modules: tuple[str, ...]
    devices: int  # GPUs that its torch can use
    full_info: Path  # VBench's own prompts


def place(setting: str | None) -> Path:
    """Where the environment is, or is to be."""
    named = setting or os.environ.get("ANYFLOW_VBENCH") or "~/.cache/anyflow/vbench"
    return Path(named).expanduser().absolute()


def is_there(directory: Path) -> bool:
    """Whether an environment was made here, whatever its state."""
    return interpreter(directory).is_file()


def interpreter(directory: Path) -> Path:
    """Its Python."""
    return directory / "bin" / "python"


def open_environment(directory: Path) -> Environment:
    """Look into an environment; what is broken in it is said as its own Python says it."""
    if not is_there(directory):
        raise UsageError(
            f"VBench needs an environment of its own, and there is none in {directory}.",
            f"Make it with `{COMMAND}`, or name one with --set evaluate.vbench.environment=DIR.",
        )
    modules = sorted({name for needs in NEEDS.values() for name, _ in needs.modules})
    request = {"job": "look", "modules": modules}
    try:
        found = ask(interpreter(directory), request, directory / "anyflow-look", LOOK_SECONDS)
    except AnyflowError as error:
        raise AnyflowError(
            f"The environment {directory} does not work: {error.message}.",
            f"`{COMMAND}` goes on where it stopped. The whole error is in {directory / 'anyflow-look'}.",
        ) from error
    return _environment(directory, found)


def make(directory: Path, python: str | None = None) -> Environment:
    """Make the environment, or go on where an earlier try stopped, and look at the result."""
    if directory.exists() and any(directory.iterdir()) and not (directory / "pyvenv.cfg").is_file():
        raise UsageError(
            f"{directory} holds something else than an environment.",
            "Choose another place with --set evaluate.vbench.environment=DIR.",
        )
    for command in _commands(directory, python):
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            message = f"`{' '.join(command)}` failed; its own words stand above."
            raise AnyflowError(message, bring_along(directory))
    return open_environment(directory)


def bring_along(directory: Path) -> str:
    """What a machine without a network needs, in words."""
    return (
        f"Without a network: on a machine with one and the same Python, `pip download -r {PINS} -d wheels`, "
        f"bring the folder wheels, then `PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels {COMMAND}` "
        f"makes {directory}."
    )


def find_python(named: str | None) -> str:
    """An interpreter that VBench's pins can live with."""
    tries = [named] if named else [sys.executable, *(f"python3.{minor}" for minor in (11, 10, 9, 8))]
    for name in tries:
        path = shutil.which(name)
        if path and PYTHONS[0] <= _version(path) <= PYTHONS[1]:
            return path
    raise UsageError(
        f"{named or 'No interpreter here'} is no Python 3.8 to 3.11, which VBench's packages need.",
        "Install python3.11, or uv (which fetches one), or name one with --python.",
    )


def _commands(directory: Path, python: str | None) -> list[list[str]]:
    inside = str(interpreter(directory))
    uv = shutil.which("uv")
    if uv:
        found = [] if is_there(directory) else [[uv, "venv", "--python", python or "3.11", str(directory)]]
        return [*found, [uv, "pip", "install", "--python", inside, "-r", str(PINS)]]
    found = [] if is_there(directory) else [[find_python(python), "-m", "venv", str(directory)]]
    return [*found, [inside, "-m", "pip", "install", "-r", str(PINS)]]


def _version(python: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    major, minor = (int(part) for part in done.stdout.split()) if done.returncode == 0 else (0, 0)
    return major, minor


def _environment(directory: Path, found: dict[str, Any]) -> Environment:
    return Environment(
        directory=directory,
        python=interpreter(directory),
        versions=found["versions"] | {"python": found["python"]},
        modules=tuple(found["modules"]),
        devices=found["devices"],
        full_info=Path(found["full_info"]),
    )
