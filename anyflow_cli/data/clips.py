"""Directories of captioned clips: which videos they hold, with which captions.

Captions are in text files beside the clips (``cat.mp4`` and ``cat.txt``) or in one table (``captions.csv``,
``metadata.csv`` or the same as ``.jsonl``). Whatever is wrong with some files is logged once, grouped by kind
with counts; the others are used. ``draw_clips`` writes such a directory from a shapes world, which
``finetune`` trains on when a recipe names a world and no videos are given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from anyflow_cli.data.prompts import (
    FILE_COLUMNS,
    MAX_LENGTH,
    TEXT_COLUMNS,
    check_text,
    read_rows,
    read_text,
    text_field,
)
from anyflow_cli.data.shapes_world import FPS, WORLDS, render
from anyflow_cli.data.video import UnusableClipError, probe, write_mp4
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import atomic_write

VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif", ".mpg", ".mpeg", ".m2v", ".ts", ".mts",
    ".m2ts", ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".dv", ".y4m",
    ".apng", ".mjpeg", ".divx",
}  # fmt: skip
PICTURE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jxl",
}  # fmt: skip
OTHER_SUFFIXES = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet", ".yaml", ".yml", ".md", ".pdf", ".html",
    ".xml", ".srt", ".vtt", ".ass", ".sha256", ".md5", ".log", ".py", ".sh", ".zip", ".tar", ".gz",
    ".zst", ".7z", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".wav", ".mp3", ".m4a", ".aac",
    ".flac", ".ogg", ".opus",
}  # fmt: skip
TABLES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
NAMES_SHOWN = 5  # per kind of problem
FIRST_SEED = 2**20  # of the scenes; the suite's prompts and reference clips use seeds far above

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipFile:
    """A video file and its caption; ``problem`` says why it has none."""

    path: Path
    caption: str | None
    problem: str = "no caption: neither a text file beside it nor a row in a table"


@dataclass
class FolderProblems:
    """What is wrong with the files of a directory, by kind."""

    directory: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, name: object) -> None:
        """Note a problem; ``kind`` is a noun phrase in the plural."""
        self.found.setdefault(kind, []).append(str(name))

    def report(self) -> None:
        """Log every kind with its count and the first names."""
        for kind, names in self.found.items():
            more = ", ..." if len(names) > NAMES_SHOWN else ""
            listed = ascii(", ".join(names[:NAMES_SHOWN]))[1:-1].replace("\\'", "'")
            log.warning("%s: %d %s: %s%s", self.directory, len(names), kind, listed, more)


def list_clips(directory: Path, *, pictures: bool = False) -> list[ClipFile]:
    """List all videos under a directory by name, each with its caption or None; log every problem.

    Args:
        directory: The directory.
        pictures: List pictures, too.

    Raises:
        UsageError: The directory does not exist, cannot be read, or contains no video.
    """
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UsageError(f"The directory of videos {directory} {what}.", "Give a directory with video files.")
    problems = FolderProblems(directory)
    files = sorted(_regular_files(directory, problems))
    clips = _videos(files, pictures)
    table = next((path for name in TABLES for path in files if path == directory / name), None)
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    captions = {} if table is None else _read_table(table, set(clips), problems)
    listed = [
        _with_caption(clip, captions.get(clip), texts.get(clip.with_suffix("")), problems) for clip in clips
    ]
    used = {*clips, table, *(texts.get(clip.with_suffix("")) for clip in clips)}
    for path in files:
        if path not in used:
            is_picture = path.suffix.lower() in PICTURE_SUFFIXES
            kind = "pictures, which are not videos" if is_picture else "files that are not read"
            problems.add(kind, path.relative_to(directory))
    problems.report()
    if not clips:
        raise UsageError(
            f"{directory} contains no video.", "Give a directory with video files that ffmpeg can read."
        )
    return listed


def draw_clips(directory: Path, world: str, count: int) -> None:
    """Write the first ``count`` clips of a world as lossless mp4 files; existing files are kept.

    A caption is written after its clip, so a clip without one is incomplete and drawn again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        caption = directory / f"{index:05d}.txt"
        if not caption.exists():
            scene = WORLDS[world].scene(FIRST_SEED + index)
            write_mp4(caption.with_suffix(".mp4"), render(scene), FPS, lossless=True)
            with atomic_write(caption) as temporary:
                temporary.write_text(scene.caption + "\n")


def _regular_files(directory: Path, problems: FolderProblems) -> Iterator[Path]:
    """Files under a directory without hidden ones, pipes, devices and names that are not UTF-8."""

    def refuse(error: OSError) -> None:
        raise UsageError(
            f"Cannot read {error.filename}: {error.strerror}.", "Fix its permissions."
        ) from error

    for parent, _, names in os.walk(directory, onerror=refuse):
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            try:
                path.name.encode()
            except UnicodeEncodeError:
                problems.add("files whose names are not UTF-8", path.relative_to(directory))
                continue
            if path.is_file():
                yield path
            else:
                problems.add("pipes, devices or broken links", path.relative_to(directory))


def _videos(files: list[Path], pictures: bool) -> list[Path]:
    """The videos among files, and pictures if wanted; an unknown suffix is looked at once, with ffmpeg."""
    known = {
        **dict.fromkeys(VIDEO_SUFFIXES, True), **dict.fromkeys(OTHER_SUFFIXES, False),
        **dict.fromkeys(PICTURE_SUFFIXES, pictures),
    }  # fmt: skip
    for path in files:
        if path.suffix.lower() not in known:
            try:
                probe(path)
            except UnusableClipError:
                known[path.suffix.lower()] = False
            else:
                known[path.suffix.lower()] = True
    return [path for path in files if known[path.suffix.lower()]]


def _with_caption(clip: Path, caption: str | None, text: Path | None, problems: FolderProblems) -> ClipFile:
    """Pair a clip with its caption in the table, or else in its text file."""
    name = clip.relative_to(problems.directory)
    if caption is None and text is not None:
        try:
            caption = check_text(" ".join(read_text(text).split()), text.name, None)
        except (UsageError, OSError) as error:
            problems.add("clips with an unusable caption file", f"{name} ({error})")
            return ClipFile(clip, None, str(error).rstrip("."))
    if not caption:
        return ClipFile(clip, None)
    if len(caption) > MAX_LENGTH:
        problems.add(f"captions of more than {MAX_LENGTH:,} characters, which are truncated", name)
        caption = caption[:MAX_LENGTH]
    return ClipFile(clip, caption)


def _read_table(table: Path, clips: set[Path], problems: FolderProblems) -> dict[Path, str]:
    """Captions by clip, from the rows that can be used; of several rows for a clip the last."""
    captions: dict[Path, str] = {}
    try:
        for line, row in read_rows(table):
            try:
                clip = table.parent / text_field(table, line, row, FILE_COLUMNS)
                caption = text_field(table, line, row, TEXT_COLUMNS, None)
            except UsageError as error:
                problems.add(f"unusable rows of {table.name}", error.message.rstrip("."))
                continue
            if clip not in clips:
                problems.add(f"rows of {table.name} that name no video here", f"line {line} ({clip.name})")
                continue
            if clip in captions:
                problems.add(f"videos in several rows of {table.name}, of which the last counts", clip.name)
            captions[clip] = caption
    except UsageError as error:
        problems.add("unusable tables", error.message.rstrip("."))
    return captions
