"""The pages in docs/ and the guides name only modules, functions, recipe keys and files that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from anyflow_cli.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anyflow_cli"
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SECTIONS = "|".join(Recipe.model_fields)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


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


def is_recipe_key(name: str) -> bool:
    """Whether a dotted name is a section or a setting of a recipe."""
    kind: Any = Recipe
    for part in name.split("."):
        models = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not models or part not in models[0].model_fields:
            return False
        kind = models[0].model_fields[part].annotation
    return True


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_target_of_every_link_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_recipe_key_on_a_page_exists(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.])((?:{SECTIONS})(?:\.[a-z][a-z0-9_]*)+)(?![\w/(])", text_of(page))
    keys = {key for key in named if not key.endswith((".py", ".md", ".sh", ".json", ".jsonl", ".png", ".yaml"))}
    assert {key for key in keys if not is_recipe_key(key)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_110_columns_long(page: Path) -> None:
    fenced = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    kept = [line for line in fenced.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert [line for line in kept if len(line) > 110] == []
