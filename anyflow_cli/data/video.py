"""Video and picture files: decoded to pixels of a wanted shape, encoded from pixels. ffmpeg does the work.

A clip is converted to the wanted frames, rate and size, and ``Clip.changes`` says everything that was done to
it; one that cannot be used raises ``UnusableClipError`` with the reason. Files are hostile until proven
otherwise: ffmpeg opens nothing but local files, in container formats that refer to no other file.
``clips.py`` finds clips and their captions.

Legend: T frames, H W height and width in pixels; files hold uint8 (T, H, W, 3), models take float (T, 3, H,
W) in [0, 1].
"""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.utils.files import atomic_write

Pixels = NDArray[np.uint8]

# Demuxers that read videos and never another file: no playlists (concat, hls, dash), no numbered pictures.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,apng,webp_anim,jpegxl_anim,mpeg,mpegts,mpegvideo,asf,asf_o,"
    "flv,live_flv,kux,ogg,mxf,gxf,dv,yuv4mpegpipe,rm,nut,nsv,nuv,ivf,obu,av1,h261,h263,h264,hevc,vvc,m4v,vc1,"
    "mjpeg,smjpeg,mpjpeg,wtv,ty,lxf,r3d,mlv,dhav,flic,film_cpk,roq,smk,bink,avs2,avs3,dirac,dnxhd,cavsvideo"
)
SANDBOX = ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS]
MAX_FRAME = 1 << 27  # pixels; 8K has 2^25
DECODE_SECONDS = 600.0  # for the first frames of one clip

SQUARE_PIXELS = "scale='if(eq(sar,1),iw,2*round(iw*sar/2))':ih"
DAMAGE = r"corrupt decoded frame|[Ee]rror while decoding[^,\n]*|Error submitting packet to decoder"
STREAM = (
    r"Stream #0:\d+.*?: Video: (?P<codec>\w+).*?, (?P<pixels>\w+)(?:\((?P<tags>[^)]*)\))?, "
    r"(?P<width>\d+)x(?P<height>\d+)"
)
ALPHA = r"yuva|rgba|bgra|argb|abgr|gbrap|ya8|ya16|pal8"
HDR_CURVES = {"smpte2084": "PQ", "arib-std-b67": "HLG"}
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # ffmpeg's own drop the alpha plane
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # tag of Exif, and its values for pictures on their side
BACKGROUND = 255  # white, below transparent parts
GIF_CLOCK = 100  # ticks per second

