"""The benchmark's questions: its file, longer prompts by line, and everything that is no such file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.vbench.prompts import in_random_order, read_questions

LINES: list[dict[str, Any]] = [
    {"prompt_en": "a still bench", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "The bund",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": "oil"},
    },
    {"prompt_en": "a cat", "dimension": ["overall_consistency"]},
    {"prompt_en": "A cat", "dimension": ["imaging_quality"]},
    {"prompt_en": "The bund", "dimension": ["overall_consistency", "imaging_quality"]},
]


@pytest.fixture
def full_info(tmp_path: Path) -> Path:
    path = tmp_path / "full_info.json"
    path.write_text(json.dumps(LINES))
    return path


def test_a_prompt_that_stands_twice_is_one_question_with_both_lines(full_info: Path) -> None:
    found = read_questions(full_info)
    assert [(q.number, q.prompt) for q in found] == [
        (0, "a still bench"),
        (1, "The bund"),
        (2, "a cat"),
        (3, "A cat"),
    ]
    assert found[1].lines == (LINES[1], LINES[4])
    assert found[1].dimensions == {"appearance_style", "overall_consistency", "imaging_quality"}


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_longer_prompts_belong_to_lines(full_info: Path, tmp_path: Path, kind: str) -> None:
    longer = [f"long {n}" for n in range(5)]
    source = tmp_path / f"long.{kind}"
    entries = [line | {"aug_prompt_en": text} for line, text in zip(LINES, longer, strict=True)]
    source.write_text(json.dumps(entries) if kind == "json" else "\n".join(longer) + "\n")
    address = str(source)
    found = read_questions(full_info, address)
    assert [q.text for q in found] == ["long 0", "long 1", "long 2", "long 3"]  # of two, the first
    assert [q.prompt for q in found][:2] == ["a still bench", "The bund"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("one\ntwo\n", "holds 2 prompts, and the benchmark 5"),
        (json.dumps([{"prompt_en": "x", "aug_prompt_en": "y"}] * 5), "Entry 1 of .* is about 'x'"),
        (json.dumps([{"prompt_en": "x"}] * 5), "have no aug_prompt_en"),
    ],
)
def test_longer_prompts_of_something_else_are_refused(
    full_info: Path, tmp_path: Path, content: str, said: str
) -> None:
    (tmp_path / "other").write_text(content)
    with pytest.raises(UsageError, match=said):
        read_questions(full_info, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no prompt"),
        ('[{"prompt": "a"}]', "is no full-info file"),
        ("{}", "is no full"),
    ],
)
def test_what_is_no_full_info_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        read_questions(tmp_path / "x.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_questions(tmp_path / "nowhere.json")


def test_the_first_k_are_the_same_for_everyone_and_nested(full_info: Path) -> None:
    found = read_questions(full_info)
    order = in_random_order(found)
    assert order == in_random_order(found[::-1])
    assert sorted(order, key=lambda q: q.number) == found
    assert order != found
