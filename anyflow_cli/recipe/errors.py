"""What is wrong with a recipe, in words: each mistake with its place, its key, what was expected and found.

Knows the schema (for "did you mean") and pydantic's kinds of errors, and nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.renamed import renamed_key
from anyflow_cli.recipe.schema import Recipe, Section
from anyflow_cli.recipe.yaml_source import Key, YamlLocation
from anyflow_cli.utils.user_text import escaped, shortened

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
    "string_too_long":         "text of at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', as it names a directory",
}  # fmt: skip
SHOWN_MISTAKES = 20  # the first ones; a file that is not a recipe may have thousands
LONGEST_WORD = 64  # characters of a key; longer ones are not compared with those of the schema
MANY_DIGITS = 40


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong: its place, its key, and the rest of the sentence without a full stop."""

    place: YamlLocation
    key: Key
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {dotted(self.key)} {self.text}" if self.key else f"{self.place}: {self.text}"


def recipe_error(mistakes: Sequence[Mistake], more: int = 0) -> UsageError:
    """Combine mistakes into the one error that is shown; ``more`` are not listed."""
    hint = "`anyflow recipes show tiny` prints a whole recipe with every key; nothing was started."
    if len(mistakes) == 1:
        return UsageError(f"{mistakes[0]}.".replace("?.", "?"), hint)
    lines = "".join(f"\n  {mistake}" for mistake in mistakes)
    rest = f"\n  and {more} more" if more else ""
    return UsageError(f"The recipe has {len(mistakes) + more} mistakes.{lines}{rest}", hint)


def validation_error(
    error: ValidationError,
    places: Mapping[Key, YamlLocation],
    whole: YamlLocation,
    others: Iterable[Mistake] = (),
) -> UsageError:
    """Word pydantic's errors, and other mistakes, in the order of their places.

    Args:
        error: What pydantic found.
        places: Where each key was written.
        whole: Place of a key that nobody wrote.
        others: Mistakes found before, e.g. in the options.
    """
    details = error.errors(include_url=False)
    containers = {key[:depth] for key in map(_key, details) for depth in range(len(key))}
    # a part says it better than the section that contains it
    by_key: dict[Key, list[ErrorDetails]] = {}
    for detail in details:
        if _key(detail) not in containers:
            by_key.setdefault(_key(detail), []).append(detail)

    def place_of(key: Key) -> YamlLocation:
        """Where a key was written, or else the nearest section around it."""
        return next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), whole)

    found: list[tuple[YamlLocation, Key | Mistake]] = [(place_of(key), key) for key in by_key]
    found += [(mistake.place, mistake) for mistake in others]
    in_order = sorted(found, key=lambda item: (item[0].source, item[0].line))
    shown = [
        item if isinstance(item, Mistake) else Mistake(place, item, _words(item, by_key[item]))
        for place, item in in_order[:SHOWN_MISTAKES]
    ]
    return recipe_error(shown, len(found) - len(shown))


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant."""
    if len(word) > LONGEST_WORD:
        return None
    return next(iter(get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def dotted(key: Key) -> str:
    """Write a key as ``--set`` takes it, e.g. ``distill.optimizer.lr`` or ``distill.step_budgets[0]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    return shortened(escaped(text.replace("\n", r"\n")), 120)


def known_keys(section: type[BaseModel] = Recipe, prefix: Key = ()) -> Iterator[Key]:
    """Every key of the schema, sections before what they contain."""
    for name, field in section.model_fields.items():
        yield (*prefix, name)
        held = _section(field.annotation)
        if held:
            yield from known_keys(held, (*prefix, name))


def _key(detail: ErrorDetails) -> Key:
    """The key of a mistake, without pydantic's names of the alternatives that a field has."""
    *outer, last = detail["loc"]
    key: list[str | int] = []
    section: type[BaseModel] | None = Recipe
    for part in outer:
        known = section.model_fields if section is not None else {}
        if isinstance(part, int) or part in known:
            key.append(part)
            section = _section(known[part].annotation) if part in known else section
    is_name = section is None or last not in section.model_fields
    if isinstance(last, str) and is_name and key and detail["type"] != "extra_forbidden":
        return tuple(key)
    return (*key, last)


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field contains, looking through ``| None``."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    classes = (
        kind for kind in kinds if isinstance(kind, type) and not get_origin(kind)
    )  # 3.10: tuple[int] is one
    return next((kind for kind in classes if issubclass(kind, Section)), None)


def _words(key: Key, details: Sequence[ErrorDetails]) -> str:
    """What is wrong with the value of a key, of which each alternative of its field says its own."""
    kind, value = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        guess = _meant(key)
        return "is not a key of recipes" + (f"; did you mean {guess}?" if guess else "")
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return f"must {details[0]['ctx']['error']}, got {in_yaml(value)}"
    expected = [EXPECTED.get(one["type"], one["msg"]).format(**one.get("ctx", {})) for one in details]
    guess = (
        closest(str(value), details[0]["ctx"]["expected"].split("'")[1::2])
        if kind == "literal_error"
        else None
    )
    wanted = " or ".join(dict.fromkeys(expected))
    return f"must be {wanted}, got {in_yaml(value)}" + (f"; did you mean {guess}?" if guess else "")


def _meant(key: Key) -> str | None:
    """The key that was probably meant: its new name, or one spelled alike, or one of this name elsewhere."""
    if (renamed := renamed_key(key)) is not None:
        return dotted(renamed)
    *section, name = key
    known = _known_keys()
    within = [other for other in known if list(other[: len(section)]) == section]
    alike = closest(str(name), [str(other[-1]) for other in within if len(other) == len(key)])
    if alike:
        return dotted((*section, alike))
    same = [other for other in (*within, *known) if other[-1] == name]
    return dotted(same[0]) if same else None


@cache
def _known_keys() -> tuple[Key, ...]:
    return tuple(known_keys())


def in_yaml(value: Any) -> str:
    """A value as YAML would write it, cut short and without control characters."""
    return shortened(escaped(_written(value)))


def _written(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_written(part)}' for key, part in value.items())}}}"
    if isinstance(value, int) and abs(value) >= 10**MANY_DIGITS:
        return f"a number of more than {MANY_DIGITS} digits"
    return repr(value) if isinstance(value, str) else str(value)
