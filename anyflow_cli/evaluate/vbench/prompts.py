"""Prompts of the benchmark: its full-info file, and longer versions of them to sample with.

The file belongs to the benchmark and is read from its installation. The wheel lacks that of VBench-I2V, so
the user names a copy. Two of VBench's prompts are listed twice: each is sampled once, and its videos serve
both entries, because the benchmark looks videos up by prompt. Augmented prompts belong to entries; for a
prompt with two of them the first is used.
"""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.records import MAX_BYTES, parse_record, read_bytes

FETCH_SECONDS = 60
GIVE_FULL_INFO = "Give the full-info file of the benchmark."
MAX_NAME_BYTES = 240  # of a prompt, which with "-K.mp4" names a file


def _usable_as_name(text: str) -> str:
    """VBench names files by prompts and images, so a separator in them would lead out of the directory."""
    if (
        "/" in text
        or "\0" in text
        or text in (".", "..")
        or len(text.encode(errors="replace")) > MAX_NAME_BYTES
    ):
        raise ValueError("Input should be usable as a file name")
    return text


FileName = Annotated[str, Field(min_length=1), AfterValidator(_usable_as_name)]


class FullInfoEntry(BaseModel):
    """One entry of a full-info file; further keys are passed on to the benchmark."""

    model_config = ConfigDict(extra="allow")

    prompt_en: FileName
    dimension: Annotated[list[str], Field(min_length=1)]
    image_name: FileName | None = None


class AugmentedEntry(BaseModel):
    """One entry of a file of augmented prompts."""

    prompt_en: str
    aug_prompt_en: str


@dataclass(frozen=True)
class BenchmarkPrompt:
    """One prompt of a benchmark.

    Attributes:
        number: Position among the unique prompts of the file.
        prompt: The prompt by which the benchmark scores.
        text: What videos are sampled with.
        entries: Its entries of the full-info file.
    """

    number: int
    prompt: str
    text: str
    entries: tuple[dict[str, Any], ...]

    @property
    def dimensions(self) -> set[str]:
        """Dimensions that its videos are scored on."""
        return {name for entry in self.entries for name in entry["dimension"]}

    @property
    def image(self) -> str | None:
        """Name of its conditioning image, in VBench-I2V."""
        name: str | None = self.entries[0].get("image_name")
        return name


def read_prompts_of(full_info: Path, augmented: str | None = None) -> list[BenchmarkPrompt]:
    """Read all prompts in the order of the full-info file.

    Args:
        full_info: The file.
        augmented: File or URL of longer prompts to sample with.
    """
    found = parse_record(
        read_bytes(full_info, GIVE_FULL_INFO), list[FullInfoEntry], str(full_info), GIVE_FULL_INFO
    )
    entries = [entry.model_dump(exclude_unset=True) for entry in found]
    if not entries:
        raise UsageError(f"{full_info} has no prompts.", GIVE_FULL_INFO)
    texts = [entry["prompt_en"] for entry in entries]
    if augmented is not None:
        texts = _augmented(_fetch_text(augmented), augmented, entries)
    by_prompt: dict[str, list[int]] = {}
    for number, entry in enumerate(entries):
        by_prompt.setdefault(entry["prompt_en"], []).append(number)
    return [
        BenchmarkPrompt(number, prompt, texts[places[0]], tuple(entries[place] for place in places))
        for number, (prompt, places) in enumerate(by_prompt.items())
    ]


def in_random_order(prompts: Sequence[BenchmarkPrompt]) -> list[BenchmarkPrompt]:
    """Shuffle by a hash of the prompt, so that the first K are the same for everyone."""
    return sorted(prompts, key=lambda q: hashlib.sha256(q.prompt.encode()).hexdigest())


def _fetch_text(address: str) -> str:
    """Read the UTF-8 text of a file or URL."""
    hint = "Give a UTF-8 text or JSON file, or its http address."
    try:
        if address.startswith(("https://", "http://")):
            with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as opened:
                content: bytes = opened.read(MAX_BYTES)
        else:
            content = read_bytes(Path(address).expanduser(), hint)
        return content.decode("utf-8-sig")
    except (OSError, ValueError, HTTPException) as error:  # of the network, the encoding, the protocol
        raise UsageError(f"{address} cannot be read: {error}.", hint) from error


def _augmented(content: str, source: str, entries: Sequence[dict[str, Any]]) -> list[str]:
    """One text per entry of the full-info file: by line, or by entry where the content is JSON."""
    if not content.lstrip().startswith("["):
        return _same_length([text.strip() for text in content.splitlines() if text.strip()], source, entries)
    found = parse_record(
        content.encode(), list[AugmentedEntry], source, "Give a text file, one prompt per line."
    )
    _same_length(found, source, entries)
    for number, (augmented, entry) in enumerate(zip(found, entries, strict=True), 1):
        if augmented.prompt_en != entry["prompt_en"]:
            raise UsageError(
                f"Entry {number} of {source} is for {augmented.prompt_en!r}; "
                f"entry {number} of the benchmark is {entry['prompt_en']!r}.",
                "Give the augmented prompts of this benchmark, in its order.",
            )
    return [augmented.aug_prompt_en for augmented in found]


def _same_length(found: list[Any], source: str, entries: Sequence[Any]) -> list[Any]:
    if len(found) != len(entries):
        raise UsageError(
            f"{source} has {len(found)} prompts, but the benchmark has {len(entries)}.",
            "Give one augmented prompt per entry of the benchmark, in its order.",
        )
    return found


def full_info_of(benchmark: str, installed: Path, setting: str | None) -> Path:
    """Path of the full-info file: as the recipe says, else the installed one."""
    if setting is not None:
        return Path(setting).expanduser()
    if benchmark == "vbench":
        return installed
    raise AnyflowError(
        "VBench's package lacks the prompts of VBench-I2V, vbench2_i2v_full_info.json.",
        "Download the file from VBench's repository and set evaluate.vbench.full_info=FILE.",
    )
