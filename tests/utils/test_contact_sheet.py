"""Contact sheets: where the pixels of each video land, and that any label leaves a readable picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from anyflow_cli.utils.contact_sheet import (
    DARK_SHEET,
    GAP,
    LIGHT_SHEET,
    MARGIN,
    SheetColor,
    SheetRow,
    SheetVideo,
    contact_sheet,
    pick_frames,
)


def ramp(value: int, frames: int = 9, height: int = 64, width: int = 64) -> SheetVideo:
    """A clip of one colour whose green channel counts the frames."""
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[..., 0] = value
    video[..., 1] = np.arange(frames)[:, None, None]
    return video


def colours(page: Image.Image) -> set[SheetColor]:
    counted = page.getcolors(page.width * page.height)
    assert counted is not None
    return {colour for _, colour in counted if isinstance(colour, tuple) and len(colour) == 3}


def test_frames_are_evenly_spaced_with_both_ends() -> None:
    assert pick_frames(ramp(0), 3)[:, 0, 0, 1].tolist() == [0, 4, 8]
    assert pick_frames(ramp(0), 9)[:, 0, 0, 1].tolist() == list(range(9))


def test_each_chosen_frame_of_each_video_is_on_the_sheet_and_no_other() -> None:
    rows = [SheetRow("one", [ramp(200), ramp(90)]), SheetRow("two", [ramp(60), ramp(30)])]
    page = contact_sheet(rows, ["1", "4"], frames=3)
    flat = {c for c in colours(page) if c[2] == 0}
    assert flat == {(v, g, 0) for v in (200, 90, 60, 30) for g in (0, 4, 8)}


def test_small_videos_are_enlarged_by_a_whole_factor_without_smoothing() -> None:
    checker = np.zeros((1, 8, 8, 3), np.uint8)
    checker[:, ::2, 1::2] = checker[:, 1::2, ::2] = 255
    page = np.asarray(contact_sheet([SheetRow("", [checker])], [""], frames=1))
    cell = page[-MARGIN - 112 : -MARGIN, MARGIN : MARGIN + 112]
    assert np.array_equal(cell, np.kron(checker[0], np.ones((14, 14, 1), np.uint8)))


def test_large_videos_are_reduced_and_keep_their_shape() -> None:
    page = contact_sheet([SheetRow("", [ramp(200, 1, 480, 832)])], [""], frames=1)
    cell = np.asarray(page)[..., 0] == 200
    assert (cell.any(0).sum(), cell.any(1).sum()) == (240, 138)


def test_columns_stand_side_by_side_and_a_single_row_stacks_its_frames() -> None:
    page = np.asarray(contact_sheet([SheetRow("", [ramp(200), ramp(90)])], ["1", "4"], frames=2))
    first, second = (np.argwhere((page[..., 0] == value) & (page[..., 2] == 0)) for value in (200, 90))
    assert second[:, 1].min() - first[:, 1].max() == GAP + 1
    assert np.ptp(first, axis=0).tolist() == [2 * 128 + 2 - 1, 128 - 1]


@pytest.mark.parametrize(("given", "bordered"), [(0, 0), (1, 1), (4, 1), (5, 2), (9, 3)])
def test_shown_frames_that_were_given_have_a_border(given: int, bordered: int) -> None:
    page = np.asarray(contact_sheet([SheetRow("", [ramp(200)])], [""], frames=3, bordered=given))
    border = (page == LIGHT_SHEET.border).all(-1)
    marked = [(page[..., 1] == number)[..., None] & (page[..., :1] == 200) for number in (0, 4, 8)]
    assert border.sum() == bordered * (128**2 - 120**2)
    assert [int(each.sum()) for each in marked] == [(120 if i < bordered else 128) ** 2 for i in range(3)]


LABELS = ["[red]x[/red]", "../../etc", "a\nb\tc", "\N{ROCKET}" * 40, "x" * 5000, "word " * 900, ""]


@pytest.mark.parametrize("label", LABELS)
def test_any_label_leaves_a_sheet_of_bounded_size(label: str) -> None:
    page = contact_sheet([SheetRow(label, [ramp(200)])], [label], title=label, note=label, theme=DARK_SHEET)
    assert page.width < 800
    assert page.height < 600
    assert (200, 0, 0) in colours(page)


def test_more_frames_than_a_video_has_shows_each_once() -> None:
    page = contact_sheet([SheetRow("", [ramp(200, frames=2)])], [""], frames=5)
    assert {c for c in colours(page) if c[2] == 0} == {(200, 0, 0), (200, 1, 0)}


def test_a_row_that_lacks_a_video_is_refused() -> None:
    with pytest.raises(ValueError, match="2 videos"):
        contact_sheet([SheetRow("", [ramp(1)])], ["1", "4"])
