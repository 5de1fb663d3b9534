"""Which parts of videos and pictures become samples, and in which bucket."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anyflow_cli.data.clips import ClipFile, list_clips
from anyflow_cli.data.segments import (
    SegmentRules,
    cut_clips,
    find_cuts,
    nearest_format,
    remembered_cuts,
    scenes_of,
    starts,
)
from anyflow_cli.data.video import ClipFormat, picture_size, read_clip, write_mp4

FPS = 16
WIDE, TALL, SHORT = ClipFormat(17, FPS, 32, 64), ClipFormat(17, FPS, 64, 32), ClipFormat(9, FPS, 32, 64)
PICTURE = ClipFormat(1, FPS, 32, 32)
FORMATS = (WIDE, TALL, SHORT, PICTURE)


def video(
    path: Path, frames: int, height: int = 32, width: int = 64, scenes: int = 1, fps: int = FPS
) -> Path:
    """Frames whose red value is twice their number, on a green that changes with the scene."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    pixels[..., 0] = 2 * np.arange(frames)[:, None, None]
    pixels[..., 1] = (np.arange(frames) * scenes // frames % 2 * 200)[:, None, None]
    write_mp4(path, pixels, fps, lossless=True)
    return path


def picture(path: Path, height: int, width: int) -> Path:
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("height", "width", "frames", "expected"),
    [
        (480, 832, 100, WIDE),
        (832, 480, 100, TALL),
        (480, 832, 16, SHORT),  # too short for the longer ones
        (832, 480, 9, PICTURE),  # nearer in aspect; a video is only given formats of several frames
        (480, 832, 2, PICTURE),  # only one frame is filled
        (500, 500, 1, PICTURE),
    ],
)
def test_a_clip_has_the_nearest_format_that_it_fills(
    height: int, width: int, frames: int, expected: ClipFormat
) -> None:
    assert nearest_format(FORMATS, height, width, frames) == expected


def test_of_equal_aspect_and_length_the_nearest_area_counts() -> None:
    large, small = ClipFormat(9, FPS, 64, 64), ClipFormat(9, FPS, 32, 32)
    assert nearest_format((large, small), 60, 60, 9) == large
    assert nearest_format((large, small), 34, 34, 9) == small


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (SegmentRules((WIDE,)), [0]),
        (SegmentRules((WIDE,), "uniform", 3), [0, 20, 40]),
        (SegmentRules((WIDE,), "uniform", 1), [0]),
        (SegmentRules((WIDE,), "slide"), [0, 17, 34]),
        (SegmentRules((WIDE,), "slide", stride=10), [0, 10, 20, 30, 40]),
    ],
)
def test_starts_of_segments(rules: SegmentRules, expected: list[int]) -> None:
    assert starts(57, 17, rules) == expected
    assert starts(17, 17, rules) == [0]
    assert starts(5, 17, rules) == [0]


def test_a_cut_is_a_change_above_its_surroundings() -> None:
    calm = np.full((20, 4), 0.2, np.float32)
    calm[12:] = 0.9
    assert find_cuts(calm) == [12]
    wild = np.tile(np.array([[0.0], [0.5]], np.float32), (10, 4))  # every frame differs: no cut
    assert find_cuts(wild) == []
    fade = np.linspace(0, 1, 20, dtype=np.float32)[:, None].repeat(4, 1)
    assert find_cuts(fade) == []
    assert find_cuts(calm[:1]) == []


def test_scenes_of_a_video(tmp_path: Path) -> None:
    assert scenes_of(video(tmp_path / "a.mp4", 60, scenes=3), FPS) == [(0, 20), (20, 40), (40, 60)]
    assert scenes_of(video(tmp_path / "b.mp4", 20), FPS) == [(0, 20)]


def test_segments_are_those_parts_of_the_video(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 60, scenes=3)
    clip = ClipFile(path, "a clip")
    found = {
        cutting: [one.start for one in cut_clips([clip], SegmentRules((SHORT,), cutting, 3, None))]
        for cutting in ("head", "uniform", "slide", "scenes")
    }
    assert found == {
        "head": [0], "uniform": [0, 26, 51], "slide": [0, 9, 18, 27, 36, 45], "scenes": [0, 9, 20, 29, 40, 49]
    }  # fmt: skip
    for start in (0, 26, 51):
        pixels = read_clip(path, SHORT, start).pixels
        assert pixels[:, 0, 0, 0].tolist() == [2 * (start + i) for i in range(9)]
    assert read_clip(path, SHORT, 20).changes[-1].startswith("frames from 20 on used")


def test_a_segment_of_another_rate_starts_where_it_says(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", 80, fps=32)
    pixels = read_clip(path, SHORT, 10).pixels
    assert abs(int(pixels[0, 0, 0, 0]) // 2 - 20) <= 1
    assert {int(step) for step in np.diff(pixels[:, 0, 0, 0].astype(int))} == {4}


def test_clips_are_ordered_by_format(tmp_path: Path) -> None:
    video(tmp_path / "a.mp4", 10)
    video(tmp_path / "b.mp4", 20)
    video(tmp_path / "c.mp4", 20, 64, 32)
    picture(tmp_path / "d.png", 40, 40)
    (tmp_path / "e.mp4").write_text("broken")
    for path in tmp_path.glob("*.*"):
        path.with_suffix(".txt").write_text(path.stem)
    segments = cut_clips(list_clips(tmp_path, pictures=True), SegmentRules(FORMATS))
    assert [(one.clip.path.stem, one.format) for one in segments] == [
        ("b", WIDE), ("e", WIDE), ("c", TALL), ("a", SHORT), ("d", PICTURE)
    ]  # fmt: skip


def test_cuts_are_remembered_until_a_clip_or_a_rule_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = ClipFile(video(tmp_path / "a.mp4", 40), "a clip")
    rules, file = SegmentRules((SHORT,), "slide"), tmp_path / "out" / ".segments.json"
    remembered_cuts([clip], rules, file, save=False)
    assert not file.exists()
    first = remembered_cuts([clip], rules, file, save=True)
    monkeypatch.setattr("anyflow_cli.data.segments.probe", lambda path: pytest.fail("measured again"))
    assert remembered_cuts([clip], rules, file, save=True) == first
    monkeypatch.undo()
    finer = SegmentRules((SHORT,), "slide", stride=1)
    assert len(remembered_cuts([clip], finer, file, save=True)) > len(first)
    video(tmp_path / "a.mp4", 20)
    assert len(remembered_cuts([clip], rules, file, save=True)) == 2
    file.write_text("{")
    assert len(remembered_cuts([clip], rules, file, save=True)) == 2


def test_without_cutting_and_buckets_no_clip_is_opened(tmp_path: Path) -> None:
    clip = ClipFile(tmp_path / "gone.mp4", "a clip")
    (segment,) = cut_clips([clip], SegmentRules((WIDE,)))
    assert (segment.clip, segment.format, segment.start) == (clip, WIDE, 0)


def test_a_picture_on_its_side_is_measured_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(tmp_path / "a.jpg") == (60, 40)
    assert picture_size(picture(tmp_path / "b.png", 40, 60)) == (40, 60)
