"""From a recipe's name or path to a checked ``Recipe``: finding, inheritance, overrides.

All mistakes are reported at once, each with its place (``errors.py`` words them). What a recipe may contain
is in ``schema.py``; comparing and writing recipes in ``compare.py``.

A recipe's ``name`` and ``description`` are its own and never inherited: two recipes must not share a run
directory because one extends the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.errors import Mistake, closest, in_yaml, recipe_error, validation_error
from anyflow_cli.recipe.renamed import with_new_keys
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.recipe.yaml_source import (
    RECIPE_HINT,
    Key,
    YamlLocation,
    YamlSource,
    parse_value,
    read_source,
)
from anyflow_cli.utils.user_text import escaped, path_problem, shortened

DEFAULT = "tiny"
MOST_PARENTS = 20
DEEPEST_KEY = 8
_OWN = ("name", "description", "extends")


@dataclass(frozen=True)
class Override:
    """One value from the command line; ``option`` names it in messages."""

    key: str
    value: Any
    option: str


def load_recipe(address: str = DEFAULT, overrides: Iterable[str | Override] = ()) -> Recipe:
    """Read, resolve and check a recipe.

    In the record of a run, a ``recipe.yaml`` beside a ``lineage.json``, renamed keys are translated.

    Args:
        address: The name of a shipped recipe, or the path of a YAML file.
        overrides: ``KEY=VALUE`` texts, as ``--set`` takes them, or ``Override``s; later ones win.

    Raises:
        UsageError: Names every mistake with its file, line and key.
    """
    path, shown = find_recipe(address)
    source = _resolved(path, shown, ())
    is_record = (path.parent / "lineage.json").is_file()
    content = with_new_keys(source.content) if is_record else dict(source.content)
    places = dict(source.places)
    content.setdefault("name", path.stem)
    mistakes = [mistake for item in overrides if (mistake := _override(content, places, item))]
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise validation_error(error, places, YamlLocation(shown), mistakes) from error
    if mistakes:
        raise recipe_error(mistakes)
    return recipe


def load_recorded_recipe(path: Path) -> Recipe:
    """Read the resolved recipe of an existing run; keys renamed since it was written are translated.

    Raises:
        UsageError: As ``load_recipe``.
    """
    source = read_source(path, str(path))
    try:
        return Recipe.model_validate(with_new_keys(source.content))
    except ValidationError as error:
        raise validation_error(error, source.places, YamlLocation(str(path))) from error


def recipes_dir() -> Path:
    """The directory of the shipped recipes: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def find_recipe(address: str, beside: Path | None = None) -> tuple[Path, str]:
    """Return a recipe's file and its name in messages; a path is relative to ``beside``, if there is one."""
    if problem := path_problem(address):
        raise UsageError(f"The name of a recipe must {problem}, got {in_yaml(address)}.", RECIPE_HINT)
    if "/" in address or "\\" in address or address.endswith((".yaml", ".yml")):
        path = (beside or Path()) / Path(address).expanduser()
        if not path.exists():
            raise UsageError(f"There is no recipe file {address}.", RECIPE_HINT)
        return path, address
    if address not in recipe_names():
        raise _unknown_recipe(address)
    return recipes_dir() / f"{address}.yaml", f"{address}.yaml"


def _unknown_recipe(address: str) -> UsageError:
    local = next(
        (f"./{address}{end}" for end in (".yaml", ".yml", "") if Path(address + end).is_file()), None
    )
    guess = local or closest(address, recipe_names())
    question = f"; did you mean {guess}" if guess else ""
    return UsageError(
        f'There is no recipe "{address}"{question}{"?" if question else "."}',
        f"Shipped recipes: {', '.join(recipe_names())}. Name your own file by its path, e.g. ./mine.yaml.",
    )


def _resolved(path: Path, shown: str, chain: tuple[tuple[Path, str], ...]) -> YamlSource:
    """Read a file and those it extends; the nearer file wins key by key."""
    if len(chain) > MOST_PARENTS:
        raise UsageError(f"{shown} is the end of a chain of more than {MOST_PARENTS} recipes.", RECIPE_HINT)
    real = path.resolve()
    circle = [name for file, name in chain if file == real]
    if circle:
        names = [name for _, name in chain]
        loop = " -> ".join([*names[names.index(circle[0]) :], shown])
        raise UsageError(
            f"These recipes extend one another in a circle: {loop}.", "Remove one of their `extends`."
        )
    source = read_source(path, shown)
    parent = source.content.get("extends")
    own = YamlSource({key: value for key, value in source.content.items() if key != "extends"}, source.places)
    if parent is None:
        return own
    place = source.places[("extends",)]
    if not isinstance(parent, str):
        raise UsageError(
            f"{place}: extends must be the name or the path of one recipe, got {in_yaml(parent)}.",
            "Of several, let one extend the next.",
        )
    try:
        parent_path, parent_shown = find_recipe(parent, beside=path.parent)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", error.hint) from error
    base = _resolved(parent_path, parent_shown, (*chain, (real, shown)))
    inherited = {key: value for key, value in base.content.items() if key not in _OWN}
    return YamlSource(_merged(inherited, own.content), {**base.places, **own.places})


def _merged(base: Mapping[str, Any], nearer: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two mappings section by section; other values are replaced."""
    result = dict(base)
    for key, value in nearer.items():
        below = result.get(key)
        nested = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(below or {}, value) if nested else value
    return result


def _override(
    content: dict[str, Any], places: dict[Key, YamlLocation], item: str | Override
) -> Mistake | None:
    """Write one override into ``content``; return what is wrong with it."""
    if isinstance(item, str):
        name, equals, text = item.partition("=")
        item = Override(name.strip(), parse_value(text), f"--set {shortened(escaped(item), 120)}")
        parts = item.key.split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST_KEY:
            return Mistake(
                YamlLocation(item.option),
                (),
                "must be written as --set KEY=VALUE, e.g. --set distill.steps=100",
            )
    key = tuple(item.key.split("."))
    for depth, section in enumerate(key[:-1], 1):
        if not isinstance(content.get(section), Mapping):
            content[section], places[key[:depth]] = {}, YamlLocation(item.option)
        content[section] = content = dict(content[section])
    content[key[-1]] = item.value
    for below in [other for other in places if other[: len(key)] == key]:
        del places[below]
    places[key] = YamlLocation(item.option)
    return None
