"""Video files: real clips in, previews out. ffmpeg does the work: rates and codecs are its business.

A clip from a user is fitted to the wanted frames, rate and size, and everything done to it is said; one that
cannot be used is named with its reason, never dropped in silence. ``clips.py`` finds clips and captions.

Legend: T frames, H W height and width in pixels; files hold uint8 (T, H, W, 3), models take float (T, 3, H,
W) in [0, 1].
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_cli.errors import AnyflowError
from anyflow_cli.utils.files import atomic_write

Pixels = NDArray[np.uint8]

SQUARE = "scale='if(eq(sar,1),iw,2*round(iw*sar/2))':ih"  # pixels of old cameras are not
DAMAGE = r"corrupt decoded frame|[Ee]rror while decoding[^,\n]*|Error submitting packet to decoder"
HDR = ("smpte2084", "arib-std-b67")
BT709 = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
PLAYED = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", *BT709]
PLAYED += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "14"]
SAME_BYTES = ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]


class UnusableClipError(AnyflowError):
    """One clip cannot become a sample; the message is the reason."""


@dataclass(frozen=True)
class ClipFormat:
    """What every clip has to become."""

    frames: int
    fps: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """A video that fits, (T, H, W, 3), and what had to be done to it."""

    pixels: Pixels
    changes: tuple[str, ...]


def read_clip(path: Path, wanted: ClipFormat) -> Clip:
    """Fit a video: rate by nearest frame, size by scaling and a centred crop, then the start."""
    clip = read_start(path, wanted)
    if len(clip.pixels) < wanted.frames:
        raise UnusableClipError(
            f"too short: {len(clip.pixels)} frames at {wanted.fps} fps where {wanted.frames} are needed"
        )
    return clip


def read_start(path: Path, wanted: ClipFormat) -> Clip:
    """As ``read_clip``, but a video may have fewer frames than wanted."""
    width, height = wanted.width, wanted.height
    scale = f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic"
    filters = f"fps={wanted.fps},{SQUARE},{scale},crop={width}:{height}"
    # Capital V: no cover pictures. One frame more than wanted tells whether the clip was cut.
    output = ["-map", "0:V:0", "-vf", filters, "-frames:v", str(wanted.frames + 1), "-f", "rawvideo"]
    result = ffmpeg(["-i", f"file:{path}", *output, "-pix_fmt", "rgb24", "-"])
    messages = result.stderr.decode(errors="replace")
    if "matches no streams" in messages:
        raise UnusableClipError("unreadable (there is no video in it)")
    if result.returncode or not result.stdout:
        raise UnusableClipError(f"unreadable ({last_line(messages)})")
    damage = re.search(DAMAGE, messages)
    if damage:  # ffmpeg would make up what is lost
        raise UnusableClipError(f"damaged ({damage[0]})")
    pixels = np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3)
    cut = (f"cut after {wanted.frames} frames",) if len(pixels) > wanted.frames else ()
    return Clip(pixels[: wanted.frames], (*_changes(messages, wanted), *cut))


def read_image(path: Path, wanted: ClipFormat) -> Clip:
    """A picture as a video of one frame, fitted by scaling and a centred crop."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits, which convert would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
    except (OSError, Image.DecompressionBombError) as error:
        raise UnusableClipError(f"unreadable ({error})") from error
    width, height = image.size
    fitted = ImageOps.fit(image, (wanted.width, wanted.height), Image.Resampling.BICUBIC)
    same_ratio = width * wanted.height == height * wanted.width
    how = "scaled" if same_ratio else "scaled and cropped"
    changed = (width, height) != (wanted.width, wanted.height)
    told = (f"{how} from {height}x{width} to {wanted.height}x{wanted.width}",) if changed else ()
    return Clip(np.asarray(fitted, np.uint8)[None], told)


def unreadable(path: Path) -> str | None:
    """Why a video cannot be decoded to its end, if it cannot."""
    if path.stat().st_size == 0:
        return "empty"
    whole = ["-v", "error", "-xerror", "-i", f"file:{path}", "-map", "0:v:0", "-f", "null", "-"]
    result = ffmpeg(whole)
    messages = result.stderr.decode(errors="replace")
    return last_line(messages) if result.returncode or messages.strip() else None


def write_mp4(path: Path, video: Pixels, fps: float, *, lossless: bool = False) -> None:
    """Commit a video (T, H, W, 3) as H.264 in yuv420p, which everything plays, or without loss in RGB.

    Equal pixels give equal bytes, whatever the cores.
    """
    given = raw_input(video, fps)
    kept = ["-c:v", "libx264rgb", "-pix_fmt", "rgb24", "-crf", "0"]
    options = [*(kept if lossless else PLAYED), *SAME_BYTES, "-movflags", "+faststart"]
    with atomic_write(path) as temporary:
        result = ffmpeg(["-y", *given, *options, f"file:{temporary}"], np.ascontiguousarray(video).tobytes())
        if result.returncode:
            reason = last_line(result.stderr.decode(errors="replace"))
            raise AnyflowError(
                f"ffmpeg could not write {len(video)} frames to {path}: {reason}.", "Is there space left?"
            )


def to_pixels(video: Tensor) -> Pixels:
    """(..., T, 3, H, W) in [0, 1] -> uint8 (..., T, H, W, 3)."""
    pixels: Pixels = (video.movedim(-3, -1) * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return pixels


def from_pixels(pixels: Pixels) -> Tensor:
    """Uint8 (..., T, H, W, 3) -> (..., T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).movedim(-1, -3) / 255


def _changes(messages: str, wanted: ClipFormat) -> Iterator[str]:
    """What the filters did, from ffmpeg's own description of the source."""
    stream = next((line for line in messages.splitlines() if "Video:" in line), "")
    fps = re.search(r"([\d.]+) fps", stream)
    if fps and float(fps[1]) != wanted.fps:
        yield f"resampled from {fps[1]} to {wanted.fps} fps"
    aspect = re.search(r"SAR (\d+:\d+)", stream)
    if aspect and aspect[1] != "1:1":
        yield f"pixels of {aspect[1]} made square"
    turned = re.search(r"rotation of (-?[\d.]+) degrees", messages)
    if turned:
        yield "turned upright"
    size = re.search(r"\b(\d{2,})x(\d{2,})\b", stream)
    width, height = (int(size[1]), int(size[2])) if size else (wanted.width, wanted.height)
    if turned and abs(float(turned[1])) == 90:
        width, height = height, width
    if (width, height) != (wanted.width, wanted.height):
        how = "scaled" if width * wanted.height == height * wanted.width else "scaled and cropped"
        yield f"{how} from {height}x{width} to {wanted.height}x{wanted.width}"
    if any(curve in stream for curve in HDR):
        yield "HDR colours taken as they are"


def last_line(messages: str) -> str:
    """What ffmpeg said last, which is usually why it failed."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def raw_input(video: Pixels, fps: float) -> list[str]:
    """Let ffmpeg read a video (T, H, W, 3) from its standard input."""
    height, width = video.shape[1:3]
    return f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()


def ffmpeg(arguments: list[str], given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg, ``given`` as its standard input."""
    # The exe gets a list, never a shell line, and paths carry "file:" so that no name is read as an option or
    # protocol.
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=False)
