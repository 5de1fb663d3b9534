"""Opening a model: what its files do not state is taken from the recipe, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.export import export_model
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.schema import CausalSection, ModelSection, Recipe
from anyflow_cli.runs.open import describe, open_model
from tests.tiny_pipeline import make_wan_folder

RECIPE = Recipe(
    name="test", model=ModelSection(height=64, width=64, frames=17, causal=CausalSection(partition=(1, 2, 2)))
)


@pytest.fixture
def causal_folder(tmp_path: Path) -> Path:
    """A causal model that was trained with chunks of 1, 2, 2."""
    wan = make_wan_folder(tmp_path / "wan")
    network = causal_from(two_time_from(load_network(wan)), CausalConfig(partition=(1, 2, 2)))
    return save_pipeline(tmp_path / "causal", network, wan, {})


def state(folder: Path, partition: list[int] | None) -> None:
    file = folder / "transformer" / "config.json"
    content = json.loads(file.read_text())
    del content["chunk_partition"]
    file.write_text(json.dumps(content if partition is None else content | {"chunk_partition": partition}))


def test_chunks_of_the_recipe_pass_without_a_word(
    causal_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_model(str(causal_folder), RECIPE)
    assert opened.network.config.causal == CausalConfig(partition=(1, 2, 2))
    assert caplog.text == ""


def test_a_folder_without_chunks_takes_those_of_the_recipe_and_says_so(
    causal_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state(causal_folder, None)
    info = describe(str(causal_folder), RECIPE)
    opened = open_model(str(causal_folder), RECIPE)
    assert info.causal == opened.network.config.causal == CausalConfig(partition=(1, 2, 2))
    assert caplog.text.count("states no chunk_partition; the recipe's is used: 1, 2, 2") == 1
    made = export_model(str(causal_folder), RECIPE, "diffusers", tmp_path / "out")
    assert "chunk_partition" not in json.loads((made / "transformer" / "config.json").read_text())


def test_a_folder_that_was_trained_with_other_chunks_is_refused(causal_folder: Path) -> None:
    state(causal_folder, [1, 1, 1, 2])
    with pytest.raises(UsageError, match="trained with chunks of 1, 1, 1, 2") as error:
        open_model(str(causal_folder), RECIPE)
    assert "--set 'model.causal.partition=[1, 1, 1, 2]'" in str(error.value.hint)
