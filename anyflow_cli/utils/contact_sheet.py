"""Contact sheets: a grid of videos as one picture, readable in a README.

Columns are what is compared (step counts, models), rows what they share (a prompt, a seed). Each cell shows
a few frames of its video, first and last included: side by side, or stacked where a single row would make the
sheet too flat. Small videos are enlarged by whole factors without smoothing, so the sheet shows their own
pixels. Arrays in, a picture out: nothing here reads files or models.

Legend: a video is uint8 (T, H, W, 3).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SheetVideo = NDArray[np.uint8]
SheetColor = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

FRAME_SIDE = (112, 240)  # longer side of a frame, in pixels: enlarged to the first, reduced to the second
MARGIN, GAP, SEAM = 24, 16, 2  # around the sheet, between cells, between the frames of a cell
BORDER = 4  # width of the line inside a bordered frame
TITLE, LABEL, NOTE = 20, 15, 12  # font sizes


@dataclass(frozen=True)
class SheetTheme:
    """Colors of a sheet, neutral so that they do not shift how the videos' colors look."""

    paper: SheetColor
    ink: SheetColor
    faint: SheetColor
    border: SheetColor


LIGHT_SHEET = SheetTheme(paper=(250, 250, 249), ink=(34, 34, 38), faint=(120, 120, 126), border=(226, 0, 122))
DARK_SHEET = SheetTheme(paper=(24, 25, 28), ink=(232, 232, 234), faint=(150, 151, 158), border=(255, 92, 172))


