"""Scoring of videos that were generated elsewhere.

A file belongs to a prompt by VBench's file names (``PROMPT-K.mp4``), or by its caption (``NAME.txt`` beside
it, or a table ``captions.csv`` or ``captions.jsonl``), which may be the prompt or the text the video was
sampled with. Missing, unassigned, empty and broken files are named, none takes the place of another, and an
incomplete set is not comparable. The files are only read.
"""

from __future__ import annotations

import logging
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
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
from anyflow_cli.evaluate.protocol import (
    EvaluatedModel,
    ExternalSettings,
    Protocol,
    Variant,
    VideoRequest,
)
from anyflow_cli.evaluate.store import VideoRecord, size_and_digest
from anyflow_cli.evaluate.suite import VideoScore
from anyflow_cli.recipe.schema import Recipe

NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<sample>\d{1,9})", re.DOTALL)
READER_THREADS = 8
LISTED_NAMES = 10  # per kind of fault in a message

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundVideos:
    """The readable file of each requested video, and everything wrong with the directory."""

    files: dict[VideoRequest, Path]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def faults(self) -> list[str]:
        """One line per kind of fault."""
        kinds = {"missing": self.missing, "not requested": self.extra, "unreadable": self.broken}
        listed = {
            kind: [*names[:LISTED_NAMES], f"and {len(names) - LISTED_NAMES} more"][: len(names)]
            for kind, names in kinds.items()
        }
        return [f"{len(names)} {kind}: {', '.join(listed[kind])}" for kind, names in kinds.items() if names]


def prepare_external(recipe: Recipe, protocol: Protocol, directory: Path, out: Path) -> EvaluationJob:
    """Assign the videos of a directory to prompts; the job scores them without sampling any."""
    found = find_videos(directory, protocol)
    for fault in found.faults:
        log.warning("%s: %s.", directory, fault)
    if not found.files:
        raise UsageError(
            f"{directory} has no readable video of a prompt of {protocol.suite.name}.",
            "Name the videos PROMPT-K.mp4, or add captions.csv with the columns file and caption.",
        )
    lost = len(found.missing) + len(found.broken)
    deviations = [f"{lost} prompts or videos of {directory} missing or unreadable"] if lost else []
    present = replace(
        protocol,
        deviations=(*protocol.deviations, *deviations),
        skipped=frozenset(r.seed for r in protocol.requests if r not in found.files),
    )
    of = EvaluatedModel(str(directory), "named with --videos", teacher=False, weights="", lineage={})
    suite = protocol.suite
    settings = ExternalSettings(suite.name, suite.version, str(directory.resolve()))
    return EvaluationJob(recipe, present, (Variant(of, 0, settings),), out, found.files)


def score_external_videos(job: EvaluationJob) -> None:
    """Record every external video, scored if the suite scores pixels."""
    (one,) = job.variants
    store = job.store(one)
    store.create(one)
    store.drop_partial_line()
    known = store.records()
    for request, path in (job.external or {}).items():
        size, digest = size_and_digest(path)
        before = known.get((request.prompt, request.seed))
        if before is None or (before.file, before.digest) != (str(path), digest):
            store.append(
                VideoRecord(
                    request.prompt,
                    request.seed,
                    str(path),
                    size,
                    digest,
                    network=0.0,
                    decode=0.0,
                    batch=0,
                    score=_score(job, request, path),
                    made=time.time(),
                )
            )


def find_videos(directory: Path, protocol: Protocol) -> FoundVideos:
    """Find the file of each requested video; a prompt with several requests needs as many files."""
    names = protocol.suite_prompts
    requested: dict[str, list[VideoRequest]] = defaultdict(list)
    for request in protocol.requests:
        requested[names[request.number]].append(request)
    by_text = {r.prompt: names[r.number] for r in protocol.requests} | {name: name for name in requested}
    files, extra = _by_prompt(directory, by_text, requested.keys())
    pairs = [
        pair for name, each in requested.items() for pair in zip(each, files.get(name, ()), strict=False)
    ]
    broken = _broken(path for _, path in pairs)
    counts = {name: (len(files.get(name, ())), len(each)) for name, each in requested.items()}
    extra += [path for name, each in requested.items() for path in files.get(name, ())[len(each) :]]
    return FoundVideos(
        files={request: path for request, path in pairs if path not in broken},
        missing=tuple(f"{name} ({have} of {want})" for name, (have, want) in counts.items() if have < want),
        extra=tuple(sorted(path.relative_to(directory).as_posix() for path in extra)),
        broken=tuple(f"{path.relative_to(directory).as_posix()} ({why})" for path, why in broken.items()),
    )


def _by_prompt(
    directory: Path, by_text: Mapping[str, str], prompts: Collection[str]
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Files of each prompt, in the order of their sample numbers; and files without a prompt."""
    files: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    extra: list[Path] = []
    for clip in list_clips(directory):
        prompt, sample = _prompt_and_sample(clip, by_text, prompts)
        if prompt is None:
            extra.append(clip.path)
        else:
            files[prompt].append((sample, clip.path))
    return {prompt: [path for _, path in sorted(each)] for prompt, each in files.items()}, extra


def _prompt_and_sample(
    clip: ClipFile, by_text: Mapping[str, str], prompts: Collection[str]
) -> tuple[str | None, int]:
    numbered = NUMBERED.fullmatch(clip.path.stem)
    sample = int(numbered["sample"]) if numbered else 0
    if clip.caption is not None:
        return by_text.get(clip.caption), sample
    names = [*([numbered["prompt"]] if numbered else []), clip.path.stem]
    return next((name for name in names if name in prompts), None), sample


def _broken(paths: Iterable[Path]) -> dict[Path, str]:
    listed = list(paths)
    with ThreadPoolExecutor(READER_THREADS) as pool:
        return {path: why for path, why in zip(listed, pool.map(decoding_error, listed), strict=True) if why}


def _score(job: EvaluationJob, request: VideoRequest, path: Path) -> VideoScore:
    """Score a file's pixels, which must have the recipe's size and length."""
    suite, model = job.protocol.suite, job.recipe.model
    if suite.from_files:
        return VideoScore({})
    try:
        clip = read_clip(path, ClipFormat(model.frames, model.fps, model.height, model.width))
    except UnusableClipError as error:
        raise UsageError(
            f"{path} cannot be scored: {error.message}.", "Remove it from the directory."
        ) from error
    if clip.changes:
        raise UsageError(
            f"{path} would have to be {', '.join(clip.changes)}.",
            "Convert the videos to the recipe's size, length and frame rate.",
        )
    images = suite.images([request.prompt], [request.seed])
    return suite.score([clip.pixels], [request.prompt], images)[0]
