"""Videos made elsewhere: which of the benchmark's prompts each file shows, and whether it can be read.

A file belongs to a prompt by VBench's own naming (``PROMPT-K.mp4``), or by its caption (``NAME.txt`` beside
it, or a table ``captions.csv`` or ``.jsonl``), which may be the prompt or the text it was sampled with.
Whatever is missing, not asked for, empty or broken is named; a video is never counted as another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.data.clips import ClipFile, list_clips, unreadable
from anyflow_cli.evaluate.vbench.prompts import Question

NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<sample>\d+)", re.DOTALL)
READERS = 8
SHOWN = 10  # names of a kind that a message lists


@dataclass(frozen=True)
class Found:
    """Files by question number, in the order of their samples, and all that is wrong with the directory."""

    files: dict[int, list[Path]]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """One sentence a kind of fault."""
        kinds = {"missing": self.missing, "not asked for": self.extra, "unreadable": self.broken}
        return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def find_videos(directory: Path, questions: Sequence[Question], samples: Sequence[int]) -> Found:
    """Look for ``samples`` videos of each question."""
    by_name = {q.prompt: q.number for q in questions}
    by_text = {q.text: q.number for q in questions} | by_name
    files: dict[int, list[tuple[int, Path]]] = defaultdict(list)
    extra: list[str] = []
    for clip in list_clips(directory):
        place = _place(clip, by_name, by_text)
        if place is None:
            extra.append(clip.path.relative_to(directory).as_posix())
        else:
            files[place[0]].append((place[1], clip.path))
    taken: dict[int, list[Path]] = {}
    missing: list[str] = []
    for question, wanted in zip(questions, samples, strict=True):
        have = [path for _, path in sorted(files[question.number])]
        taken[question.number] = have[:wanted]
        extra += [path.relative_to(directory).as_posix() for path in have[wanted:]]
        missing += [f"{question.prompt} ({len(have)} of {wanted})"] if len(have) < wanted else []
    broken = _broken(path for paths in taken.values() for path in paths)
    whole = {number: [p for p in paths if p not in broken] for number, paths in taken.items()}
    named = (f"{path.relative_to(directory).as_posix()} ({why})" for path, why in broken.items())
    return Found(whole, tuple(missing), tuple(sorted(extra)), tuple(named))


def _place(clip: ClipFile, by_name: dict[str, int], by_text: dict[str, int]) -> tuple[int, int] | None:
    """The number of the question and of the sample that a file stands for."""
    numbered = NUMBERED.fullmatch(clip.path.stem)
    sample = int(numbered["sample"]) if numbered else 0
    if clip.caption is not None:
        number = by_text.get(clip.caption)
        return None if number is None else (number, sample)
    names = [numbered["prompt"]] if numbered else []
    number = next((by_name[name] for name in [*names, clip.path.stem] if name in by_name), None)
    return None if number is None else (number, sample)


def _broken(paths: Iterable[Path]) -> dict[Path, str]:
    with ThreadPoolExecutor(READERS) as pool:
        listed = list(paths)
        return {path: why for path, why in zip(listed, pool.map(unreadable, listed), strict=True) if why}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
