"""Writing recipes out, and telling them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from anyflow_cli.recipe.compare import differing_keys, digest, dump, flat
from anyflow_cli.recipe.errors import dotted, known_keys
from anyflow_cli.recipe.load import load_recipe, recipe_names


@pytest.mark.parametrize("name", recipe_names())
def test_a_dumped_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["distill.optimizer.lr=1e-7", "model.negative_prompt='no: \"#blur\"\n'"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_a_dump_means_the_same_to_a_reader_of_yaml_1_1() -> None:
    recipe = load_recipe("tiny", ["distill.optimizer.lr=1e-7", "model.negative_prompt=on"])
    content = yaml.safe_load(dump(recipe))
    assert content["distill"]["optimizer"]["lr"] == 1e-7
    assert content["model"]["negative_prompt"] == "on"


def test_flat_keys_are_those_that_set_takes() -> None:
    recipe = load_recipe("tiny", ["model.lora.rank=4"])
    assert set(flat(recipe)) <= {dotted(key) for key in known_keys()}
    assert flat(recipe)["model.lora.rank"] == 4


def test_differing_keys_name_values_and_sections_that_came_or_went() -> None:
    a = load_recipe("tiny")
    b = load_recipe("tiny", ["distill.steps=1", "sample.nfe=[7]", "model.lora.rank=4"])
    assert differing_keys(a, a) == []
    assert set(differing_keys(a, b)) == {
        "model.lora", "model.lora.rank", "model.lora.alpha", "distill.steps", "sample.nfe",
    }  # fmt: skip
    assert differing_keys(a, b, sections=["distill", "data"]) == ["distill.steps"]


def test_the_digest_sees_every_value_but_the_description() -> None:
    recipe = load_recipe("tiny")
    assert digest(recipe) == digest(load_recipe("tiny", ["description=other words"]))
    assert digest(recipe) != digest(load_recipe("tiny", ["evaluate.seed=1"]))
    assert digest(recipe) != digest(load_recipe("tiny", ["name=other"]))
