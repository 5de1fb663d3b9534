"""The architecture page lists every module once and names only functions that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anyflow_cli"
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")


def modules() -> set[str]:
    """Paths of all modules that hold more than a docstring."""
    paths = (path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or has_code(path))
    return {path.relative_to(PACKAGE).as_posix() for path in paths}


def has_code(path: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text(encoding="utf-8")).body)


def tree() -> list[str]:
    """Paths of the files in the tree of the architecture page, in its order."""
    block = re.search(r"```text\nanyflow_cli/\n(.*?)```", ARCHITECTURE, flags=re.DOTALL)
    assert block is not None
    paths, folders = [], [""]
    for line in block[1].splitlines():
        entry = re.match(r"( +)(\S+) {2,}\S", line)
        assert entry is not None, f"a line of the tree without a description: {line!r}"
        depth, name = len(entry[1]) // 2, entry[2]
        del folders[depth:]
        if name.endswith("/"):
            folders.append(folders[-1] + name)
        else:
            paths.append(folders[-1] + name)
    return paths


def functions() -> list[str]:
    """Dotted names of the functions and classes along the paths of the architecture page."""
    rooms = "|".join(sorted({Path(name).parts[0].removesuffix(".py") for name in modules()}))
    return sorted(set(re.findall(rf"`((?:{rooms})(?:\.\w+)+)`", ARCHITECTURE)))


def test_the_tree_lists_every_module_once() -> None:
    listed = tree()
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == modules()


@pytest.mark.parametrize("name", functions())
def test_a_function_along_a_path_exists(name: str) -> None:
    module, *attributes = name.split(".")
    target: Any = importlib.import_module(f"anyflow_cli.{module}")
    for attribute in attributes:
        if not hasattr(target, attribute):
            target = importlib.import_module(f"{target.__name__}.{attribute}")
        else:
            target = getattr(target, attribute)
    assert callable(target)
