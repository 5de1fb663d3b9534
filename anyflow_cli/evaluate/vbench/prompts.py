"""The benchmark's questions: its full-info file, and the longer prompts that a user may sample with instead.

The file belongs to the benchmark and is read where it was installed (VBench-I2V's wheel forgot it: the user
names a copy). Two of VBench's prompts stand in it twice; a prompt is sampled once and its videos serve both
lines, as they do in the benchmark, where videos are found by prompt. Augmented prompts belong to lines, so of
a prompt with two of them the first is used.
"""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

from anyflow_cli.errors import AnyflowError, UsageError

SAMPLES = 5  # videos a prompt
FILTERED = 25  # videos of a prompt of temporal flickering, of which a filter keeps the first five static ones
FETCH_SECONDS = 60


@dataclass(frozen=True)
class Question:
    """One prompt: as the benchmark has it, as it is sampled with, and its lines of the full-info file."""

    number: int
    prompt: str
    text: str
    lines: tuple[dict[str, Any], ...]

    @property
    def dimensions(self) -> set[str]:
        """What its videos tell about."""
        return {name for line in self.lines for name in line["dimension"]}

    @property
    def image(self) -> str | None:
        """The name of the picture it begins with, in VBench-I2V."""
        name: str | None = self.lines[0].get("image_name")
        return name


def read_questions(full_info: Path, augmented: str | None = None) -> list[Question]:
    """All prompts in the order of the file; ``augmented`` is a file or an address."""
    lines = _read_full_info(full_info)
    texts = [line["prompt_en"] for line in lines]
    if augmented is not None:
        texts = _augmented(read_address(augmented), augmented, lines)
    by_prompt: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        by_prompt.setdefault(line["prompt_en"], []).append(number)
    return [
        Question(number, prompt, texts[places[0]], tuple(lines[place] for place in places))
        for number, (prompt, places) in enumerate(by_prompt.items())
    ]


def in_random_order(questions: Sequence[Question]) -> list[Question]:
    """The same shuffle everywhere, so that the first K of any two people touch the same prompts."""
    return sorted(questions, key=lambda q: hashlib.sha256(q.prompt.encode()).hexdigest())


def read_address(address: str) -> str:
    """The text of a file, or of an address that the user gave."""
    try:
        if address.startswith(("https://", "http://")):
            with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as opened:
                content: bytes = opened.read()
        else:
            content = Path(address).expanduser().read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{address} is not UTF-8.", "Give a text or JSON file.") from error
    except (OSError, URLError) as error:
        raise UsageError(f"{address} cannot be read: {error}.", "Give a file or an http address.") from error


def _read_full_info(path: Path) -> list[dict[str, Any]]:
    try:
        lines = json.loads(read_address(str(path)))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON: {error}.", "Give the benchmark's full-info file.") from error
    if not isinstance(lines, list) or not all(
        isinstance(line, dict) and isinstance(line.get("prompt_en"), str) and line.get("dimension")
        for line in lines
    ):
        raise UsageError(
            f"{path} is no full-info file of VBench.", "Its entries have prompt_en and dimension."
        )
    if not lines:
        raise UsageError(f"{path} holds no prompt.", "Give the benchmark's full-info file.")
    return lines


def _augmented(content: str, source: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    """One text a line of the full-info file: by line number, or by entry where the file is JSON."""
    try:
        entries = json.loads(content)
    except json.JSONDecodeError:
        return _same_length([text.strip() for text in content.splitlines() if text.strip()], source, lines)
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "aug_prompt_en" in e for e in entries
    ):
        raise UsageError(f"The entries of {source} have no aug_prompt_en.", "Give a text file, one a line.")
    _same_length(entries, source, lines)
    for number, (entry, line) in enumerate(zip(entries, lines, strict=True), 1):
        if entry.get("prompt_en") != line["prompt_en"]:
            raise UsageError(
                f"Entry {number} of {source} is about {entry.get('prompt_en')!r}, "
                f"the benchmark's about {line['prompt_en']!r}.",
                "Give the prompts of this benchmark, in its order.",
            )
    return [entry["aug_prompt_en"] for entry in entries]


def _same_length(found: list[Any], source: str, lines: Sequence[Any]) -> list[Any]:
    if len(found) != len(lines):
        raise UsageError(
            f"{source} holds {len(found)} prompts, and the benchmark {len(lines)}.",
            "Augmented prompts belong to the benchmark's lines by their number: one each, in its order.",
        )
    return found


def full_info_of(benchmark: str, installed: Path, setting: str | None) -> Path:
    """Which full-info file is used."""
    if setting is not None:
        return Path(setting).expanduser()
    if benchmark == "vbench":
        return installed
    raise AnyflowError(
        "VBench's package lacks the prompts of VBench-I2V, vbench2_i2v_full_info.json.",
        "Take it from VBench's repository and name it with --set evaluate.vbench.full_info=FILE.",
    )
