"""Prompts of the benchmark: its file, augmented prompts by entry, and files that are not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.vbench.prompts import in_random_order, read_prompts_of

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


def test_a_prompt_listed_twice_is_read_once_with_both_entries(full_info: Path) -> None:
    found = read_prompts_of(full_info)
    assert [(q.number, q.prompt) for q in found] == [
        (0, "a still bench"),
        (1, "The bund"),
        (2, "a cat"),
        (3, "A cat"),
    ]
    assert found[1].entries == (LINES[1], LINES[4])
    assert found[1].dimensions == {"appearance_style", "overall_consistency", "imaging_quality"}


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_augmented_prompts_belong_to_entries(full_info: Path, tmp_path: Path, kind: str) -> None:
    longer = [f"long {n}" for n in range(5)]
    source = tmp_path / f"long.{kind}"
    entries = [line | {"aug_prompt_en": text} for line, text in zip(LINES, longer, strict=True)]
    source.write_text(json.dumps(entries) if kind == "json" else "\n".join(longer) + "\n")
    address = str(source)
    found = read_prompts_of(full_info, address)
    assert [q.text for q in found] == ["long 0", "long 1", "long 2", "long 3"]  # of two, the first
    assert [q.prompt for q in found][:2] == ["a still bench", "The bund"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ntwo\n", "has 2 prompts, but the benchmark has 5"),
        (json.dumps([{"prompt_en": "x", "aug_prompt_en": "y"}] * 5), "Entry 1 of .* is for 'x'"),
        (json.dumps([{"prompt_en": "x"}] * 5), "is damaged: 0.aug_prompt_en: Field required"),
    ],
)
def test_augmented_prompts_of_another_benchmark_are_refused(
    full_info: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "other").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_prompts_of(full_info, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged: Invalid JSON"),
        ("[]", "has no prompts"),
        ('[{"prompt": "a"}]', "is damaged: 0.prompt_en: Field required"),
        ("{}", "is damaged: Input should be a valid array"),
    ],
)
def test_a_file_that_is_not_a_full_info_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_prompts_of(tmp_path / "x.json")
    with pytest.raises(UsageError, match="is missing"):
        read_prompts_of(tmp_path / "nowhere.json")


def test_the_first_k_prompts_are_fixed_and_nested(full_info: Path) -> None:
    found = read_prompts_of(full_info)
    order = in_random_order(found)
    assert order == in_random_order(found[::-1])
    assert sorted(order, key=lambda q: q.number) == found
    assert order != found
