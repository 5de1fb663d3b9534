"""VBench's own Python environment: finding, inspecting and creating it.

Only ``anyflow doctor --fix vbench`` creates it, in ``~/.cache/anyflow/vbench`` or where
``evaluate.vbench.environment`` or ``ANYFLOW_VBENCH`` says, with uv if there is one, else with venv and pip,
from the pins in ``requirements.txt``. Any other environment with these packages can be named instead; nothing
is installed into it. Settings of pip and uv (an index, ``PIP_FIND_LINKS``) apply.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.vbench.dimensions import VBENCH_DIMENSIONS
from anyflow_cli.evaluate.vbench.weights import REQUIREMENTS, missing_requirements, weights_directory
from anyflow_cli.evaluate.vbench.worker_pool import run_worker
from anyflow_cli.recipe.schema import VBenchSection

PINS = Path(__file__).with_name("requirements.txt")
SUPPORTED_PYTHONS = ((3, 8), (3, 11))  # oldest and newest with wheels for the pins
INSPECT_SECONDS = 600.0  # the first import after an installation compiles everything
SETUP_COMMAND = "anyflow doctor --fix vbench"
DEFAULT_PLACE = "~/.cache/anyflow/vbench"
ENVIRONMENT_MARKER = ".anyflow-vbench"  # in an environment that anyflow created


@dataclass(frozen=True)
class Environment:
    """An environment with VBench.

    Attributes:
        directory: Where it is.
        python: Its interpreter.
        versions: Version by package.
        modules: Optional modules that can be imported.
        devices: Number of GPUs its torch can use.
        full_info: VBench's own prompts.
    """

    directory: Path
    python: Path
    versions: dict[str, str]
    modules: tuple[str, ...]
    devices: int
    full_info: Path


@dataclass(frozen=True)
class _Inspection:
    """Answer of the worker to the job ``look``."""

    versions: dict[str, str]
    python: str
    modules: tuple[str, ...]
    devices: int
    full_info: str


def environment_directory(setting: str | None) -> Path:
    """Where the environment is, or would be created."""
    return Path(setting or os.environ.get("ANYFLOW_VBENCH") or DEFAULT_PLACE).expanduser().absolute()


def is_created(directory: Path) -> bool:
    """Whether a directory has an interpreter, working or not."""
    return interpreter(directory).is_file()


def interpreter(directory: Path) -> Path:
    """Python of an environment."""
    return directory / "bin" / "python"


def open_environment(directory: Path) -> Environment:
    """Inspect an environment.

    Raises:
        UsageError: There is none.
        AnyflowError: It is broken; the message is that of its own Python.
    """
    if not is_created(directory):
        raise UsageError(
            f"VBench needs an environment of its own, and there is none in {directory}.",
            f"Create it with `{SETUP_COMMAND}`, or name one with --set evaluate.vbench.environment=DIR.",
        )
    modules = sorted({name for needs in REQUIREMENTS.values() for name, _ in needs.modules})
    request = {"job": "look", "modules": modules}
    scratch = directory / "anyflow-look"
    try:
        found = run_worker(interpreter(directory), request, _Inspection, scratch, INSPECT_SECONDS)
    except AnyflowError as error:
        raise AnyflowError(
            f"The environment {directory} does not work: {error.message}.",
            f"`{SETUP_COMMAND}` repairs it. The whole error is in {scratch}.",
        ) from error
    return Environment(
        directory=directory,
        python=interpreter(directory),
        versions=found.versions | {"python": found.python},
        modules=found.modules,
        devices=found.devices,
        full_info=Path(found.full_info),
    )


def create_environment(directory: Path, python: str | None = None) -> Environment:
    """Create the environment, or continue an earlier attempt, and inspect the result.

    Raises:
        UsageError: The directory holds something that anyflow did not create.
    """
    marker = directory / ENVIRONMENT_MARKER
    is_default = directory == Path(DEFAULT_PLACE).expanduser().absolute()  # 0.1 wrote no marker there
    is_own = marker.is_file() or (is_default and is_created(directory))
    if directory.exists() and not is_own and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(
            f"{directory} holds something that anyflow did not create.",
            "Choose another place with --set evaluate.vbench.environment=DIR.",
        )
    commands = _commands(directory, python)
    directory.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for command in commands:
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise AnyflowError(
                f"`{' '.join(command)}` failed; its output is above.", offline_setup(directory)
            )
    return open_environment(directory)


def offline_setup(directory: Path) -> str:
    """Instructions for a machine without a network."""
    return (
        f"Without a network: run `pip download -r {PINS} -d wheels` on a machine with the same Python, copy "
        f"the folder wheels, then run `PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels {SETUP_COMMAND}` to create "
        f"{directory}."
    )


def find_python(named: str | None) -> str:
    """Find an interpreter that VBench's pins support."""
    tries = [named] if named else [sys.executable, *(f"python3.{minor}" for minor in (11, 10, 9, 8))]
    for name in tries:
        path = shutil.which(name)
        if path and SUPPORTED_PYTHONS[0] <= _version(path) <= SUPPORTED_PYTHONS[1]:
            return path
    raise UsageError(
        f"{named or 'No interpreter here'} is not a Python 3.8 to 3.11, which VBench's packages need.",
        "Install python3.11, or uv (which downloads one), or name one with --python.",
    )


def environment_report(settings: VBenchSection) -> str:
    """Describe the environment, the dimensions that can run, and what the others lack."""
    directory = environment_directory(settings.environment)
    if not is_created(directory):
        return f"not set up; `evaluate --suite vbench` needs {directory}, which `{SETUP_COMMAND}` creates"
    environment, weights = open_environment(directory), weights_directory(settings.weights)
    names = dict.fromkeys(d.name for dimensions in VBENCH_DIMENSIONS.values() for d in dimensions)
    missing = {
        name: missing_requirements(REQUIREMENTS[name], weights, environment.modules, environment.devices > 0)
        for name in names
    }
    ready = [name for name in names if not missing[name]]
    waiting: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, things in missing.items():
        for thing in things.items():
            waiting[thing].append(name)
    versions = ", ".join(
        f"{name} {environment.versions.get(name, '?')}" for name in ("vbench", "torch", "python")
    )
    return "\n".join([
        f"{versions} in {directory}; weights in {weights}",
        f"{len(ready)} of {len(names)} dimensions can run: {', '.join(ready)}",
        *(f"missing {thing} ({how}) for {', '.join(by)}" for (thing, how), by in waiting.items()),
    ])  # fmt: skip


def _commands(directory: Path, python: str | None) -> list[list[str]]:
    inside, uv = str(interpreter(directory)), shutil.which("uv")
    install = [uv, "pip", "install", "--python", inside] if uv else [inside, "-m", "pip", "install"]
    install += ["-r", str(PINS)]
    if is_created(directory):
        return [install]
    if uv:  # the marker is there already
        return [[uv, "venv", "--allow-existing", "--python", python or "3.11", str(directory)], install]
    return [[find_python(python), "-m", "venv", str(directory)], install]


def _version(python: str) -> tuple[int, int]:
    code = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    words = done.stdout.split() if done.returncode == 0 else []
    return (int(words[0]), int(words[1])) if len(words) == 2 and all(map(str.isdecimal, words)) else (0, 0)
