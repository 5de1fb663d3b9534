"""Training in less memory by the plan: recomputed blocks, a base in fp8 or on the host, 8-bit moments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.model.base_storage import frozen_matrices
from anyflow_cli.plan.estimate import (
    base_bytes,
    choose_checkpointing,
    held,
    optimizer_bytes,
    plan_stage,
    target_of,
)
from anyflow_cli.plan.hardware import RESERVE, Hardware
from anyflow_cli.plan.networks import fake_backbone, role_sizes
from anyflow_cli.recipe.load import load_recipe
from tests.plan.small import CONFIG, setup

LORA = setup("flow-map", precision="bf16", config=replace(CONFIG, layers=6))


def test_a_base_on_the_host_leaves_one_block_on_the_device() -> None:
    base, away = held(LORA)["weights"], held(replace(LORA, offload=True))["weights"]
    sizes = base_bytes(LORA)
    assert sizes.whole == 6 * sizes.block
    assert base - away == 5 * sizes.block
    matrices = list(frozen_matrices(fake_backbone(LORA, 1).network_of("student")))
    assert sizes.block == sum(layer.weight.nbytes for layer in matrices)


def test_a_base_in_fp8_takes_half_of_one_in_bf16() -> None:
    stored = replace(LORA, model=LORA.model.model_copy(update={"base_weights": "fp8"}))
    full, fp8 = (role_sizes(one)["frozen base"]["bytes"] for one in (LORA, stored))
    assert full - fp8 == base_bytes(LORA).whole / 2


def test_moments_in_8_bits_take_little_more_than_a_quarter() -> None:
    assert LORA.settings is not None
    eight = LORA.settings.optimizer.model_copy(update={"states": "8bit"})
    small = replace(LORA, settings=LORA.settings.model_copy(update={"optimizer": eight}))
    assert optimizer_bytes(small) == pytest.approx(optimizer_bytes(LORA) / 4, rel=0.02)


def test_as_few_blocks_are_recomputed_as_fit() -> None:
    recipe = load_recipe("tiny", ["model.gradient_checkpointing=auto", "train_flowmap.global_batch=2"])

    def chosen(memory: int) -> Any:
        hardware = Hardware(1, memory + RESERVE, peak=1e12)
        model = choose_checkpointing(recipe, "train-flowmap", hardware).model
        return (model.gradient_checkpointing, model.checkpoint_every_n_blocks)

    assert chosen(10**12) == (False, 1)
    assert chosen(1) == (True, 1)
    every = load_recipe("tiny", ["model.gradient_checkpointing=true", "train_flowmap.global_batch=2",
                                 "model.checkpoint_every_n_blocks=3"])  # fmt: skip
    needed = plan_stage(target_of(every, Hardware(1, 10**12, peak=1e12)), "train-flowmap").peak.total
    assert chosen(needed) in [(True, 4), (True, 3)]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.base_weights=int8", "torchao"),
        ("model.base_weights=nf4", "bitsandbytes"),
        ("train_flowmap.optimizer.states=8bit", "torchao"),
        ("launch.offload=true", "without sharding"),
    ],
)
def test_a_dry_run_names_what_is_missing(
    setting: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("anyflow_cli.model.base_storage.find_spec", lambda name: None)
    assert main(["train-flowmap", "--dry-run", "--set", setting]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
