"""Names that were read from files stay inside their directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import safe_child

OUTSIDE = [
    "", ".", "..", "/", "/etc/passwd",
    "//host/x", "../x", "a/../../x", "a/..", "C:\\x", "C:x", "..\\x", "a\0b",
    "\ud800", "x" * 256, "a/" + "\u00e9" * 128,
]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["a", "a/b.safetensors", "..a", "a..b", ".hidden", "./a", "\u00e9", "x" * 255]
)
def test_a_relative_name_is_inside(name: str, tmp_path: Path) -> None:
    assert safe_child(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_any_other_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a file inside"):
        safe_child(tmp_path, name)


def test_links_may_lead_out_where_files_are_only_read(tmp_path: Path) -> None:
    folder, blob = tmp_path / "snapshot", tmp_path / "blob"
    folder.mkdir()
    blob.write_text("x")
    (folder / "weights").symlink_to(blob)
    assert safe_child(folder, "weights").read_text() == "x"
    with pytest.raises(UsageError, match="not a file inside"):
        safe_child(folder, "weights", follow_links=False)
    (folder / "own").write_text("y")
    (folder / "alias").symlink_to("own")
    assert safe_child(folder, "alias", follow_links=False).read_text() == "y"
