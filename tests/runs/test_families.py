"""The recipe of a model, found by its address, its run or the sizes of its network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.families import family_recipe
from tests.tiny_pipeline import sizes


@pytest.mark.parametrize(
    ("address", "recipe"),
    [
        ("tiny-anyflow", "tiny"),
        ("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "bidirectional1b"),
        ("nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers", "causal14b"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "bidirectional5b"),
        ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", "i2v14b"),
        ("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers", "flf2v14b"),
        ("someone/unknown", None),
        ("no/where/at/all", None),
    ],
)
def test_an_address_names_its_family(address: str, recipe: str | None) -> None:
    assert family_recipe(address) == recipe


def test_every_known_model_has_a_recipe_of_its_kind() -> None:
    for address, known in KNOWN_MODELS.items():
        recipe = load_recipe(str(family_recipe(address)))
        assert (recipe.model.causal is not None) == (known.network.causal is not None)
        between = known.network.image_tokens is not None  # a first and a last frame
        size = (704, 1280) if known.network.out_channels == 48 else (720, 1280) if between else (480, 832)
        assert recipe.model.needs_pictures == (known.network.in_channels != known.network.out_channels)
        assert (recipe.model.height, recipe.model.width, recipe.model.max_text_tokens) == (*size, 512)
        assert recipe.model.vae_scale == known.vae.get("scale_factor_spatial", 8)


def test_a_folder_is_recognized_by_its_sizes_and_a_run_by_its_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model" / "transformer"
    folder.mkdir(parents=True)
    config = sizes(num_attention_heads=12, attention_head_dim=128, num_layers=30, ffn_dim=8960)
    content = {"_class_name": "WanTransformer3DModel", **config, "in_channels": 16, "text_dim": 4096}
    (folder / "config.json").write_text(json.dumps(content))
    assert family_recipe(str(folder)) in ("bidirectional1b", None)  # None where weights must be there
    (tmp_path / "run" / "recipe.yaml").write_text("extends: tiny\n")
    (folder.parent / "model_index.json").write_text("{}")
    assert family_recipe(str(folder.parent)) == str(tmp_path / "run" / "recipe.yaml")