BT709 = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709"]
H264 = ["-vf", "scale=out_color_matrix=bt709:out_range=tv", *BT709]
H264 += ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "14"]
LOSSLESS = ["-c:v", "libx264rgb", "-pix_fmt", "rgb24", "-crf", "0"]
BITEXACT = ["-threads", "1", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
FFMPEG_HINT = (
    "Unset IMAGEIO_FFMPEG_EXE or point it to a working ffmpeg with libx264, or reinstall imageio-ffmpeg."
)


class UnusableClipError(AnyflowError):
    """A clip cannot become a sample; the message is the reason."""


@dataclass(frozen=True)
class ClipFormat:
    """Frames, rate and size that every clip is converted to."""

    frames: int
    fps: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """A converted video, (T, H, W, 3), and what was done to it."""

    pixels: Pixels
    changes: tuple[str, ...]


@dataclass(frozen=True)
class VideoStream:
    """The first video stream of a file, as ffmpeg describes it.

    Attributes:
        description: ffmpeg's lines about the stream.
        container: Name of the demuxer.
        codec: Name of the codec.
        pixel_format: ffmpeg's name of the pixel format.
        tags: Range, colors and field order, as far as the file states them.
        height: Height in pixels, as stored.
        width: Width in pixels, as stored.
        seconds: Duration; None where the file does not state it.
    """

    description: str
    container: str
    codec: str
    pixel_format: str
    tags: str
    height: int
    width: int
    seconds: float | None

    @property
    def fps(self) -> str | None:
        """Mean frame rate as ffmpeg writes it."""
        found = re.search(r"([\d.]+k?) fps", self.description)
        return found and found[1]

    @property
    def is_interlaced(self) -> bool:
        """Whether frames consist of two fields."""
        return bool(re.search(r"(top|bottom) (coded )?first", self.tags))

    @property
    def has_alpha(self) -> bool:
        """Whether pixels have an alpha channel."""
        return bool(re.match(ALPHA, self.pixel_format)) or self.has_alpha_layer

    @property
    def has_alpha_layer(self) -> bool:
        """Whether alpha is stored beside the stream, as in WebM."""
        return self.codec in ALPHA_DECODERS and bool(re.search(r"alpha_mode\s*: 1", self.description))

    @property
    def is_untagged_hd(self) -> bool:
        """Whether colors are those of BT.709 without a tag that says so."""
        is_tagged = any(
            name in self.tags for name in ("bt709", "bt470", "smpte", "bt2020", "fcc", "gbr", "ycgco")
        )
        return "yuv" in self.pixel_format and not is_tagged and (self.height >= 720 or self.width >= 1280)

    @property
    def hdr_curve(self) -> str | None:
        """Name of the HDR transfer curve; None for SDR."""
        return next((name for name in HDR_CURVES if name in self.tags), None)

    @property
    def rotation(self) -> float:
        """Degrees by which players turn the stored frames."""
        turned = re.search(r"rotation of (-?[\d.]+) degrees", self.description)
        return float(turned[1]) if turned else 0.0

    @property
    def shown_size(self) -> tuple[int, int]:
        """Height and width as players show it: upright, with square pixels."""
        height, width = self.height, self.width
        if aspect := re.search(r"SAR (\d+):(\d+)", self.description):
            width = max(round(width * int(aspect[1]) / max(int(aspect[2]), 1)), 1)
        return (width, height) if abs(self.rotation) == 90 else (height, width)

    def plays_one_to_one(self, fps: int) -> bool:
        """Whether the rate is ``fps`` as closely as a GIF can state it."""
        if self.container != "gif" or self.fps is None or f"{self.fps} tbr" not in self.description:
            return False
        own = float(self.fps.rstrip("k"))
        return own > 0 and own != fps and round(GIF_CLOCK / own) == round(GIF_CLOCK / fps)


def probe(path: Path) -> VideoStream:
    """Read the header of a video file.

    Raises:
        UnusableClipError: It is not a video, or ffmpeg cannot open it.
    """
    _require_regular_file(path)
    result = ffmpeg([*SANDBOX, "-i", f"file:{path}"], seconds=DECODE_SECONDS)
    messages = result.stderr.decode(errors="replace")
    found = [line for line in re.split(r"(?=  Stream #0:\d)", messages) if "attached pic" not in line]
    streams = [(match, part) for part in found if (match := re.search(STREAM, part))]
    container = re.search(r"Input #0, (.+), from ", messages)
    if not streams or container is None:
        require_ffmpeg()  # otherwise its own failure would be blamed on the clip
        raise UnusableClipError(f"unreadable ({_reason(messages, is_open=container is not None)})")
    match, description = streams[0]
    length = re.search(r"Duration: (\d+):(\d+):([\d.]+)", messages)
    seconds = 3600 * int(length[1]) + 60 * int(length[2]) + float(length[3]) if length else None
    return VideoStream(
        description, container[1], match["codec"], match["pixels"], match["tags"] or "",
        int(match["height"]), int(match["width"]), seconds,
    )  # fmt: skip


def _require_regular_file(path: Path) -> None:
    """Refuse pipes, whose reading never ends, and devices."""
    if not path.is_file():
        raise UnusableClipError("unreadable (it is not a regular file)")


def _reason(messages: str, *, is_open: bool) -> str:
    if "not on whitelist" in messages:
        return "it is a playlist, a picture or another format without frames of its own"
    if is_open:
        return "it has no video stream"
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def read_clip(path: Path, wanted: ClipFormat, start: int = 0) -> Clip:
    """Convert a part of a video: rate by nearest frame, size by scaling and a centered crop.

    Args:
        path: The video.
        wanted: Frames, rate and size.
        start: First frame, at the wanted rate.

    Raises:
        UnusableClipError: The file is unreadable, damaged, or has too few frames.
    """
    clip = read_start(path, wanted, start)
    if len(clip.pixels) < wanted.frames:
        count = len(clip.pixels)
        rates = [change for change in clip.changes if "fps" in change]
        raise UnusableClipError(
            f"too short: {count} frames at {wanted.fps} fps where {wanted.frames} are needed"
            + (f" ({rates[0]})" if rates else "")
        )
    return clip


def read_start(path: Path, wanted: ClipFormat, start: int = 0) -> Clip:
    """Convert like ``read_clip``, but accept a video with fewer frames than wanted."""
    stream = probe(path)
    decoder = ["-c:v", ALPHA_DECODERS[stream.codec]] if stream.has_alpha_layer else []
    channels = 4 if stream.has_alpha else 3
    # Capital V: no cover pictures. One frame more than wanted tells whether the video goes on.
    output = ["-map", "0:V:0", "-vf", ",".join(_filters(stream, wanted)), "-frames:v", str(wanted.frames + 1)]
    output += ["-f", "rawvideo", "-pix_fmt", "rgba" if stream.has_alpha else "rgb24", "-"]
    limit = ["-max_pixels", str(MAX_FRAME)]
    if start:  # half a frame early, since times are rounded
        decoder += ["-ss", f"{(start - 0.5) / wanted.fps:.6f}"]
    result = ffmpeg([*SANDBOX, *limit, *decoder, "-i", f"file:{path}", *output], seconds=DECODE_SECONDS)
    messages = result.stderr.decode(errors="replace")
    if result.returncode or not result.stdout:
        require_ffmpeg()
        if stream.hdr_curve and "No such filter" in messages:
            raise UnusableClipError(
                f"HDR ({HDR_CURVES[stream.hdr_curve]}), which needs an ffmpeg with zscale"
            )
        raise UnusableClipError(f"unreadable ({last_line(result)})")
    damage = re.search(DAMAGE, messages)
    if damage:  # ffmpeg would conceal what is lost
        raise UnusableClipError(f"damaged ({damage[0]})")
    pixels = np.frombuffer(result.stdout, np.uint8).reshape(-1, wanted.height, wanted.width, channels)
    changes = list(
        _changes(stream, wanted, is_whole=start == 0 and len(pixels) <= wanted.frames, start=start)
    )
    if stream.has_alpha:
        if pixels[..., 3].min() < 255:
            changes.append("transparent parts on white")
        pixels = np.minimum(pixels[..., :3] + (BACKGROUND - pixels[..., 3:].astype(np.uint16)), 255)
    return Clip(pixels[: wanted.frames].astype(np.uint8), tuple(changes))


def _filters(stream: VideoStream, wanted: ClipFormat) -> Iterator[str]:
    """Ffmpeg's filters that convert a stream, in order."""
    if stream.is_interlaced:
        yield "bwdif=mode=send_frame"
    if stream.plays_one_to_one(wanted.fps):
        yield f"setpts=N/({wanted.fps}*TB)"
    yield f"fps={wanted.fps}"
    if stream.is_untagged_hd:
        yield "setparams=colorspace=bt709"
    if stream.hdr_curve:
        yield f"zscale=pin=bt2020:tin={stream.hdr_curve}:min=bt2020nc:t=linear:npl=100"
        yield "format=gbrpf32le,zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709,format=gbrp"
    if stream.has_alpha:  # scaling must not mix in the colors of transparent pixels
        yield "format=gbrap,premultiply=inplace=1"
    width, height = wanted.width, wanted.height
    yield SQUARE_PIXELS
    yield f"scale={width}:{height}:force_original_aspect_ratio=increase:flags=bicubic"
    yield f"crop={width}:{height}"


def _changes(stream: VideoStream, wanted: ClipFormat, *, is_whole: bool, start: int) -> Iterator[str]:
    """What the filters did to a stream, in words."""
    if stream.is_interlaced:
        yield "deinterlaced"
    if stream.plays_one_to_one(wanted.fps):
        yield f"played at {wanted.fps} instead of {stream.fps} fps"
    elif stream.fps and (stream.fps.endswith("k") or float(stream.fps) != wanted.fps):
        yield f"resampled from {stream.fps} to {wanted.fps} fps"
    if stream.is_untagged_hd:
        yield "colors taken as BT.709"
    if stream.hdr_curve:
        yield f"HDR ({HDR_CURVES[stream.hdr_curve]}) tone-mapped"
    aspect = re.search(r"SAR (\d+:\d+)", stream.description)
    if aspect and aspect[1] != "1:1":
        yield f"pixels of {aspect[1]} made square"
    if stream.rotation:
        yield "turned upright"
    width, height = stream.width, stream.height
    if abs(stream.rotation) == 90:
        width, height = height, width
    if (width, height) != (wanted.width, wanted.height):
        how = "scaled" if width * wanted.height == height * wanted.width else "scaled and cropped"
        yield f"{how} from {height}x{width} to {wanted.height}x{wanted.width}"
    if not is_whole:
        used = wanted.frames / wanted.fps
        share = f" ({used / stream.seconds:.0%} of {stream.seconds:.1f} s)" if stream.seconds else ""
        part = f"frames from {start} on" if start else f"first {wanted.frames} frames"
        yield f"{part} used{share}"


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, upright; an UnusableClipError if it is not one."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            turned = opened.getexif().get(ORIENTATION, 1) in TURNED
            return (opened.width, opened.height) if turned else (opened.height, opened.width)
    except Exception as error:  # a decoder of foreign bytes can raise anything
        raise UnusableClipError(f"unreadable ({error or type(error).__name__})") from error


def read_image(path: Path, wanted: ClipFormat) -> Clip:
    """Read a picture as a video of one frame, by scaling and a centered crop; transparent parts turn white.

    Raises:
        UnusableClipError: The file is not a picture, damaged, or too large to decode.
    """
    from PIL import Image, ImageOps

    _require_regular_file(path)
    changes = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits, which convert would clip at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                changes.append("transparent parts on white")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (BACKGROUND,) * 4), image)
        image = image.convert("RGB")
    except Exception as error:  # a decoder of foreign bytes can raise anything
        raise UnusableClipError(f"unreadable ({error or type(error).__name__})") from error
    width, height = image.size
    fitted = ImageOps.fit(image, (wanted.width, wanted.height), Image.Resampling.BICUBIC)
    if (width, height) != (wanted.width, wanted.height):
        how = "scaled" if width * wanted.height == height * wanted.width else "scaled and cropped"
        changes.append(f"{how} from {height}x{width} to {wanted.height}x{wanted.width}")
    return Clip(np.asarray(fitted, np.uint8)[None], tuple(changes))


