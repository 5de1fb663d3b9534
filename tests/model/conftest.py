"""Folders and networks that several tests of this room share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_pipeline import make_wan_folder


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan pipeline folder. Tests must not write into it."""
    return make_wan_folder(tmp_path_factory.mktemp("pipelines") / "wan")
