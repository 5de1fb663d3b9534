"""Which settings are advised: the mildest that do, none that are not needed."""

from __future__ import annotations

import pytest

from anyflow_cli.plan.advice import Advice, advise, kinds_of_change
from anyflow_cli.plan.hardware import Hardware, parse_hardware
from anyflow_cli.recipe import schema
from anyflow_cli.recipe.compare import with_values


def recipe(**model: object) -> schema.Recipe:
    teacher = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    own = schema.ModelSection.model_validate({"teacher": teacher, "lora": schema.LoraSection(), **model})
    return schema.Recipe(name="t", model=own, distill=schema.DistillSection(global_batch=8, micro_batch=4))


def cost(recipe: schema.Recipe) -> int:
    """A made-up peak: a known sum of the recipe's settings."""
    model, settings = recipe.model, recipe.distill
    total = model.frames * (1 if model.gradient_checkpointing else 10) * (settings.micro_batch or 1)
    return total + (model.lora.rank if model.lora else 10_000)


def advice(limit: int, **model: object) -> Advice:
    return advise(cost, "distill", recipe(**model), Hardware(8, limit, None, is_gpu=False), limit)


def said(found: Advice) -> str:
    return " ".join(str(change) for change in found.changes)


@pytest.mark.parametrize(
    ("limit", "settings", "needs"),
    [
        (600, "--set model.gradient_checkpointing=true", 4 * 81 + 256),
        (420, "--set model.gradient_checkpointing=true --set distill.micro_batch=2", 2 * 81 + 256),
        (
            170,
            "--set model.gradient_checkpointing=true --set distill.micro_batch=1 "
            "--set model.lora.rank=64 --set model.lora.alpha=64",
            81 + 64,
        ),
    ],
)
def test_the_mildest_settings_that_fit(limit: int, settings: str, needs: int) -> None:
    found = advice(limit)
    assert (said(found), found.fits, found.peak) == (settings, True, needs)


def test_shorter_videos_come_last_and_let_milder_ranks_back_in() -> None:
    found = advice(82, gradient_checkpointing=True)
    assert said(found).endswith("--set model.frames=49")
    assert "model.lora.rank=32" in said(found)  # 16 is not needed once videos are shorter
    assert found.peak == 49 + 32


def test_the_least_is_told_where_nothing_fits() -> None:
    found = advice(10)
    assert not found.fits
    assert found.peak == 17 + 16


def test_whole_weights_may_become_adapters() -> None:
    found = advice(400, lora=None, gradient_checkpointing=True)
    assert "--set model.lora.rank=256" in said(found)
    assert found.fits


def test_a_change_is_checked_and_leaves_the_rest() -> None:
    (kind, *_) = kinds_of_change("distill", recipe(), parse_hardware("8x80GB"))
    after = with_values(recipe(), kind[0].values)
    assert after.model.gradient_checkpointing
    assert after.model.model_copy(update={"gradient_checkpointing": False}) == recipe().model
    assert after.distill == recipe().distill


def test_sampling_takes_fewer_at_once() -> None:
    wanted = recipe().model_copy(update={"sample": schema.SampleSection(batch_size=4)})
    (kind, *_) = kinds_of_change("sample", wanted, parse_hardware("8x80GB"))
    sizes = [change.values["sample.batch_size"] for change in kind]
    assert sizes == [2, 1]


def kinds(given: schema.Recipe, gpus: str) -> list[str]:
    return [str(kind[-1]) for kind in kinds_of_change("distill", given, parse_hardware(gpus))]


def test_what_costs_time_alone_comes_before_what_changes_the_model() -> None:
    found = " ".join(kinds(recipe(), "8x80GB"))
    order = ("recompute_rollout", "sharding=full", "offload=true", "micro_batch", "lora.rank", "frames")
    places = [found.index(word) for word in order]
    assert places == sorted(places)


def test_one_gpu_can_offload_and_not_divide() -> None:
    for lora, settings in (
        (None, "--set launch.sharding=full --set launch.offload=true"),
        (schema.LoraSection(), "--set launch.offload=true"),  # of a frozen base, which needs no sharding
    ):
        found = kinds_of_change("distill", recipe(lora=lora), parse_hardware("1x80GB"))
        (offload,) = (kind for kind in found if "launch.offload" in str(kind[0]))
        assert [str(change) for change in offload] == [settings]
    unguided = recipe().model_copy(
        update={"distill": schema.DistillSection(flow_map=schema.FlowMapSection(guidance=1.0))}
    )
    assert "launch" not in " ".join(kinds(unguided, "8x80GB"))


def test_chunks_of_a_causal_model_are_left_as_they_are() -> None:
    assert "model.frames" not in " ".join(kinds(recipe(causal=schema.CausalSection()), "8x80GB"))