def decoding_error(path: Path) -> str | None:
    """Why a video cannot be decoded to its end; None if it can."""
    if not path.is_file():
        return "not a regular file"
    if path.stat().st_size == 0:
        return "empty"
    end = ["-map", "0:v:0", "-f", "null", "-"]
    result = ffmpeg([*SANDBOX, "-v", "error", "-xerror", "-i", f"file:{path}", *end])
    if result.returncode or result.stderr.strip():
        require_ffmpeg()
        return last_line(result)
    return None


def write_mp4(path: Path, video: Pixels, fps: float, *, lossless: bool = False) -> None:
    """Write a video (T, H, W, 3) atomically, as H.264 in yuv420p, which all players read, or lossless in RGB.

    Equal pixels give equal bytes, on any number of cores.
    """
    options = [*(LOSSLESS if lossless else H264), *BITEXACT, "-movflags", "+faststart"]
    with atomic_write(path) as temporary:
        arguments = ["-y", *raw_video_input(video, fps), *options, f"file:{temporary}"]
        result = ffmpeg(arguments, np.ascontiguousarray(video).tobytes())
        if result.returncode or not temporary.exists():
            require_ffmpeg()
            raise AnyflowError(
                f"ffmpeg could not write {len(video)} frames to {path}: {last_line(result)}.",
                "Check the free space there.",
            )


