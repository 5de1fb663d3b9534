"""Films of a world are readable as anybody's captioned videos, pixel for pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anyflow_cli.data.film import FIRST_SEED, film
from anyflow_cli.data.shapes_world import FPS, FRAMES, HEIGHT, WIDTH, WORLDS, render
from anyflow_cli.data.video import ClipFormat, list_clips, read_clip


def test_clips_and_captions_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    film(tmp_path, "shapes-shifted", 2)
    clips = list_clips(tmp_path)
    scene = WORLDS["shapes-shifted"].scene(FIRST_SEED + 1)
    assert [clip.caption for clip in clips][1] == scene.caption
    read = read_clip(clips[1].path, ClipFormat(FRAMES, FPS, HEIGHT, WIDTH))
    assert np.array_equal(read.pixels, render(scene))
    assert read.changes == ()


def test_what_is_there_stays_and_a_clip_without_caption_is_drawn_again(tmp_path: Path) -> None:
    film(tmp_path, "shapes", 2)
    whole = (tmp_path / "00001.mp4").read_bytes()
    (tmp_path / "00000.txt").write_text("my own words\n")
    (tmp_path / "00001.txt").unlink()
    (tmp_path / "00001.mp4").write_bytes(whole[:100])
    film(tmp_path, "shapes", 2)
    assert (tmp_path / "00000.txt").read_text() == "my own words\n"
    assert (tmp_path / "00001.mp4").read_bytes() == whole
