"""Reading one YAML file of a recipe, with the file and line of every key.

Values follow YAML 1.2's core types (``1e-6`` is a number, ``on`` and ``no`` are text), so that the meaning of
a recipe does not depend on the spellings of YAML 1.1. What the keys mean is not known here.

A hostile file is refused in a moment: its size, the number of its values (aliases counted at each use) and
their depth are bounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.user_text import MAX_NAME, shortened

LARGEST = 1 << 16  # bytes; ten times what a whole recipe takes
MOST_VALUES = 10_000
DEEPEST = 32
MOST_DIGITS = 300
RECIPE_HINT = "`anyflow recipes copy tiny mine.yaml` makes a recipe to start from."
NOT_YAML = (yaml.YAMLError, ValueError)  # forbidden characters
INTEGER = "tag:yaml.org,2002:int"
TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "null", "bool", "int", "float")}
Key = tuple[str | int, ...]


@dataclass(frozen=True)
class YamlLocation:
    """Where a value was written: a file and line, or an option of the command line (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class YamlSource:
    """Content of one file, and the place of each key in it."""

    content: Mapping[str, Any]
    places: Mapping[Key, YamlLocation]


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core types of YAML 1.2 alone: no dates, sexagesimals, octals or ``yes``."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as in the base)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?=[0-9]*[.eE])(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_source(path: Path, shown: str) -> YamlSource:
    """Read a YAML mapping; ``shown`` is the file's name in messages."""
    return parse_source(recipe_text(path, shown), shown)


def parse_source(text: str, shown: str) -> YamlSource:
    """Parse a YAML mapping and note the line of every key."""
    reader = _Reader(shown, {})
    try:
        content = reader.read(text)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, shown) from error
    except RecursionError as error:
        raise UsageError(f"{shown} is nested too deeply to be a recipe.", RECIPE_HINT) from error
    except NOT_YAML as error:
        raise UsageError(f"{shown} is not a YAML file.", RECIPE_HINT) from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else "has no keys and values"
        raise UsageError(f"{shown} {found}, so it is not a recipe.", RECIPE_HINT)
    return YamlSource(content, reader.places)


def parse_value(text: str) -> Any:
    """Return the value of ``text`` in YAML; text that is not YAML is its own value."""
    try:
        return _Reader("", {}).read(text)
    except (*NOT_YAML, RecursionError):
        return text


@dataclass
class _Reader:
    """Turns YAML nodes into values; refuses what YAML allows and a recipe cannot mean."""

    shown: str
    places: dict[Key, YamlLocation]
    values: int = 0

    def read(self, text: str) -> Any:
        """Return the value of a whole text."""
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else self.value(node, ())

    def value(self, node: yaml.Node, key: Key) -> Any:
        """Return the value of a node; ``key`` is the path that leads to it."""
        self.values += 1
        if self.values > MOST_VALUES or len(key) > DEEPEST:
            limit = f"{MOST_VALUES} values" if self.values > MOST_VALUES else f"{DEEPEST} levels"
            problem = f"a recipe has at most {limit}, aliases included"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if node.tag not in TAGS:
            problem = f"the tag {node.tag} has no meaning here"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return tuple(self._placed(item, (*key, index), item) for index, item in items)
        return _scalar(node)

    def mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        """Return the keys and values of a mapping; each key may appear once."""
        content: dict[str, Any] = {}
        for name_node, item in node.value:
            name = str(name_node.value)
            if not isinstance(name_node, yaml.ScalarNode) or len(name) > MAX_NAME:
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=name_node.start_mark)
            if name in content:
                first = self.places[(*key, name)].line
                problem = f"the key {name} is here a second time; the first is in line {first}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=name_node.start_mark)
            content[name] = self._placed(item, (*key, name), name_node)
        return content

    def _placed(self, item: yaml.Node, key: Key, written: yaml.Node) -> Any:
        self.places[key] = YamlLocation(self.shown, written.start_mark.line + 1)
        return self.value(item, key)


def _scalar(node: yaml.Node) -> Any:
    """Return the value of a single word or number; its tag may be explicit (``!!int 7``)."""
    digits = sum(map(str.isdigit, node.value))
    if node.tag == INTEGER and digits > MOST_DIGITS:
        problem = f"a number of {digits} digits is too long"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    try:
        return _Loader("").construct_object(node)
    except (ValueError, KeyError, OverflowError, IndexError) as error:  # of PyYAML, for `!!bool maybe`
        kind = node.tag.rpartition(":")[2]
        problem = f"{shortened(repr(node.value))} is not of type {kind}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


def recipe_text(path: Path, shown: str) -> str:
    """Read a recipe's file as text; refuse what is not a regular text file of a recipe's size."""
    if path.is_dir():
        raise UsageError(f"{shown} is a directory, not a recipe.", "Name the YAML file in it.")
    if not path.is_file():
        raise UsageError(f"{shown} is not a regular file, so it is not a recipe.", RECIPE_HINT)
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except OSError as error:
        raise AnyflowError(f"Cannot read {shown}: {error.strerror}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{shown} is not a text file, so it is not a recipe.", RECIPE_HINT) from error
    if len(data) > LARGEST or "\0" in text:
        raise UsageError(f"{shown} is not a text file of a recipe's size.", RECIPE_HINT)
    return text


def _syntax_error(error: yaml.MarkedYAMLError, shown: str) -> UsageError:
    mark = error.problem_mark or error.context_mark
    place = YamlLocation(shown, mark.line + 1 if mark else 0)
    problem = ", ".join(part for part in (error.context, error.problem) if part)
    return UsageError(f"{place}: {problem}.", "Correct that line; nothing was started.")
