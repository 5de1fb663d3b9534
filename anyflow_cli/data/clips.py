"""Directories of captioned clips: which videos they hold, with which captions.

Captions are in text files beside the clips (``cat.mp4`` and ``cat.txt``) or in one table, ``captions.csv`` or
``captions.jsonl``, with columns ``file`` and ``caption``. ``draw_clips`` writes such a directory from a
shapes world, which ``finetune`` trains on when a recipe names a world and no videos are given.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from anyflow_cli.data.prompts import COLUMNS, checked_text, read_rows, read_text, text_field
from anyflow_cli.data.shapes_world import FPS, WORLDS, render
from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import atomic_write

ENDINGS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
TABLES = ("captions.csv", "captions.jsonl")
FIRST_SEED = 2**20  # of the scenes; the suite's prompts and reference clips use seeds far above

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipFile:
    """A video to be read, and its caption where there is one."""

    path: Path
    caption: str | None


def list_clips(directory: Path) -> list[ClipFile]:
    """All videos under a directory by name, each with its caption or None."""
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UsageError(f"The directory of videos {directory} {what}.", "Give a directory with video files.")
    paths = sorted(
        p for p in directory.rglob("*") if p.suffix.lower() in ENDINGS and not p.name.startswith(".")
    )
    if not paths:
        raise UsageError(
            f"{directory} holds no video ({', '.join(ENDINGS)}).", "Give a directory with video files."
        )
    table = _caption_table(directory)
    for name in table.keys() - {path.relative_to(directory).as_posix() for path in paths}:
        log.warning("The caption table of %s names %r, which is not there.", directory, name)
    return [
        ClipFile(path, table.get(path.relative_to(directory).as_posix()) or _beside(path)) for path in paths
    ]


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


def _caption_table(directory: Path) -> dict[str, str]:
    for table in (directory / name for name in TABLES):
        if table.is_file():
            return {
                text_field(table, line, row, ("file",)): text_field(table, line, row, COLUMNS)
                for line, row in read_rows(table)
            }
    return {}


def _beside(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    text = " ".join(read_text(file).split()) if file.is_file() else ""
    return checked_text(str(file), text) or None
