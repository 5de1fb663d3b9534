"""Directories of captioned clips, read and drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
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


def folder(tmp_path: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return tmp_path


def captions(directory: Path) -> dict[str, str | None]:
    return {clip.path.relative_to(directory).as_posix(): clip.caption for clip in list_clips(directory)}


def test_captions_are_read_beside_the_clips_or_from_a_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"b.mp4": "", "a.MOV": "", "sub/c.webm": "", ".hidden.mp4": "", "d.mpg": "", "d.TXT": "a dot"}
    table = {"captions.csv": 'file,caption\nsub/c.webm,"a square, green"\ngone.mp4,x\n'}
    directory = folder(tmp_path, {**files, "a.txt": "  a red\ncircle ", **table})
    assert captions(directory) == {
        "a.MOV": "a red circle", "b.mp4": None, "d.mpg": "a dot", "sub/c.webm": "a square, green"
    }  # fmt: skip
    assert "1 rows of captions.csv that name no video here: line 3 (gone.mp4)" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\na.mp4,one\nb.mp4,two\n"),
        ("metadata.csv", "video,prompt\na.mp4,one\nb.mp4,two\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.mp4", "text": "one"}\n{"file_name": "b.mp4", "caption": "two"}\n',
        ),
        ("captions.jsonl", '{"video": "a.mp4", "prompt": "one"}\n{"file": "b.mp4", "caption": "two"}\n'),
    ],
)
def test_tables_of_other_trainers_are_read(tmp_path: Path, name: str, content: str) -> None:
    assert captions(folder(tmp_path, {"a.mp4": "", "b.mp4": "", name: content})) == {
        "a.mp4": "one",
        "b.mp4": "two",
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "name,caption\na.mp4,x\n", "1 unusable rows of captions.csv: Line 2"),
        ("captions.csv", "name,caption\na.mp4,x\n", "has no column 'file'"),
        ("captions.csv", "file,caption\na.mp4,\n", "has no text in its column 'caption'"),
        ("captions.csv", "file,caption\na.mp4,über\n".encode("cp1252"), "is probably cp1252, not UTF-8"),
        ("captions.csv", "file,caption\na.mp4,x\n".encode("utf-16"), "captions.csv is UTF-16, not UTF-8"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 5}\n', "has no text in its column 'caption'"),
        ("captions.jsonl", '{"file": "a.mp4"\n', "1 unusable tables: Line 1"),
        ("a.txt", "über".encode("cp1252"), "a.mp4 (a.txt is probably cp1252, not UTF-8.)"),
        ("a.txt", "over".encode("utf-16"), "a.txt is UTF-16, not UTF-8"),
        ("a.txt", b"\x89PNG\r\n\0\0\0", "a.txt is binary"),
    ],
)
def test_a_bad_caption_leaves_the_other_clips(
    tmp_path: Path, name: str, content: str | bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"a.mp4": "", "b.mp4": "", "b.txt": "two", name: content}
    assert captions(folder(tmp_path, files)) == {"a.mp4": None, "b.mp4": "two"}
    assert said in caplog.text


def test_long_captions_are_truncated_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "a.mp4": "",
        "a.txt": "x" * 2001,
        "b.mp4": "",
        "captions.csv": f"file,text\nb.mp4,{'y' * 3000}\n",
    }
    assert captions(folder(tmp_path, files)) == {"a.mp4": "x" * 2000, "b.mp4": "y" * 2000}
    assert "2 captions of more than 2,000 characters, which are truncated: a.mp4, b.mp4" in caplog.text


def test_of_several_rows_the_last_counts_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = "file,caption\na.mp4,one\nb.mp4,two\na.mp4,three\n"
    assert captions(folder(tmp_path, {"a.mp4": "", "b.mp4": "", "captions.csv": table})) == {
        "a.mp4": "three",
        "b.mp4": "two",
    }
    assert "1 videos in several rows of captions.csv, of which the last counts: a.mp4" in caplog.text


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = folder(
        tmp_path, {"a.mp4": "", "one.png": "", "two.JPG": "", "notes.pdf": "", "alone.txt": "x"}
    )
    os.mkfifo(directory / "pipe.mp4")
    (directory / "loop.mp4").symlink_to(directory / "loop.mp4")
    (directory / os.fsdecode(b"\xff.mp4")).touch()
    assert list(captions(directory)) == ["a.mp4"]
    assert "2 pictures, which are not videos: one.png, two.JPG" in caplog.text
    assert "2 files that are not read: alone.txt, notes.pdf" in caplog.text
    assert "2 pipes, devices or broken links: " in caplog.text
    assert "1 files whose names are not UTF-8: \\udcff.mp4" in caplog.text


def test_unknown_suffixes_are_read_if_ffmpeg_opens_them(tmp_path: Path) -> None:
    draw_clips(tmp_path, "shapes", 1)
    (tmp_path / "00000.mp4").rename(tmp_path / "00000.clip")
    (tmp_path / "00001.blob").write_bytes(b"no video")
    assert list(captions(tmp_path)) == ["00000.clip"]


def test_a_directory_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no video"):
        list_clips(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        list_clips(tmp_path / "absent")
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(UsageError, match="is a file"):
        list_clips(tmp_path / "clip.mp4")
