"""Stages of a recipe: what they are made of, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.plan import stages
from anyflow_cli.plan.estimate import chain_of
from anyflow_cli.plan.hardware import Hardware, parse_hardware
from anyflow_cli.plan.sampling import FRAMES, _decoding, decoding, sampling_of
from anyflow_cli.plan.setup import Kind
from anyflow_cli.plan.stages import Target, target_of
from anyflow_cli.plan.steps import BASE, RoleSize, roles_of
from anyflow_cli.recipe import schema
from anyflow_cli.utils.units import GIB
from tests.plan.small import Live
from tests.tiny_pipeline import make_wan_folder

CPU = Hardware(1, 8 * GIB, peak=1e12, utilisation=0.5, is_gpu=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


def recipe(folder: Path, **changes: Any) -> schema.Recipe:
    model = {"teacher": str(folder), "height": 32, "width": 32, "frames": 9, "max_text_tokens": 8}
    model |= {"precision": "fp32", **changes.pop("model", {})}
    training = {"global_batch": 4, "preview_prompts": 2}
    sections = {"train_flowmap": training, "distill": training, "finetune": training}
    return schema.Recipe.model_validate({"name": "t", "model": model, **sections, **changes})


def target(folder: Path, cluster: Hardware = CPU, **changes: Any) -> Target:
    return target_of(recipe(folder, **changes), cluster)


def test_a_stage_knows_its_work_and_its_time(folder: Path) -> None:
    stage = stages.stage_one(target(folder))
    assert stage.work.repeats == schema.TrainFlowMapSection().steps
    assert stage.work.seconds == stage.work.operations / 0.5e12
    assert stage.work.hours == pytest.approx(stage.work.seconds * stage.work.repeats / 3600)


def test_without_a_speed_there_is_no_time(folder: Path) -> None:
    work = stages.stage_one(target(folder, replace(CPU, peak=None))).work
    assert (work.seconds, work.hours) == (None, None)
    assert work.operations > 0


def roles(own: Target, kind: Kind) -> dict[str, RoleSize]:
    settings = own.recipe.distill if kind == "on-policy" else own.recipe.train_flowmap
    return roles_of(stages.training_setup(own, kind, settings))


def test_whole_weights_have_a_student_that_trains_and_no_base_in_stage_one(folder: Path) -> None:
    first, second = roles(target(folder), "flow-map"), roles(target(folder), "on-policy")
    assert set(first) == {"student"}
    assert first["student"].trainable == first["student"].parameters
    assert set(second) == {BASE, "student", "fake"}
    assert second["fake"].trainable == second[BASE].parameters  # the fake score is a copy of the teacher


def test_sharding_divides_what_is_held_and_gathers_a_block_at_a_time(folder: Path) -> None:
    four = parse_hardware("4x80GB")
    plain = {"global_batch": 4, "preview_every": 0}

    def planned(**launch: Any) -> stages.Stage:
        return stages.stage_two(target(folder, four, distill=plain, launch=launch))

    whole, full = planned(), planned(sharding="full")
    for part in ("optimizer", "average"):
        assert full.peak.parts[part] == pytest.approx(whole.peak.parts[part] / 4, abs=4)
    gathered = full.peak.parts["weights"] - whole.peak.parts["weights"] // 4
    assert 0 < gathered <= whole.peak.parts["weights"]
    away = planned(sharding="full", offload=True)
    assert away.peak.parts["optimizer"] == 0
    assert away.peak.parts["weights"] == gathered


def test_a_start_from_elsewhere_is_a_second_base(folder: Path) -> None:
    lora = {"lora": {"rank": 4, "alpha": 4}}
    shared = roles(target(folder, model=lora), "on-policy")[BASE].parameters
    away = target(folder, model=lora, distill={"global_batch": 4, "init_from": str(folder)})
    assert roles(away, "on-policy")[BASE].parameters > 1.9 * shared


def test_a_larger_teacher_has_its_own_size() -> None:
    """1.3B towards 14B: the base holds both, the fake score is an adapter on the larger."""
    small, large = (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in ("1.3B", "14B"))
    model = schema.ModelSection(teacher=small, lora=schema.LoraSection(rank=8, alpha=8))
    recipes = [
        schema.Recipe(name="t", model=model.model_copy(update={"teacher": teacher}),
                      distill=schema.DistillSection(real_score=real))
        for teacher, real in ((small, large), (small, None), (large, None))
    ]  # fmt: skip
    both, alone, teacher = (roles(target_of(one, parse_hardware("8x80GB")), "on-policy") for one in recipes)
    assert both["student"] == alone["student"]
    assert both["fake"] == teacher["fake"]
    assert "real" not in both  # not tuned by an adapter of its own
    assert both[BASE].parameters > 14_288_491_584 + 1_418_996_800


def test_a_real_score_of_a_run_is_sized_by_its_folder(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "teacher"
    run.mkdir()
    (run / "model").symlink_to(folder)
    same = target(folder, distill={"global_batch": 4, "real_score": str(run)})
    assert stages.training_setup(same, "on-policy", same.recipe.distill).scores is None


def test_synthesis_is_guided_and_divided_among_the_devices(folder: Path) -> None:
    made = {"count": 64, "steps": 3}
    one, four = (
        stages.synthesis(target(folder, replace(CPU, count=count), synthesize=made)).work for count in (1, 4)
    )
    assert one.hours is not None
    assert four.hours == pytest.approx(one.hours / 4)
    assert (one.repeats, one.operations) == (64, four.operations)
    sampled = stages.sampling(target(folder, sample={"nfe": (1,)})).work.operations
    assert one.operations == pytest.approx(3 * 2 * sampled, rel=0.1)  # of one time, not two


def test_another_teacher_synthesizes_at_its_own_price() -> None:
    small, large = (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in ("1.3B", "14B"))
    model = schema.ModelSection(teacher=small, frames=9, height=64, width=64)
    given = schema.Recipe(name="t", model=model, synthesize=schema.SynthesizeSection(teacher=large))
    stage = stages.synthesis(target_of(given, parse_hardware("8x80GB")))
    assert stage.roles["network"].parameters == 14_288_491_584


def test_previews_count_where_there_are_any(folder: Path) -> None:
    """Decoding is the most that this stage holds, with previews; without, it is a step of training."""
    with_them = stages.tuning(target(folder))
    without = stages.tuning(target(folder, train_flowmap={"global_batch": 4, "preview_every": 0}))
    assert with_them.peak.name.startswith("preview")
    assert not without.peak.name.startswith("preview")
    assert with_them.peak.total > without.peak.total


def test_decoding_holds_what_the_real_vae_holds(folder: Path) -> None:
    vae = VideoVAE.load(folder)
    latent = (FRAMES[1] + 3, vae.channels, 4, 4)
    z = torch.randn(1, *latent)
    live = Live([*vae._model.parameters()])
    held = live.now
    with live:
        vae.decode(z)
    config = target(folder).pipeline.vae
    assert decoding(config, latent).weights == held
    assert decoding(config, latent).peak == pytest.approx(live.peak - held, rel=0.05)


def test_decoding_is_a_straight_line_in_the_frames() -> None:
    shape = (16, 8, 8)
    assert decoding({}, (9, *shape)) == _decoding("{}", (9, *shape))


def test_a_batch_that_cannot_be_divided_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="A global batch of 4 cannot be divided among 3 processes"):
        stages.stage_one(target(folder, replace(CPU, count=3)))


CHUNKS = {"causal": {"partition": (1, 1, 1, 1), "full_chunks": 2}, "frames": 13}


def test_the_cache_of_a_sampling_is_the_real_one(folder: Path) -> None:
    own = target(folder, model=CHUNKS)
    setup = replace(stages.training_setup(own, "sampling", own.recipe.train_flowmap), settings=None)
    cache = KeyCache(FlowMapTransformer(setup.config), (1, 1, 1, 1), own.latent[2:], 3)
    assert sampling_of(setup, 3, False).cache == cache.bytes > 0


def test_only_causal_plans_stream_and_streams_do_not_grow(folder: Path) -> None:
    """Beyond the trained length chunks are forgotten, and a chunk's pixels are let go."""
    assert "stream" not in chain_of(recipe(folder))
    assert "stream" in chain_of(recipe(folder, model=CHUNKS))
    short, long, longer = (
        stages.streaming(target(folder, model=CHUNKS, sample={"frames": frames})) for frames in (13, 25, 41)
    )
    assert longer.peak == long.peak
    assert long.peak.total <= 1.2 * short.peak.total
    assert longer.work.operations > 1.5 * long.work.operations
    whole = stages.sampling(target(folder, model=CHUNKS, sample={"frames": 41}))
    assert whole.peak.total > longer.peak.total


def test_offloading_moves_what_is_held_to_the_cpu(folder: Path) -> None:
    one = parse_hardware("1x80GB")
    launch = {"sharding": "full", "offload": True}
    plain = {"global_batch": 4, "preview_every": 0}
    here = stages.stage_two(target(folder, one, distill=plain))
    away = stages.stage_two(target(folder, one, distill=plain, launch=launch))
    trained = sum(size.trainable_bytes for size in here.roles.values())
    largest = max(size.trainable_bytes for size in here.roles.values())
    held = sum(size.bytes for size in here.roles.values()) + 2 * trained + largest
    assert here.host == 0
    assert away.host == held + here.roles["student"].trainable_bytes
