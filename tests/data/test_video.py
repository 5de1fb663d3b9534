from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.data.video import (
    ClipFormat,
    Pixels,
    UnusableClipError,
    decoding_error,
    ffmpeg,
    from_pixels,
    raw_video_input,
    read_clip,
    read_image,
    read_start,
    require_ffmpeg,
    to_pixels,
    write_mp4,
)
from anyflow_cli.errors import UsageError


def levels(frames: int, height: int = 32, width: int = 32) -> Pixels:
    """A clip whose every frame has one gray level, 4 apart, so that a frame tells its number."""
    return np.broadcast_to(
        (20 + 4 * np.arange(frames, dtype=np.uint8))[:, None, None, None], (frames, height, width, 3)
    )


def numbers(pixels: Pixels) -> list[int]:
    """Which frames of ``levels`` these are."""
    return [round((float(frame.mean()) - 20) / 4) for frame in pixels]


def test_a_clip_comes_back_nearly_as_it_was(tmp_path: Path) -> None:
    video = render(WORLDS["shapes"].scene(3))
    write_mp4(tmp_path / "clip.mp4", video, 16)
    clip = read_clip(tmp_path / "clip.mp4", ClipFormat(33, 16, 64, 64))
    assert clip.changes == ()
    assert clip.pixels.shape == video.shape
    assert np.abs(clip.pixels.astype(int) - video).mean() < 2.5
    assert (
        np.abs(clip.pixels.mean((0, 1, 2)) - video.mean((0, 1, 2))).max() < 2
    )  # a colour matrix is off by more


def test_equal_pixels_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, levels(9), 16)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(("fps", "expected"), [(8, [0, 2, 4, 6]), (16, [0, 1, 2, 3]), (32, [0, 0, 1, 1])])
def test_time_is_resampled_to_the_nearest_frame(tmp_path: Path, fps: int, expected: list[int]) -> None:
    write_mp4(tmp_path / "clip.mp4", levels(12), 16)
    clip = read_clip(tmp_path / "clip.mp4", ClipFormat(4, fps, 32, 32))
    found = numbers(clip.pixels)
    assert all(abs(a - b) <= (fps != 16) for a, b in zip(found, expected, strict=True)), found
    assert np.diff(found).sum() in range(expected[-1] - 1, expected[-1] + 2)
    assert any("resampled from 16 to" in change for change in clip.changes) == (fps != 16)
    assert f"first 4 frames used ({4 / fps / 0.75:.0%} of 0.8 s)" in clip.changes


def test_size_is_scaled_and_the_centre_kept(tmp_path: Path) -> None:
    wide = np.zeros((5, 64, 128, 3), np.uint8)
    wide[:, :, 32:96] = 200  # the middle square is what a square crop keeps
    write_mp4(tmp_path / "wide.mp4", wide, 16)
    clip = read_clip(tmp_path / "wide.mp4", ClipFormat(5, 16, 32, 32))
    assert clip.changes == ("scaled and cropped from 64x128 to 32x32",)
    assert abs(float(clip.pixels[:, :, 2:-2].mean()) - 200) < 3
    scaled = read_clip(tmp_path / "wide.mp4", ClipFormat(5, 16, 32, 64))
    assert scaled.changes == ("scaled from 64x128 to 32x64",)


def encoded(path: Path, options: str, size: str = "64x32", before: str = "") -> Path:
    """A moving test picture of two seconds, made as a camera would."""
    source = f"{before} -f lavfi -i testsrc2=size={size}:rate=16:duration=2".split()
    result = ffmpeg(["-y", *source, *options.split(), str(path)])
    assert result.returncode == 0, result.stderr.decode()
    return path


def test_a_clip_that_lies_on_its_side_is_turned(tmp_path: Path) -> None:
    plain = encoded(tmp_path / "plain.mp4", "-c:v libx264 -qp 0 -pix_fmt yuv444p")
    turned = tmp_path / "turned.mp4"
    made = ffmpeg(["-display_rotation", "90", "-i", str(plain), "-c", "copy", str(turned)])
    assert made.returncode == 0, made.stderr.decode()
    flat, upright = (read_clip(path, ClipFormat(5, 16, *size)) for path, size in
                     ((plain, (32, 64)), (turned, (64, 32))))  # fmt: skip
    assert upright.changes == ("turned upright", "first 5 frames used (16% of 2.0 s)")
    assert np.abs(np.rot90(flat.pixels, 1, (1, 2)).astype(int) - upright.pixels).mean() < 3
    assert "scaled from 64x32 to 128x64" in read_clip(turned, ClipFormat(5, 16, 128, 64)).changes


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    """Half as wide as high: what is stored as 64x32 is a square picture."""
    path = encoded(tmp_path / "narrow.mp4", "-vf setsar=1/2 -c:v libx264 -qp 0 -pix_fmt yuv444p")
    plain = encoded(tmp_path / "plain.mp4", "-c:v libx264 -qp 0 -pix_fmt yuv444p")
    square, whole = (read_clip(p, ClipFormat(5, 16, 32, w)) for p, w in ((path, 32), (plain, 64)))
    assert "pixels of 1:2 made square" in square.changes
    halved = whole.pixels.reshape(5, 32, 32, 2, 3).mean(3)  # nothing was cropped
    assert np.abs(square.pixels - halved).mean() < 12


