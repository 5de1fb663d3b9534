"""What several of the verbs' tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from anyflow_cli.recipe.compare import dump
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import make_data, make_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's file, with a teacher and a data set of its own beside it."""
    directory = tmp_path_factory.mktemp("recipe")
    teacher, data = make_wan_folder(directory / "wan"), make_data(directory / "data")
    path = directory / "test.yaml"
    path.write_text(dump(make_recipe(teacher, data)))
    return path
