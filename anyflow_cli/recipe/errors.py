"""What is wrong with a recipe, in words: each mistake with its place, its key, what was expected and found.

Knows the schema (for "did you mean") and pydantic's kinds of errors, and nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.renamed import renamed_key
from anyflow_cli.recipe.schema import Recipe, Section
from anyflow_cli.recipe.yaml_source import Key, YamlLocation

# pydantic's kind of error -> what was expected, with the limits of its context
EXPECTED = {
    "int_type":                "a whole number",
    "float_type":              "a number",
    "string_type":             "text (put it in quotes)",
    "bool_type":               "true or false",
    "tuple_type":              "a list, e.g. [4, 32]",
    "model_type":              "a section of keys",
    "literal_error":           "{expected}",
    "greater_than":            "a number above {gt:g}",
    "greater_than_equal":      "a number of at least {ge:g}",
    "less_than":               "a number below {lt:g}",
    "less_than_equal":         "a number of at most {le:g}",
    "finite_number":           "a finite number",
    "too_short":               "a list of at least {min_length}",
    "too_long":                "a list of {max_length}",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', as it names a directory",
}  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """One thing wrong: where it stands, its key, and the rest of the sentence without a full stop."""

    place: YamlLocation
    key: Key
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.key)} {self.text}" if self.key else f"{self.place}: {self.text}"


def recipe_error(mistakes: Sequence[Mistake]) -> UsageError:
    """Gather all mistakes into the one error that is shown."""
    hint = "`anyflow recipes show tiny` prints a whole recipe with every key; nothing was started."
    if len(mistakes) == 1:
        return UsageError(f"{mistakes[0]}.".replace("?.", "?"), hint)
    in_order = sorted(mistakes, key=lambda mistake: (mistake.place.source, mistake.place.line))
    lines = "".join(f"\n  {mistake}" for mistake in in_order)
    return UsageError(f"The recipe has {len(mistakes)} mistakes.{lines}", hint)


def find_mistakes(
    error: ValidationError, places: Mapping[Key, YamlLocation], whole: YamlLocation
) -> list[Mistake]:
    """Word each of pydantic's errors; ``whole`` is the place of a key that nobody wrote."""
    found = error.errors(include_url=False)
    keys = [tuple(detail["loc"]) for detail in found]
    return [
        Mistake(_place(key, places, whole), key, _words(detail))
        for key, detail in zip(keys, found, strict=True)
        if not any(other != key and other[: len(key)] == key for other in keys)  # a part says it better
    ]


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def dotted(key: Key) -> str:
    """Write a key as ``--set`` takes it, e.g. ``distill.optimizer.lr`` or ``distill.step_budgets[0]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def known_keys(section: type[BaseModel] = Recipe, prefix: Key = ()) -> Iterator[Key]:
    """Every key of the schema, sections before what they hold."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        held = _section(field.annotation)
        if held:
            yield from known_keys(held, (*prefix, name))


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field holds, looking through ``| None``."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    classes = (
        kind for kind in kinds if isinstance(kind, type) and not get_origin(kind)
    )  # 3.10: tuple[int] is one
    return next((kind for kind in classes if issubclass(kind, Section)), None)


def _place(key: Key, places: Mapping[Key, YamlLocation], whole: YamlLocation) -> YamlLocation:
    """Where a key was written, or else the nearest section around it."""
    return next((places[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in places), whole)


def _words(detail: ErrorDetails) -> str:
    kind, key, value = detail["type"], tuple(detail["loc"]), detail["input"]
    if kind == "extra_forbidden":
        guess = _meant(key)
        return "is not a key of recipes" + (f"; did you mean {guess}?" if guess else "")
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return f"must {detail['ctx']['error']}, got {in_yaml(value)}"
    expected = EXPECTED.get(kind, detail["msg"]).format(**detail.get("ctx", {}))
    guess = (
        closest(str(value), detail["ctx"]["expected"].split("'")[1::2]) if kind == "literal_error" else None
    )
    return f"must be {expected}, got {in_yaml(value)}" + (f"; did you mean {guess}?" if guess else "")


def _meant(key: Key) -> str | None:
    """The key that was probably meant: its new name, or one spelled alike, or one of this name elsewhere."""
    if (renamed := renamed_key(key)) is not None:
        return dotted(renamed)
    *section, name = key
    known = list(known_keys())
    within = [other for other in known if list(other[: len(section)]) == section]
    alike = closest(str(name), [str(other[-1]) for other in within if len(other) == len(key)])
    if alike:
        return dotted((*section, alike))
    same = [other for other in (*within, *known) if other[-1] == name]
    return dotted(same[0]) if same else None


def in_yaml(value: Any) -> str:
    """A value as YAML would write it, cut short."""
    text = _written(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(part)}' for key, part in value.items())}}}"
    return repr(value) if isinstance(value, str) else str(value)