@pytest.mark.parametrize("size", ["65x33", "321x201"])
def test_odd_sizes_and_sound_are_no_trouble(tmp_path: Path, size: str) -> None:
    width, height = size.split("x")
    sound = "-f lavfi -i sine=duration=2"
    options = f"-vf scale={width}:{height},setsar=1 -c:v libx264 -pix_fmt yuv444p -c:a aac"
    clip = read_clip(encoded(tmp_path / "odd.mp4", options, before=sound), ClipFormat(9, 16, 32, 64))
    assert clip.pixels.shape == (9, 32, 64, 3)
    assert f"scaled and cropped from {height}x{width} to 32x64" in clip.changes


def test_a_varying_rate_is_resampled_by_time(tmp_path: Path) -> None:
    """Half a second at 16 fps, then at 4: each frame stays until the next one's time."""
    kept = "-vf select='if(lt(n,8),1,not(mod(n,4)))' -fps_mode vfr"
    path = encoded(tmp_path / "vfr.mp4", f"{kept} -c:v libx264 -qp 0 -pix_fmt yuv444p", "320x240")
    pixels = read_clip(path, ClipFormat(25, 16, 240, 320)).pixels.astype(int)
    moved = [bool(np.abs(after - before).max() > 8) for before, after in pairwise(pixels)]
    assert moved[:8] == [True] * 8
    assert sum(moved[8:]) == 4


def test_a_damaged_clip_is_named_not_made_up(tmp_path: Path) -> None:
    path = encoded(tmp_path / "clip.mp4", "-c:v libx264 -pix_fmt yuv420p", "320x240")
    content = bytearray(path.read_bytes())
    for place in range(4000, len(content) - 4000, 97):
        content[place] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(UnusableClipError, match=r"^damaged"):
        read_clip(path, ClipFormat(25, 16, 32, 32))


def test_a_file_of_sound_alone_is_named(tmp_path: Path) -> None:
    made = ffmpeg(["-f", "lavfi", "-i", "sine=duration=1", str(tmp_path / "sound.mp4")])
    assert made.returncode == 0
    with pytest.raises(UnusableClipError, match="it has no video stream"):
        read_clip(tmp_path / "sound.mp4", ClipFormat(9, 16, 32, 32))


@pytest.mark.parametrize(("curve", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_tone_mapped(tmp_path: Path, curve: str, name: str) -> None:
    tags = f"setparams=color_primaries=bt2020:color_trc={curve}:colorspace=bt2020nc:range=tv"
    gray = f"-f lavfi -i color=gray:size=64x32:rate=16:duration=1 -vf format=yuv420p10le,{tags}"
    path = tmp_path / "hdr.mp4"
    assert ffmpeg([*gray.split(), "-c:v", "libx264", str(path)]).returncode == 0
    clip = read_clip(path, ClipFormat(5, 16, 32, 64))
    assert f"HDR ({name}) tone-mapped" in clip.changes
    assert np.ptp(clip.pixels.mean((0, 1, 2))) < 3
    assert 100 < float(clip.pixels.mean()) < 200


def test_a_gif_at_the_nearest_rate_it_can_state_keeps_its_frames(tmp_path: Path) -> None:
    """GIF times are hundredths of a second: 16 fps becomes 0.06 s per frame, 16.67 fps."""
    to_gif = [*raw_video_input(levels(33), 100 / 6), "-lavfi", PALETTE, str(tmp_path / "clip.gif")]
    assert ffmpeg(to_gif, levels(33).tobytes()).returncode == 0
    clip = read_clip(tmp_path / "clip.gif", ClipFormat(33, 16, 32, 32))
    assert "played at 16 instead of 16.67 fps" in clip.changes
    assert numbers(clip.pixels) == list(range(33))


PALETTE = "split[a][b];[a]palettegen[p];[b][p]paletteuse=dither=none"


def combing(pixels: Pixels) -> float:
    """How much rows differ from the mean of their neighbors."""
    rows = pixels.astype(float)
    return float(np.abs(rows[:, 1:-1] - (rows[:, :-2] + rows[:, 2:]) / 2).mean())


def test_fields_are_deinterlaced(tmp_path: Path) -> None:
    fields = "-vf tinterlace=interleave_top,fieldorder=tff -flags +ilme+ildct -c:v libx264 -qp 8"
    path = encoded(tmp_path / "fields.mp4", f"{fields} -pix_fmt yuv420p", "320x240")
    clip = read_clip(path, ClipFormat(5, 8, 240, 320))
    plain = read_clip(
        encoded(tmp_path / "plain.mp4", "-c:v libx264 -qp 8 -pix_fmt yuv420p", "320x240"),
        ClipFormat(5, 8, 240, 320),
    )
    assert clip.changes[0] == "deinterlaced"
    assert combing(clip.pixels) < 1.3 * combing(plain.pixels)


@pytest.mark.parametrize(("size", "matrix"), [("1280x720", "bt709"), ("640x480", "smpte170m")])
def test_colors_without_a_tag_are_read_by_their_size(tmp_path: Path, size: str, matrix: str) -> None:
    red = f"-f lavfi -i color=red:size={size}:rate=16:duration=0.5".split()
    matrixed = f"scale=out_color_matrix={matrix}:out_range=tv,format=yuv420p,setparams=colorspace=unknown"
    path = tmp_path / "red.mp4"
    assert ffmpeg([*red, "-vf", matrixed, "-c:v", "libx264", str(path)]).returncode == 0
    pixels = read_clip(path, ClipFormat(5, 16, 32, 32)).pixels
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), [255, 0, 0], atol=4)


