"""Directories of captioned clips, read and drawn."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from anyflow_cli.data.clips import FIRST_SEED, draw_clips, list_clips
from anyflow_cli.data.shapes_world import FPS, FRAMES, HEIGHT, WIDTH, WORLDS, render
from anyflow_cli.data.video import ClipFormat, read_clip
from anyflow_cli.errors import UsageError


def test_clips_and_captions_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    draw_clips(tmp_path, "shapes-shifted", 2)
    clips = list_clips(tmp_path)
    scene = WORLDS["shapes-shifted"].scene(FIRST_SEED + 1)
    assert [clip.caption for clip in clips][1] == scene.caption
    read = read_clip(clips[1].path, ClipFormat(FRAMES, FPS, HEIGHT, WIDTH))
    assert np.array_equal(read.pixels, render(scene))
    assert read.changes == ()


def test_what_is_there_stays_and_a_clip_without_caption_is_drawn_again(tmp_path: Path) -> None:
    draw_clips(tmp_path, "shapes", 2)
    whole = (tmp_path / "00001.mp4").read_bytes()
    (tmp_path / "00000.txt").write_text("my own words\n")
    (tmp_path / "00001.txt").unlink()
    (tmp_path / "00001.mp4").write_bytes(whole[:100])
    draw_clips(tmp_path, "shapes", 2)
    assert (tmp_path / "00000.txt").read_text() == "my own words\n"
    assert (tmp_path / "00001.mp4").read_bytes() == whole


def test_captions_stand_beside_the_clips_or_in_a_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "a.MOV", "sub/c.webm", "notes.pdf", ".hidden.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("  a red\ncircle ")
    (tmp_path / "captions.csv").write_text('file,caption\nsub/c.webm,"a square, green"\ngone.mp4,x\n')
    with caplog.at_level(logging.WARNING):
        clips = list_clips(tmp_path)
    assert [(clip.path.name, clip.caption) for clip in clips] == [
        ("a.MOV", "a red circle"),
        ("b.mp4", None),
        ("c.webm", "a square, green"),
    ]
    assert "gone.mp4" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", b"name,caption\na.mp4,x\n", "no column 'file'"),
        ("captions.jsonl", b'{"file": "a.mp4", "caption": ""}\n', "no text for its caption"),
        ("a.txt", b"x" * 2001, "2,001 characters"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_captions_are_refused(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        list_clips(tmp_path)


def test_a_directory_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no video"):
        list_clips(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        list_clips(tmp_path / "absent")
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(UsageError, match="is a file"):
        list_clips(tmp_path / "clip.mp4")
