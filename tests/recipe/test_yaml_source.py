"""YAML as recipes read it: types, lines, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.yaml_source import LARGEST, YamlLocation, parse_source, parse_value, read_source


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("010", "010"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2024-01-31", "2024-01-31"),
        ("1:30", "1:30"),
        ("[1, 2.5, [a]]", (1, 2.5, ("a",))),
        ("{rank: 8}", {"rank": 8}),
        ("[1", "[1"),
        ("a: b: c", "a: b: c"),
    ],
)
def test_values_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_every_key_knows_its_line() -> None:
    source = parse_source("model:\n  # a remark\n  gate: 0.5\nsample:\n  nfe:\n  - 4\n  - 32\n", "mine.yaml")
    assert source.content == {"model": {"gate": 0.5}, "sample": {"nfe": (4, 32)}}
    assert source.places[("model", "gate")] == YamlLocation("mine.yaml", 3)
    assert source.places[("sample", "nfe", 1)] == YamlLocation("mine.yaml", 7)
    assert str(source.places[("sample",)]) == "mine.yaml:4"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {}\nmodel: {}", "m.yaml:2: the key model is here a second time; the first is in line 1."),
        ("a:\n  b: 1\n  b: 1", "m.yaml:3: the key b is here a second time; the first is in line 2."),
        ("", "m.yaml is empty, so it is not a recipe."),
        ("# only a remark", "m.yaml is empty, so it is not a recipe."),
        ("- 1\n- 2", "m.yaml has no keys and values, so it is not a recipe."),
        ("just words", "m.yaml has no keys and values, so it is not a recipe."),
        ("a: &x [*x]", "m.yaml:1: a recipe has at most 32 levels, aliases included."),
        ("[" * 4000, "m.yaml is nested too deeply to be a recipe."),
        ("a: !!int many", "m.yaml:1: 'many' is not of type int."),
        ("a: !!bool maybe", "m.yaml:1: 'maybe' is not of type bool."),
        ("a: !!float .", "m.yaml:1: '.' is not of type float."),
        (f"a: {'9' * 5000}", "m.yaml:1: a number of 5000 digits is too long."),
        ("a: \x01", "m.yaml is not a YAML file."),
        ("? [a]\n: 1", "m.yaml:1: a key must be a word."),
        ("a: 1\nb: c: d", "m.yaml:2: mapping values are not allowed here."),
        (
            "a: 1\n---\nb: 2",
            "m.yaml:2: expected a single document in the stream, but found another document.",
        ),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source(text, "m.yaml")
    assert caught.value.message == sentence
    assert caught.value.hint


def test_a_tag_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"m.yaml:1: the tag .* has no meaning here"):
        parse_source(f"a: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/made']", "m.yaml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x02 pickle", "is not a text file"),
        (b"a: 1\0", "is not a text file"),
        (b"a" * (LARGEST + 1), "is not a text file of a recipe's size"),
    ],
)
def test_a_binary_or_huge_file_is_no_recipe(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_source(path, "model.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\n")
    assert read_source(path, "m.yaml").content == {"name": "a"}