@pytest.mark.parametrize("name", ["clip.mov", "clip.webm", "clip.gif"])
def test_transparent_parts_turn_white(tmp_path: Path, name: str) -> None:
    """The right half is transparent; below it red is hidden."""
    rgba = np.zeros((5, 32, 64, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, :, :32, 3] = 255
    codec = {
        "clip.mov": "-c:v png",
        "clip.webm": "-c:v libvpx-vp9 -pix_fmt yuva420p -lossless 1",
        "clip.gif": f"-lavfi {PALETTE}",
    }
    source = ["-f", "rawvideo", "-pix_fmt", "rgba", "-s", "64x32", "-r", "20", "-i", "-"]
    made = ffmpeg([*source, *codec[name].split(), str(tmp_path / name)], rgba.tobytes())
    assert made.returncode == 0, made.stderr.decode()
    clip = read_clip(tmp_path / name, ClipFormat(5, 20, 32, 64))
    assert "transparent parts on white" in clip.changes
    np.testing.assert_allclose(clip.pixels[:, :, 36:].mean((0, 1, 2)), [255] * 3, atol=2)
    np.testing.assert_allclose(clip.pixels[:, :, :28].mean((0, 1, 2)), [200, 0, 0], atol=6)


@pytest.mark.parametrize("suffix", [".mpg", ".ts", ".m4v", ".wmv", ".flv", ".avi", ".mkv", ".ogv"])
def test_containers(tmp_path: Path, suffix: str) -> None:
    made = ffmpeg(
        ["-f", "lavfi", "-i", "testsrc2=size=64x32:rate=25:duration=1", str(tmp_path / f"clip{suffix}")]
    )
    assert made.returncode == 0, made.stderr.decode()
    assert read_clip(tmp_path / f"clip{suffix}", ClipFormat(9, 16, 32, 64)).pixels.shape == (9, 32, 64, 3)


@pytest.mark.parametrize(
    "content",
    [
        "ffconcat version 1.0\nfile secret.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_opens_no_other_file(tmp_path: Path, content: str) -> None:
    write_mp4(tmp_path / "secret.mp4", levels(9), 16)
    (tmp_path / "clip.mp4").write_text(content)
    with pytest.raises(UnusableClipError, match="unreadable"):
        read_clip(tmp_path / "clip.mp4", ClipFormat(5, 16, 32, 32))
    assert decoding_error(tmp_path / "clip.mp4") is not None


@pytest.mark.parametrize("how", ["missing", "failing", "silent"])
@pytest.mark.parametrize(
    "use",
    [
        lambda path: require_ffmpeg(),
        lambda path: read_clip(path, ClipFormat(5, 16, 32, 32)),
        lambda path: write_mp4(path.with_name("new.mp4"), levels(5), 16),
    ],
    ids=["required", "read", "written"],
)
def test_a_broken_ffmpeg_is_not_blamed_on_a_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], object], how: str
) -> None:
    write_mp4(tmp_path / "clip.mp4", levels(5), 16)
    exe = tmp_path / "ffmpeg"
    if how != "missing":
        exe.write_text(f"#!/bin/sh\nexit {int(how == 'failing')}\n")
        exe.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(exe))
    with pytest.raises(UsageError, match="ffmpeg") as error:
        use(tmp_path / "clip.mp4")
    assert "IMAGEIO_FFMPEG_EXE" in str(error.value.hint)