def to_pixels(video: Tensor) -> Pixels:
    """(..., T, 3, H, W) in [0, 1] -> uint8 (..., T, H, W, 3)."""
    pixels: Pixels = (video.movedim(-3, -1) * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
    return pixels


def from_pixels(pixels: Pixels) -> Tensor:
    """Uint8 (..., T, H, W, 3) -> (..., T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).movedim(-1, -3) / 255


# --- ffmpeg


def require_ffmpeg() -> None:
    """Refuse to go on where ffmpeg is missing, fails, or has no H.264 encoder; takes a few milliseconds."""
    frame = np.zeros((1, 16, 16, 3), np.uint8)
    options = [*H264, "-movflags", "+empty_moov", "-f", "mp4", "-"]
    result = ffmpeg([*raw_video_input(frame, 1), *options], frame.tobytes())
    if result.returncode or not result.stdout:
        raise UsageError(f"ffmpeg does not work ({result.args[0]}): {last_line(result)}.", FFMPEG_HINT)


def ffmpeg(
    arguments: list[str], stdin: bytes | None = None, seconds: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg.

    Args:
        arguments: Its arguments; paths start with "file:", so that no name is read as an option or protocol.
        stdin: Its standard input.
        seconds: Time limit.

    Raises:
        UsageError: ffmpeg cannot be started.
        UnusableClipError: It took longer than the time limit.
    """
    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
        command = [exe, "-hide_banner", "-nostdin", *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=seconds)
    except (OSError, RuntimeError, ValueError) as error:  # imageio-ffmpeg raises RuntimeError
        raise UsageError(f"ffmpeg cannot be started: {error}.", FFMPEG_HINT) from error
    except subprocess.TimeoutExpired:
        raise UnusableClipError(f"decoding took longer than {seconds:g} s") from None


def raw_video_input(video: Pixels, fps: float) -> list[str]:
    """Arguments that let ffmpeg read a video (T, H, W, 3) from its standard input."""
    height, width = video.shape[1:3]
    return f"-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r {fps} -i -".split()


def last_line(result: subprocess.CompletedProcess[bytes]) -> str:
    """The last message of ffmpeg, which usually says why it failed."""
    lines = result.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {result.returncode}, no message"
