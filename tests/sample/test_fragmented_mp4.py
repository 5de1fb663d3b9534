"""A growing mp4: playable after every part, equal to one encoding, named when it is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.data.video import ClipFormat, Pixels, read_start, write_mp4
from anyflow_cli.errors import AnyflowError
from anyflow_cli.sample.fragmented_mp4 import Fragments, _boxes, _encode_alone, growing_mp4

PARTS = (1, 12, 12, 8)


@pytest.fixture(scope="module")
def video() -> Pixels:
    return render(WORLDS["shapes"].scene(3))[: sum(PARTS)]


def parts(video: Pixels) -> list[Pixels]:
    return np.split(video, np.cumsum(PARTS)[:-1])


def read(path: Path, fps: int = 16) -> Pixels:
    return read_start(path, ClipFormat(100, fps, 64, 64)).pixels


def error(a: Pixels, b: Pixels) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def test_every_part_can_be_seen_when_it_is_written_and_the_name_appears_at_the_end(
    video: Pixels, tmp_path: Path
) -> None:
    path, part = tmp_path / "clip.mp4", tmp_path / "clip.part.mp4"
    with growing_mp4(path, 16) as write:
        for i, pixels in enumerate(parts(video)):
            write(pixels)
            assert not path.exists()
            seen = read(part)
            assert len(seen) == sum(PARTS[: i + 1])
            assert error(seen, video[: len(seen)]) < 2
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert len(read(path)) == len(video)


def test_it_shows_what_one_encoding_shows(video: Pixels, tmp_path: Path) -> None:
    write_mp4(tmp_path / "whole.mp4", video, 16)
    with growing_mp4(tmp_path / "grown.mp4", 16) as write:
        for pixels in parts(video):
            write(pixels)
    whole, grown = (read(tmp_path / f"{name}.mp4") for name in ("whole", "grown"))
    assert grown.shape == whole.shape
    assert error(grown, video) < error(whole, video) + 0.5


@pytest.mark.parametrize("fps", [8, 24])
def test_frames_follow_one_another_at_the_videos_rate(video: Pixels, tmp_path: Path, fps: int) -> None:
    fragments = Fragments(fps)
    (tmp_path / "clip.mp4").write_bytes(b"".join(fragments.encode(pixels) for pixels in parts(video)))
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "clip.mp4")]
    command += ["-fps_mode", "passthrough", "-f", "framehash", "-"]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert not result.stderr
    times = [int(line.split(",")[2]) for line in result.stdout.splitlines() if not line.startswith("#")]
    assert len(times) == len(video)
    assert len(set(np.diff(times))) == 1


def test_the_head_is_that_of_every_part(video: Pixels) -> None:
    heads = [dict(_boxes(_encode_alone(pixels, 16)))[b"moov"] for pixels in parts(video)]
    assert len(set(heads)) == 1


def test_a_long_part_is_one_fragment(video: Pixels) -> None:
    long = np.concatenate([video] * 10)
    assert Fragments(16).encode(long).count(b"moof") == 1


def test_equal_pixels_give_equal_bytes(video: Pixels) -> None:
    first, second = (Fragments(16).encode(video) for _ in range(2))
    assert first == second


def test_an_error_leaves_what_can_be_played(video: Pixels, tmp_path: Path) -> None:
    def fail() -> None:
        with growing_mp4(tmp_path / "clip.mp4", 16) as write:
            write(video[:13])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["clip.part.mp4"]
    assert len(read(tmp_path / "clip.part.mp4")) == 13


def test_a_kill_leaves_what_can_be_played(tmp_path: Path) -> None:
    program = f"""
        import os, signal
        from pathlib import Path
        import numpy as np
        from anyflow_cli.sample.fragmented_mp4 import growing_mp4
        with growing_mp4(Path({str(tmp_path / "clip.mp4")!r}), 16) as write:
            write(np.zeros((5, 64, 64, 3), np.uint8))
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=os.environ, check=False)
    assert killed.returncode == -9
    assert len(read(tmp_path / "clip.part.mp4")) == 5
    assert not (tmp_path / "clip.mp4").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AnyflowError, match="Cannot write"), growing_mp4(tmp_path / "file" / "clip.mp4", 16):
        pass