def test_too_short_and_unreadable_clips_are_named(tmp_path: Path) -> None:
    write_mp4(tmp_path / "short.mp4", levels(8), 16)
    with pytest.raises(UnusableClipError, match="too short: 8 frames at 16 fps where 9"):
        read_clip(tmp_path / "short.mp4", ClipFormat(9, 16, 32, 32))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnusableClipError, match=r"unreadable \(.+\)"):
        read_clip(tmp_path / "text.mp4", ClipFormat(9, 16, 32, 32))


@pytest.mark.parametrize("name", ["-y.mp4", "a 'quoted' name; rm.mp4", "%03d.mp4", "Füße: drei.mp4"])
def test_names_are_only_names(tmp_path: Path, name: str) -> None:
    write_mp4(tmp_path / name, levels(5), 16)
    assert numbers(read_clip(tmp_path / name, ClipFormat(5, 16, 32, 32)).pixels) == [0, 1, 2, 3, 4]


def test_pixels_and_tensors_are_inverse() -> None:
    pixels = render(WORLDS["shapes"].scene(0))
    video = from_pixels(pixels)
    assert video.shape == (33, 3, 64, 64)
    assert np.array_equal(to_pixels(video), pixels)
    assert to_pixels(torch.full((2, 5, 3, 4, 4), 2.0)).shape == (2, 5, 4, 4, 3)
    assert to_pixels(torch.full((1, 3, 4, 4), 2.0)).min() == 255


def test_a_picture_becomes_one_frame_of_the_wanted_size(tmp_path: Path) -> None:
    """Left half red, right half blue, twice as wide as wanted: the centre is kept."""
    pixels = np.zeros((16, 64, 3), np.uint8)
    pixels[:, :32, 0] = pixels[:, 32:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    clip = read_image(tmp_path / "wide.png", ClipFormat(9, 8, 16, 32))
    np.testing.assert_array_equal(clip.pixels, pixels[None, :, 16:48])
    assert clip.changes == ("scaled and cropped from 16x64 to 16x32",)


def test_a_picture_of_16_bits_keeps_its_levels(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16)
    Image.fromarray(np.broadcast_to(ramp, (16, 32)).copy()).save(tmp_path / "deep.png")
    clip = read_image(tmp_path / "deep.png", ClipFormat(9, 8, 16, 32))
    assert np.array_equal(clip.pixels[0, 0], (ramp >> 8)[:, None].repeat(3, axis=1))


def test_a_picture_too_large_to_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(np.zeros((16, 32, 3), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableClipError, match="512 pixels"):
        read_image(tmp_path / "large.png", ClipFormat(9, 8, 16, 32))


def test_transparent_parts_of_a_picture_turn_white(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 4), np.uint8)
    pixels[..., 0] = 200  # hidden below the transparent right half
    pixels[:, :16, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    clip = read_image(tmp_path / "half.png", ClipFormat(1, 8, 16, 32))
    assert clip.changes == ("transparent parts on white",)
    assert clip.pixels[0, 0, 0].tolist() == [200, 0, 0]
    assert clip.pixels[0, 0, 31].tolist() == [255, 255, 255]


def test_pictures_that_unpack_to_more_than_memory_holds_are_refused(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (1 << 27), zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "text.png", pnginfo=text)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "wide.png")
    for name in ("text.png", "wide.png"):
        with pytest.raises(UnusableClipError, match=r"^unreadable"):
            read_image(tmp_path / name, ClipFormat(1, 8, 16, 32))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_pictures_end_in_sentences(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    for _ in range(40):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        (tmp_path / "damaged").write_bytes(damaged)
        with suppress(UnusableClipError):
            assert read_image(tmp_path / "damaged", ClipFormat(1, 8, 16, 32)).pixels.shape == (1, 16, 32, 3)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    wanted = ClipFormat(1, 8, 16, 16)
    for read in (read_image, read_start):
        with pytest.raises(UnusableClipError, match="not a regular file"):
            read(tmp_path / "pipe.png", wanted)
    assert decoding_error(tmp_path / "pipe.png") == "not a regular file"


def test_the_start_of_a_short_video_is_all_of_it(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    write_mp4(tmp_path / "short.mp4", video, 8)
    assert len(read_start(tmp_path / "short.mp4", ClipFormat(9, 8, 16, 16)).pixels) == 3
    assert len(read_start(tmp_path / "short.mp4", ClipFormat(2, 8, 16, 16)).pixels) == 2
