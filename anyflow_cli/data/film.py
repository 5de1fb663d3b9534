"""Clips of a shapes world as a user's own videos would be: mp4 files, each with its caption beside it.

They are what ``finetune`` trains on when a recipe names a world and no videos are given.
"""

from __future__ import annotations

from pathlib import Path

from anyflow_cli.data.shapes_world import FPS, WORLDS, render
from anyflow_cli.data.video import write_mp4
from anyflow_cli.utils.files import atomic_write

FIRST_SEED = 2**20  # of the scenes; the suite's prompts and reference clips lie far above


def film(directory: Path, world: str, count: int) -> None:
    """Write the first ``count`` clips of a world without loss; files that are there stay.

    A caption is written after its clip, so that after a kill a clip without one is drawn again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        caption = directory / f"{index:05d}.txt"
        if not caption.exists():
            scene = WORLDS[world].scene(FIRST_SEED + index)
            write_mp4(caption.with_suffix(".mp4"), render(scene), FPS, lossless=True)
            with atomic_write(caption) as temporary:
                temporary.write_text(scene.caption + "\n")
