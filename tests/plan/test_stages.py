"""Stages of a recipe: what they are made of, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.context_parallel import ContextGroup
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.plan.estimate import StagePlan, Target, plan_stage, target_of, training_setup
from anyflow_cli.plan.hardware import Hardware, parse_hardware
from anyflow_cli.plan.networks import BASE, RoleSize, decoding_cost, fake_tensors, role_sizes
from anyflow_cli.plan.steps import sampling_cost
from anyflow_cli.recipe import schema
from anyflow_cli.utils.memory_tracker import MemoryTracker
from anyflow_cli.utils.units import GIB
from tests.plan.small import Live
from tests.tiny_pipeline import make_wan_folder

CPU = Hardware(1, 8 * GIB, peak=1e12, mfu=0.5, is_gpu=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


def recipe(folder: Path, **changes: Any) -> schema.Recipe:
    model = {"teacher": str(folder), "height": 32, "width": 32, "frames": 9, "max_text_tokens": 8}
    model |= {"precision": "fp32", **changes.pop("model", {})}
    training = {"global_batch": 4, "preview_prompts": 2}
    sections = {"train_flowmap": training, "distill": training, "finetune": training}
    return schema.Recipe.model_validate({"name": "t", "model": model, **sections, **changes})


def target(folder: Path, hardware: Hardware = CPU, **changes: Any) -> Target:
    return target_of(recipe(folder, **changes), hardware)


def test_a_stage_knows_its_flops_and_its_time(folder: Path) -> None:
    stage = plan_stage(target(folder), "train-flowmap")
    assert stage.repeats == schema.TrainFlowMapSection().steps
    seconds = CPU.seconds(stage.flops)
    assert seconds == stage.flops / 0.5e12
    assert stage.hours(CPU) == pytest.approx(seconds * stage.repeats / 3600)


def test_without_a_speed_there_is_no_time(folder: Path) -> None:
    hardware = replace(CPU, peak=None)
    stage = plan_stage(target(folder, hardware), "train-flowmap")
    assert stage.hours(hardware) is None
    assert stage.flops > 0


def roles(own: Target, key: str) -> dict[str, RoleSize]:
    return role_sizes(training_setup(own, key))


def test_whole_weights_have_a_student_that_trains_and_no_base_in_stage_one(folder: Path) -> None:
    first, second = roles(target(folder), "train-flowmap"), roles(target(folder), "distill")
    assert set(first) == {"student"}
    assert first["student"]["trainable"] == first["student"]["parameters"]
    assert set(second) == {BASE, "student", "fake"}
    assert (
        second["fake"]["trainable"] == second[BASE]["parameters"]
    )  # the fake score is a copy of the teacher


def test_sharding_divides_what_is_held_and_gathers_a_block_at_a_time(folder: Path) -> None:
    four = parse_hardware("4x80GB")
    plain = {"global_batch": 4, "preview_every": 0}

    def planned(**launch: Any) -> StagePlan:
        return plan_stage(target(folder, four, distill=plain, launch=launch), "distill")

    whole, full = planned(), planned(sharding="full")
    for part in ("optimizer", "ema"):
        assert full.peak.parts[part] == pytest.approx(whole.peak.parts[part] / 4, abs=4)
    gathered = full.peak.parts["weights"] - whole.peak.parts["weights"] // 4
    assert 0 < gathered <= whole.peak.parts["weights"]
    away = planned(sharding="full", offload=True)
    assert away.peak.parts["optimizer"] == 0
    assert away.peak.parts["weights"] == gathered


def test_a_start_from_elsewhere_is_a_second_base(folder: Path) -> None:
    lora = {"lora": {"rank": 4, "alpha": 4}}
    shared = roles(target(folder, model=lora), "distill")[BASE]["parameters"]
    away = target(folder, model=lora, distill={"global_batch": 4, "init_from": str(folder)})
    assert roles(away, "distill")[BASE]["parameters"] > 1.9 * shared


def test_a_larger_teacher_has_its_own_size() -> None:
    """1.3B towards 14B: the base holds both, the fake score is an adapter on the larger."""
    small, large = (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in ("1.3B", "14B"))
    model = schema.ModelSection(teacher=small, lora=schema.LoraSection(rank=8, alpha=8))
    recipes = [
        schema.Recipe(name="t", model=model.model_copy(update={"teacher": teacher}),
                      distill=schema.DistillSection(real_score=real))
        for teacher, real in ((small, large), (small, None), (large, None))
    ]  # fmt: skip
    both, alone, teacher = (roles(target_of(one, parse_hardware("8x80GB")), "distill") for one in recipes)
    assert both["student"] == alone["student"]
    assert both["fake"] == teacher["fake"]
    assert "real" not in both  # not tuned by an adapter of its own
    assert both[BASE]["parameters"] > 14_288_491_584 + 1_418_996_800


def test_a_real_score_of_a_run_is_sized_by_its_folder(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "teacher"
    run.mkdir()
    (run / "model").symlink_to(folder)
    same = target(folder, distill={"global_batch": 4, "real_score": str(run)})
    scores = training_setup(same, "distill").scores
    assert scores is not None  # no adapter on this recipe's teacher
    assert scores == same.pipeline.network


def test_synthesis_is_guided_and_divided_among_the_devices(folder: Path) -> None:
    made = {"count": 64, "steps": 3}
    one, four = (
        plan_stage(target(folder, replace(CPU, count=count), synthesize=made), "synthesize")
        for count in (1, 4)
    )
    hours = one.hours(CPU)
    assert hours is not None
    assert four.hours(CPU) == pytest.approx(hours / 4)
    assert (one.repeats, one.flops) == (64, four.flops)
    sampled = plan_stage(target(folder, sample={"nfe": (1,)}), "sample").flops
    assert one.flops == pytest.approx(3 * 2 * sampled, rel=0.1)  # of one time, not two


def test_another_teacher_synthesizes_at_its_own_price() -> None:
    small, large = (f"Wan-AI/Wan2.1-T2V-{size}-Diffusers" for size in ("1.3B", "14B"))
    model = schema.ModelSection(teacher=small, frames=9, height=64, width=64)
    given = schema.Recipe(name="t", model=model, synthesize=schema.SynthesizeSection(teacher=large))
    stage = plan_stage(target_of(given, parse_hardware("8x80GB")), "synthesize")
    assert role_sizes(stage.setup)["student"]["parameters"] == 14_288_491_584


def test_previews_count_where_there_are_any(folder: Path) -> None:
    """Decoding is the most that this stage holds, with previews; without, it is a step of training."""
    with_them = plan_stage(target(folder), "tune")
    without = plan_stage(target(folder, train_flowmap={"global_batch": 4, "preview_every": 0}), "tune")
    assert with_them.peak.name.startswith("preview")
    assert not without.peak.name.startswith("preview")
    assert with_them.peak.total > without.peak.total


def test_decoding_holds_what_the_real_vae_holds(folder: Path) -> None:
    vae = VideoVAE.load(folder)
    latent = (7, vae.channels, 4, 4)
    z = torch.randn(1, *latent)
    live = Live([*vae._model.parameters()])
    held = live.now
    with live:
        vae.decode(z)
    config = target(folder).pipeline.vae
    weights, peak = decoding_cost(config, latent)
    assert weights == held
    assert peak == pytest.approx(live.peak - held, rel=0.05)


@pytest.mark.parametrize("context", [1, 2])
def test_frames_after_the_third_cost_what_it_costs(context: int) -> None:
    """Also where each of two processes decodes a part of the rows."""
    from diffusers import AutoencoderKLWan

    latent = (4, 4, 5, 2)
    statistics: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **statistics)
    with fake_tensors():
        vae = VideoVAE(model.to_empty(device="cpu"))
        if context > 1:
            vae.share(ContextGroup(context, context - 1, context))
        with MemoryTracker(list(model.parameters())) as tracker:
            vae.decode(torch.empty(1, *latent))
    assert decoding_cost(dict(model.config), latent, context)[1] == tracker.peak


def test_a_batch_that_cannot_be_divided_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="A global batch of 4 does not divide among 3 processes"):
        plan_stage(target(folder, replace(CPU, count=3)), "train-flowmap")


CHUNKS = {"causal": {"partition": (1, 1, 1, 1), "full_chunks": 2}, "frames": 13}


def test_the_cache_of_a_sampling_is_the_real_one(folder: Path) -> None:
    own = target(folder, model=CHUNKS)
    setup = own.setup(None, None)
    causal = CausalConfig(partition=(1, 1, 1, 1), full_chunks=2)
    network = FlowMapTransformer(replace(setup.network, two_time=True, causal=causal))
    cache = KeyCache(network, (1, 1, 1, 1), setup.latent[2:], 3)
    assert sampling_cost(setup, 3).cache == cache.bytes > 0


def test_streams_do_not_grow(folder: Path) -> None:
    """Beyond the trained length chunks are forgotten, and a chunk's pixels are let go."""
    short, long, longer = (
        plan_stage(target(folder, model=CHUNKS, sample={"frames": frames}), "stream")
        for frames in (13, 25, 41)
    )
    assert longer.peak == long.peak
    assert long.peak.total <= 1.2 * short.peak.total
    assert longer.flops > 1.5 * long.flops
    whole = plan_stage(target(folder, model=CHUNKS, sample={"frames": 41}), "sample")
    assert whole.peak.total > longer.peak.total