@dataclass(frozen=True)
class SheetRow:
    """One row: what its videos share, and one video per column."""

    label: str
    videos: Sequence[SheetVideo]


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels, the same for every cell."""

    frame: tuple[int, int]
    frames: int
    stacked: bool
    bordered: int

    @property
    def cell(self) -> tuple[int, int]:
        width, height = self.frame
        run = self.frames - 1
        if self.stacked:
            return width, height * self.frames + SEAM * run
        return width * self.frames + SEAM * run, height

    def corner(self, index: int) -> tuple[int, int]:
        """Upper left corner of frame ``index`` inside its cell."""
        width, height = self.frame
        return (0, index * (height + SEAM)) if self.stacked else (index * (width + SEAM), 0)


def contact_sheet(
    rows: Sequence[SheetRow],
    columns: Sequence[str],
    *,
    title: str = "",
    note: str = "",
    frames: int | None = None,
    stacked: bool | None = None,
    bordered: int = 0,
    theme: SheetTheme = LIGHT_SHEET,
) -> Image.Image:
    """Draw a contact sheet.

    Args:
        rows: Labels and videos, one video per column.
        columns: Headings.
        title: Text above the rows.
        note: Text below the rows.
        frames: Frames shown per video; by default five, or three where the sheet would become too wide.
        stacked: Show the frames of a video one below the other; the default for a single row.
        bordered: First frames of each video that get a colored border, as far as they are shown.
        theme: Colors.
    """
    if not rows or any(len(row.videos) != len(columns) for row in rows):
        raise ValueError(f"a contact sheet needs rows of {len(columns)} videos each, one per column")
    geometry = _geometry(rows, len(columns), frames, stacked, bordered)
    width, height = geometry.cell
    body = max(len(columns) * (width + GAP) - GAP, 360)
    page = Image.new("RGB", (body + 2 * MARGIN, _height(rows, title, note, body, height)), theme.paper)
    draw = ImageDraw.Draw(page)
    y = _text(draw, MARGIN, title, body, TITLE, theme.ink, after=GAP // 2)
    for row in rows:
        y = _text(draw, y, row.label, body, LABEL, theme.ink, after=4)
        for index, column in enumerate(columns):
            x = MARGIN + index * (width + GAP)
            draw.text((x, y), _fit(column, width, NOTE), fill=theme.faint, font=_font(NOTE))
            _paste(draw, page, row.videos[index], geometry, (x, y + _line(NOTE)), theme)
        y += _line(NOTE) + height + GAP
    _text(draw, y, note, body, NOTE, theme.faint, after=0)
    return page


def pick_frames(video: SheetVideo, count: int) -> SheetVideo:
    """Take evenly spaced frames, both ends included: (T, H, W, 3) -> (count, H, W, 3)."""
    return np.take(video, spaced_frames(len(video), count), axis=0)


def spaced_frames(frames: int, count: int) -> list[int]:
    """Numbers of ``count`` evenly spaced frames out of ``frames``, both ends included."""
    numbers: list[int] = np.linspace(0, frames - 1, count).round().astype(int).tolist()
    return numbers


def _geometry(
    rows: Sequence[SheetRow], columns: int, frames: int | None, stacked: bool | None, bordered: int
) -> _Geometry:
    frame = _frame_size(rows[0].videos[0])
    stacked = len(rows) == 1 and columns > 1 if stacked is None else stacked
    wanted = frames or (5 if stacked or columns * 5 * frame[0] <= 1800 else 3)
    shown = min(wanted, min(len(video) for row in rows for video in row.videos))
    return _Geometry(frame, shown, stacked, bordered)


def _frame_size(video: SheetVideo) -> tuple[int, int]:
    """(width, height) of a frame on the sheet: enlarged by a whole factor, or reduced by any."""
    height, width = video.shape[1:3]
    smallest, largest = FRAME_SIDE
    longest = max(height, width)
    if longest > largest:
        return max(1, round(width * largest / longest)), max(1, round(height * largest / longest))
    factor = max(1, -(-smallest // longest))
    return width * factor, height * factor


def _paste(
    draw: ImageDraw.ImageDraw,
    page: Image.Image,
    video: SheetVideo,
    geometry: _Geometry,
    at: tuple[int, int],
    theme: SheetTheme,
) -> None:
    width, height = geometry.frame
    for index, number in enumerate(spaced_frames(len(video), geometry.frames)):
        frame = video[number]
        filter_ = Image.Resampling.NEAREST if frame.shape[1] <= width else Image.Resampling.LANCZOS
        left, top = (a + b for a, b in zip(at, geometry.corner(index), strict=True))
        page.paste(Image.fromarray(frame).resize(geometry.frame, filter_), (left, top))
        if number < geometry.bordered:
            box = (left, top, left + width - 1, top + height - 1)
            draw.rectangle(box, outline=theme.border, width=BORDER)


def _height(rows: Sequence[SheetRow], title: str, note: str, body: int, cell: int) -> int:
    labels = sum(len(_wrap(row.label, body, LABEL)) * _line(LABEL) + 4 * bool(row.label) for row in rows)
    titles = len(_wrap(title, body, TITLE)) * _line(TITLE) + GAP // 2 * bool(title)
    notes = len(_wrap(note, body, NOTE)) * _line(NOTE)
    grid = len(rows) * (_line(NOTE) + cell + GAP) - (0 if note else GAP)
    return 2 * MARGIN + titles + labels + grid + notes


def _text(
    draw: ImageDraw.ImageDraw, y: int, text: str, width: int, size: int, fill: SheetColor, *, after: int
) -> int:
    """Write wrapped lines from ``y`` on; return the y below them."""
    for line in _wrap(text, width, size):
        draw.text((MARGIN, y), line, fill=fill, font=_font(size))
        y += _line(size)
    return y + after * bool(text)


def _wrap(text: str, width: int, size: int, limit: int = 3) -> list[str]:
    """Split a text of any length into at most ``limit`` lines, none wider than ``width``."""
    lines: list[str] = []
    for word in "".join(c if c.isprintable() else " " for c in text[:1000]).split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    kept = [_fit(line, width, size) for line in lines[:limit]]
    if len(lines) > limit:
        kept[-1] = _fit(kept[-1] + " ...", width, size)
    return kept


def _fit(text: str, width: int, size: int) -> str:
    """Truncate one line to ``width`` pixels, with an ellipsis."""
    if _width(text, size) <= width:
        return text
    longest = bisect_left(range(len(text)), True, key=lambda n: _width(text[:n] + "...", size) > width) - 1
    return text[: max(longest, 0)] + "..."


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(text)


def _line(size: int) -> int:
    return round(size * 1.45)
