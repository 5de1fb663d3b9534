"""Videos made elsewhere, scored as they are: which prompt each file shows, and whether it can be read.

A file belongs to a prompt by VBench's own naming (``PROMPT-K.mp4``), or by its caption (``NAME.txt`` beside
it, or a table ``captions.csv`` or ``.jsonl``), which may be the prompt or the text it was sampled with.
Whatever is missing, not asked for, empty or broken is named; a video never counts as another, and what is not
whole is not comparable. The files are only read.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from anyflow_cli.data.clips import ClipFile, list_clips
from anyflow_cli.data.video import (
    ClipFormat,
    UnusableClipError,
    decoding_error,
    read_clip,
)
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.generate import EvaluationJob
from anyflow_cli.evaluate.protocol import Item, Protocol, Subject, Variant
from anyflow_cli.evaluate.store import Scored, digest_of
from anyflow_cli.evaluate.suite import VideoScore
from anyflow_cli.recipe.schema import Recipe

NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<sample>\d+)", re.DOTALL)
READERS = 8
SHOWN = 10  # names of a kind of fault that a message lists

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The file of each video that is there and whole, and all that is wrong with the directory."""

    files: dict[Item, Path]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """A line a kind of fault."""
        kinds = {"missing": self.missing, "not asked for": self.extra, "unreadable": self.broken}
        return [f"{len(names)} {kind}: {_some(names)}" for kind, names in kinds.items() if names]


def prepare_given(recipe: Recipe, protocol: Protocol, directory: Path, out: Path) -> EvaluationJob:
    """Find a directory's videos and write down what is there, for ``run.evaluate`` to sum up."""
    found = find_videos(directory, protocol)
    for fault in found.faults:
        log.warning("%s: %s.", directory, fault)
    if not found.files:
        raise UsageError(
            f"No video of {directory} can be read and belongs to a prompt of {protocol.suite.name}.",
            "Name them PROMPT-K.mp4, or give captions.csv with the columns file and caption.",
        )
    lost = len(found.missing) + len(found.broken)
    deviations = [f"{lost} prompts or videos of {directory} missing or unreadable"] if lost else []
    present = replace(
        protocol,
        deviations=(*protocol.deviations, *deviations),
        skipped=frozenset(item.seed for item in protocol.items if item not in found.files),
    )
    of = Subject(str(directory), "given with --videos", teacher=False, weights="", lineage={})
    suite = protocol.suite
    settings = {"suite": suite.name, "suite version": suite.version, "videos": str(directory.resolve())}
    return EvaluationJob(recipe, present, (Variant(of, 0, settings),), out, found.files)


def score_external_videos(job: EvaluationJob) -> None:
    """Write a record of each given video, scored where the suite looks at pixels."""
    (one,) = job.variants
    store = job.store(one)
    store.directory.mkdir(parents=True, exist_ok=True)
    store.mend()
    known = store.records()
    for item, path in (job.given or {}).items():
        size, digest = digest_of(path)
        before = known.get((item.prompt, item.seed))
        if before is None or (before.file, before.digest) != (str(path), digest):
            score = _score(job, item, path)
            store.append(
                Scored(item.prompt, item.seed, str(path), size, digest, 0.0, 0.0, 0, score, time.time())
            )


def find_videos(directory: Path, protocol: Protocol) -> Found:
    """Look for each video that the protocol asks for; a prompt that is asked twice has files for both."""
    names = protocol.own_prompts
    asked: dict[str, list[Item]] = defaultdict(list)
    for item in protocol.items:
        asked[names[item.number]].append(item)
    by_text = {item.prompt: names[item.number] for item in protocol.items} | {name: name for name in asked}
    files, extra = _sorted_out(directory, by_text, asked.keys())
    pairs = [pair for name, items in asked.items() for pair in zip(items, files.get(name, ()), strict=False)]
    broken = _broken(path for _, path in pairs)
    many = {name: (len(files.get(name, ())), len(items)) for name, items in asked.items()}
    extra += [path for name, items in asked.items() for path in files.get(name, ())[len(items) :]]
    return Found(
        files={item: path for item, path in pairs if path not in broken},
        missing=tuple(f"{name} ({have} of {want})" for name, (have, want) in many.items() if have < want),
        extra=tuple(sorted(path.relative_to(directory).as_posix() for path in extra)),
        broken=tuple(f"{path.relative_to(directory).as_posix()} ({why})" for path, why in broken.items()),
    )


def _sorted_out(
    directory: Path, by_text: Mapping[str, str], prompts: Collection[str]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files by their prompt, in the order of their samples; and those of no prompt."""
    files: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    extra: list[Path] = []
    for clip in list_clips(directory):
        prompt, sample = _place(clip, by_text, prompts)
        if prompt is None:
            extra.append(clip.path)
        else:
            files[prompt].append((sample, clip.path))
    return {prompt: [path for _, path in sorted(each)] for prompt, each in files.items()}, extra


def _place(clip: ClipFile, by_text: Mapping[str, str], prompts: Collection[str]) -> tuple[str | None, int]:
    """The prompt that a file shows, and the number of the sample that it is."""
    numbered = NUMBERED.fullmatch(clip.path.stem)
    sample = int(numbered["sample"]) if numbered else 0
    if clip.caption is not None:
        return by_text.get(clip.caption), sample
    names = [*([numbered["prompt"]] if numbered else []), clip.path.stem]
    return next((name for name in names if name in prompts), None), sample


def _broken(paths: Iterable[Path]) -> dict[Path, str]:
    listed = list(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return {path: why for path, why in zip(listed, pool.map(decoding_error, listed), strict=True) if why}


def _score(job: EvaluationJob, item: Item, path: Path) -> VideoScore:
    """What a suite of pixels sees in a file, which has to have the recipe's size and length."""
    suite, model = job.protocol.suite, job.recipe.model
    if suite.from_files:
        return VideoScore({})
    try:
        clip = read_clip(path, ClipFormat(model.frames, model.fps, model.height, model.width))
    except UnusableClipError as error:
        raise UsageError(f"{path} cannot be scored: {error.message}.", "Take it out.") from error
    if clip.changes:
        raise UsageError(
            f"{path} would have to be {', '.join(clip.changes)}.", "Give videos as the recipe makes them."
        )
    return suite.score([clip.pixels], [item.prompt], suite.images([item.prompt], [item.seed]))[0]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
