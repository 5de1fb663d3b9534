"""Resolved recipes as text: written as YAML, compared key by key, hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from anyflow_cli.recipe.schema import Recipe


def dump(recipe: Recipe) -> str:
    """Write a recipe with every value as YAML; reading it back gives an equal recipe."""
    return yaml.dump(_plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return every value by its dotted key, e.g. ``distill.optimizer.lr``."""
    return dict(_flattened(_plain(recipe), ""))


def differing_keys(a: Recipe, b: Recipe, sections: Iterable[str] | None = None) -> list[str]:
    """Return the dotted keys in which two recipes differ, in all sections or in ``sections``."""
    left, right = flat(a), flat(b)
    wanted = None if sections is None else set(sections)
    keys = (key for key in {**left, **right} if wanted is None or key.partition(".")[0] in wanted)
    return [key for key in keys if left.get(key, _ABSENT) != right.get(key, _ABSENT)]


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The same recipe with other values, by dotted key, checked."""
    content = recipe.model_dump()
    for key, value in values.items():
        *sections, last = key.split(".")
        inner: dict[str, Any] = content
        for section in sections:
            inner[section] = inner = inner[section] or {}
        inner[last] = value
    return Recipe.model_validate(content)


def digest(recipe: Recipe) -> str:
    """SHA-256 of all values except the description, which does not affect results."""
    values = {key: value for key, value in flat(recipe).items() if key != "description"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


_ABSENT = object()


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, and quotes text that YAML 1.1 would read as something else."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
# SafeDumper writes 1e-06, which YAML 1.1 reads as text; with a dot every reader finds a number
_Dumper.add_representer(
    float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", _number(value))
)


def _number(value: float) -> str:
    mantissa, exponent, power = repr(value).partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}{exponent}{power}"


def _plain(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = recipe.model_dump(mode="json")
    return content


def _flattened(content: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