def test_offloading_moves_what_is_held_to_the_cpu(folder: Path) -> None:
    one = parse_hardware("1x80GB")
    launch = {"sharding": "full", "offload": True}
    plain = {"global_batch": 4, "preview_every": 0}
    here = plan_stage(target(folder, one, distill=plain), "distill")
    away = plan_stage(target(folder, one, distill=plain, launch=launch), "distill")
    sizes = role_sizes(here.setup)
    trained = [size["trainable_bytes"] for size in sizes.values()]
    held = sum(size["bytes"] for size in sizes.values()) + 2 * sum(trained) + max(trained)
    assert here.host == 0
    assert away.host == held + sizes["student"]["trainable_bytes"]


@pytest.mark.parametrize("key", ["distill", "sample"])
def test_processes_that_share_a_video_divide_its_tokens(folder: Path, key: str) -> None:
    """Tokens and FLOPs are divided; weights are not, and text keys are computed by each."""
    two = replace(CPU, count=2)
    alone, shared = (
        plan_stage(target(folder, two, launch=schema.LaunchSection(context_parallel=size)), key)
        for size in (None, 2)
    )
    assert shared.tokens == alone.tokens // 2
    if key == "distill":
        assert shared.peak.parts["weights"] == alone.peak.parts["weights"]
    # in training, each process now has the samples of both
    assert shared.flops / alone.flops == pytest.approx(1 if key == "distill" else 0.5, rel=0.2)
    assert shared.setup.ranks == 1


@pytest.mark.parametrize("size", [2, 3])
def test_processes_that_share_a_video_have_heads_of_its_cache(folder: Path, size: int) -> None:
    """Two divide the heads; three have them all, with a third of the tokens each."""
    setup = target(folder, model=CHUNKS).setup(None, None, context=size)
    causal = CausalConfig(partition=(1, 1, 1, 1), full_chunks=2)
    network = FlowMapTransformer(replace(setup.network, two_time=True, causal=causal))
    network.use_context(ContextGroup(size, 0, 2 if size == 2 else 1))
    cache = KeyCache(network, (1, 1, 1, 1), setup.latent[2:], 3)
    assert sampling_cost(setup, 3).cache == cache.bytes > 0
