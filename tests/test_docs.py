"""The pages in docs/ and the guides link to files and name recipe keys and variables that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from anyflow_cli.recipe.renamed import RENAMED
from anyflow_cli.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "anyflow_cli"
GUIDES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = [*sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in GUIDES)]
NOT_KEYS = ("architecture", "CHANGELOG")  # names of functions; former keys
FOR_CHILDREN = {"TORCH_HOME", "TORCHELASTIC_SIGNALS_TO_HANDLE"}  # set for processes that are started
SECTIONS = "|".join(Recipe.model_fields)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def is_recipe_key(name: str) -> bool:
    """Whether a dotted name is a section or a setting of a recipe."""
    kind: Any = Recipe
    for part in name.split("."):
        models = [
            one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)
        ]
        if not models or part not in models[0].model_fields:
            return False
        kind = models[0].model_fields[part].annotation
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_target_of_every_link_exists(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(page))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in NOT_KEYS], ids=lambda page: page.name
)
def test_every_recipe_key_on_a_page_exists(page: Path) -> None:
    named = re.findall(rf"(?<![\w/.])((?:{SECTIONS})(?:\.[a-z][a-z0-9_]*)+)(?!\.?[\w/(])", text_of(page))
    keys = {
        key for key in named if not key.endswith((".py", ".md", ".sh", ".json", ".jsonl", ".png", ".yaml"))
    }
    assert {key for key in keys if not is_recipe_key(key)} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_110_columns_long(page: Path) -> None:
    fenced = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    kept = [line for line in fenced.splitlines() if not line.startswith(("|", "    ", "!["))]
    assert [line for line in kept if len(line) > 110] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_source_file_on_a_page_exists(page: Path) -> None:
    named = set(re.findall(r"`([a-z_0-9]+/[\w./]+\.(?:py|sh|yaml))`", text_of(page)))
    assert {name for name in named if not any((top / name).is_file() for top in (ROOT, PACKAGE))} == set()


def test_the_changelog_names_every_renamed_key() -> None:
    changelog = text_of(ROOT / "CHANGELOG.md")
    for old, new in (pair for keys in RENAMED.values() for pair in keys.items()):
        assert re.search(rf"^\|.*\b{old}\b.*\|.*\b{new}\b.*\|$", changelog, flags=re.MULTILINE), (old, new)


def test_the_messages_that_the_page_explains_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    page = text_of(ROOT / "docs/troubleshooting.md")
    quoted = re.findall(r'^\| "(.*?)" \|', page, flags=re.MULTILINE)
    parts = {part.strip() for message in quoted for part in message.split("...") if part.strip()}
    assert {part for part in parts if part not in source} == set()


def test_every_environment_variable_that_is_read_is_documented() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\.setdefault\(|\[)"([A-Z_]+)""", source)) - FOR_CHILDREN
    page = text_of(ROOT / "docs/troubleshooting.md")
    assert {name for name in read if f"`{name}`" not in page} == set()
