"""Renamed keys: refused with their new name in a user's recipe, translated in the record of a run."""

from pathlib import Path

import pytest

from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.load import load_recipe, load_recorded_recipe
from anyflow_cli.recipe.renamed import RENAMED, with_new_keys
from anyflow_cli.recipe.schema import Recipe

OLD = """
name: mine
model: {checkpointed_every: 2}
synthesize: {batch: 3}
train_flowmap: {batch: 8, optimiser: {warmup: 7, clip: 0.5}, alarms: {then: stop}}
distill: {budgets: [2, 4], start: there, fake_optimiser: {lr: 1.0e-3}}
finetune: {start: here}
evaluate: {batch: 2}
launch: {sharding: full, checkpoints_wait: false}
"""


def test_a_recorded_recipe_with_old_keys_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(OLD)
    recipe = load_recorded_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.checkpoint_every_n_blocks == 2
    assert (recipe.synthesize.batch_size, recipe.evaluate.batch_size) == (3, 2)
    assert recipe.train_flowmap.global_batch == 8
    assert (recipe.train_flowmap.optimizer.warmup_steps, recipe.train_flowmap.optimizer.grad_clip) == (7, 0.5)
    assert recipe.train_flowmap.alarms.action == "stop"
    assert recipe.distill.step_budgets == (2, 4)
    assert (recipe.distill.init_from, recipe.finetune.init_from) == ("there", "here")
    assert recipe.distill.fake_optimizer is not None
    assert recipe.distill.fake_optimizer.lr == 1e-3
    assert recipe.launch.async_checkpoint


def test_a_users_recipe_with_an_old_key_is_refused_with_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(OLD)
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "mine.yaml"))
    for new in (
        "model.checkpoint_every_n_blocks",
        "train_flowmap.global_batch",
        "train_flowmap.optimizer?",
        "distill.step_budgets",
        "distill.fake_optimizer?",
        "finetune.init_from",
        "launch.async_checkpoint",
    ):
        assert f"did you mean {new}" in caught.value.message


@pytest.mark.parametrize("section", sorted(RENAMED))
def test_every_new_name_is_a_key_of_recipes(section: tuple[str, ...]) -> None:
    there = Recipe(name="t").model_dump()
    there["distill"]["fake_optimizer"] = there["distill"]["optimizer"]
    for part in section:
        there = there[part]
    assert set(RENAMED[section].values()) <= there.keys()
    assert not set(RENAMED[section]) & there.keys()


def test_present_keys_stay() -> None:
    recipe = Recipe(name="t").model_dump(mode="json")
    assert with_new_keys(recipe) == recipe
