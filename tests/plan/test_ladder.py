"""The ladder of sampling: its order, what each rung holds, and which one is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_sizes import pipeline_sizes
from anyflow_cli.model.placement import FP8
from anyflow_cli.plan.estimate import StagePlan, Target, place, plan_stage, target_of
from anyflow_cli.plan.hardware import PINNED_LINK, RESERVE, Hardware, parse_hardware
from anyflow_cli.plan.ladder import EVERYTHING_KEPT, network_bytes, pinned_bytes, rung_in_words, rungs
from anyflow_cli.plan.networks import encoding_cost, fake_tensors, tiled_cost
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import MemorySection
from anyflow_cli.utils.memory_tracker import MemoryTracker
from tests.plan.small import CONFIG, setup
from tests.tiny_pipeline import make_expert_folder, make_i2v_folder

AUTO = MemorySection()


def test_the_first_rung_keeps_everything_and_the_last_streams_fp8() -> None:
    found = list(rungs(AUTO, is_gpu=True, streams=False))
    assert found[0] == EVERYTHING_KEPT
    assert (found[-1].network, found[-1].weights, found[-1].vae) == ("blocks", "fp8", "tiled")
    assert len(found) == len(set(found)) == 4 * 2 * 3 * 3
    exact = [one.weights == "full" for one in found]
    assert exact == sorted(exact, reverse=True), "weights are rounded only where nothing else fits"


def test_a_cpu_and_a_stream_have_fewer_rungs() -> None:
    on_cpu = list(rungs(AUTO, is_gpu=False, streams=False))
    assert {one.network for one in on_cpu} == {"kept"}
    assert {one.text_encoder for one in on_cpu} == {"kept", "freed"}
    assert {one.vae for one in rungs(AUTO, is_gpu=True, streams=True)} == {"kept", "on-demand"}


def test_what_the_recipe_chooses_stays() -> None:
    chosen = MemorySection(network="blocks", weights="int8")
    assert {(one.network, one.weights) for one in rungs(chosen, is_gpu=True, streams=False)} == {
        ("blocks", "int8")
    }


@pytest.mark.parametrize("weights", ["full", "fp8"])
def test_the_bytes_of_a_network_are_those_of_the_real_one(weights: str) -> None:
    one = replace(setup("flow-map", lora=False, precision="bf16"), settings=None)
    config = replace(CONFIG, two_time=True)
    real = FlowMapTransformer(config).store_as(torch.bfloat16, FP8 if weights == "fp8" else None)
    sizes = network_bytes(one, weights)
    assert sizes.whole == sum(p.nbytes for p in real.parameters())
    assert sizes.block == sum(p.nbytes for p in real.blocks[0].parameters())
    assert sizes.on_device(MemorySection(network="blocks")) == sizes.whole - sizes.block


def test_decoding_in_tiles_holds_what_the_plan_says() -> None:
    from diffusers import AutoencoderKLWan

    statistics: dict[str, Any] = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **statistics).eval()
    with fake_tensors():
        vae = VideoVAE(model.to_empty(device="cpu"))
        model.enable_tiling()
        latents = torch.randn(1, 3, 4, 40, 40)
        with MemoryTracker([*model.parameters(), latents]) as tracker:
            vae.decode(latents)
    weights, planned = tiled_cost(dict(model.config), (3, 4, 40, 40))
    assert weights == sum(p.nbytes for p in model.parameters())
    assert planned == pytest.approx(tracker.peak, rel=0.15)


def test_encoding_holds_what_the_plan_says() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 100, "d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 16, "d_ff": 96}
    model = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    ids = torch.zeros(3, 64, dtype=torch.long)
    with MemoryTracker([*model.parameters(), ids]) as tracker, torch.no_grad():
        model(ids)
    assert tracker.peak <= encoding_cost(sizes, 3, 64, gpu=False) <= 3 * tracker.peak


def small(memory: int, host: int | None = None, /, **values: object) -> Any:
    """The plan of sampling tiny on a GPU and a host with so many bytes for tensors."""
    hardware = Hardware(1, memory + RESERVE, peak=1e12, host=host and host + RESERVE)
    recipe = load_recipe("tiny", [f"{key}={value}" for key, value in values.items()])
    return plan_stage(target_of(recipe, hardware), "sample"), hardware


def test_less_memory_leads_up_the_ladder() -> None:
    plan, _ = small(10**12)
    assert plan.rung == EVERYTHING_KEPT
    assert rung_in_words(plan.rung) == "everything stays on the device"
    largest = plan.peak.total
    plan, _ = small(largest - 1)
    assert plan.rung.text_encoder == "freed"
    assert plan.rung.network == "kept"
    assert plan.peak.total < largest
    least, _ = small(1)
    assert least.peak.total < plan.peak.total
    assert least.rung != plan.rung


def test_a_host_without_room_for_the_weights_leads_up_the_ladder() -> None:
    """Pinned tensors take powers of two; blocks that are not copied ahead need not be pinned."""
    fixed = {"memory.vae": "kept", "memory.text_encoder": "kept", "memory.network": "streamed"}
    roomy, _ = small(10**12, 10**12, **fixed)
    sizes = network_bytes(roomy.setup, "full")
    assert (roomy.rung.weights, roomy.host) == ("full", sizes.pinned)
    assert sizes.pinned > sizes.whole
    cramped, _ = small(10**12, sizes.pinned - 1, **fixed)
    assert (cramped.rung.weights, cramped.host) == ("fp8", network_bytes(roomy.setup, "fp8").pinned)
    unpinned = {**fixed, "memory.network": "blocks", "memory.weights": "full"}
    blocks, hardware = small(10**12, sizes.whole - 1, **unpinned)
    assert blocks.host == sizes.whole
    assert not Target(load_recipe("tiny"), pipeline_sizes("tiny-anyflow"), hardware).fits(blocks)


def test_a_host_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = Hardware(1, 10**12, peak=1e12, host=RESERVE + 1)
    monkeypatch.setattr("anyflow_cli.plan.estimate.this_machine", lambda: hardware)
    with pytest.raises(UsageError, match="per process in the host's memory, and this machine has"):
        place(load_recipe("tiny", ["memory.network=blocks"]), "sample")


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned_bytes(size) for size in (0, 1, 3, 4, 5, 1025)] == [1, 1, 4, 4, 8, 2048]


def test_the_idle_expert_waits_in_the_host(tmp_path: Path) -> None:
    folder = make_expert_folder(tmp_path / "experts")
    one, both = planned(folder, "alternating"), planned(folder, "kept")
    sizes = network_bytes(one.setup, "full")
    assert sizes.experts == 2
    assert held_at(both, "network")["network"] == sizes.whole == one.host
    assert held_at(one, "network")["network"] == held_at(one, "decoding")["network"] == sizes.whole // 2


def test_the_image_encoder_is_counted_where_it_is(tmp_path: Path) -> None:
    """CLIP stays while the text encoder does, and else is on the device while it encodes."""
    folder = make_i2v_folder(tmp_path / "i2v")
    size = 2 * pipeline_sizes(str(folder)).image_parameters
    kept, freed = (planned(folder, "kept", text=text, pictures="first") for text in ("kept", "freed"))
    assert held_at(freed, "network")["image encoder"] == 0
    assert held_at(kept, "network")["image encoder"] == size > 0
    assert held_at(freed, "encoding pictures")["image encoder"] == size
    assert freed.host - kept.host == size + network_bytes(kept.setup, "full").whole


def planned(folder: Path, network: str, text: str = "kept", pictures: str = "none") -> StagePlan:
    """The plan of sampling a folder's model on a large GPU."""
    values = [f"model.teacher={folder}", f"memory.network={network}", f"memory.text_encoder={text}"]
    recipe = load_recipe("tiny", [*values, "memory.vae=kept", f"model.pictures={pictures}"])
    return plan_stage(target_of(recipe, Hardware(1, 10**12, peak=1e12)), "sample")


def held_at(plan: StagePlan, moment: str) -> Mapping[str, int]:
    return next(one.parts for one in plan.moments if one.name == moment)


def test_copies_take_time_where_they_are_not_overlapped() -> None:
    streamed, hardware = small(10**12, None, **{"memory.network": "streamed"})
    blocks, _ = small(10**12, None, **{"memory.network": "blocks"})
    computed = hardware.seconds(streamed.flops)
    assert streamed.copies == pytest.approx(32 * network_bytes(streamed.setup, "full").whole / PINNED_LINK)
    assert streamed.seconds(hardware) == max(computed, streamed.copies)
    assert blocks.seconds(hardware) == computed + blocks.copies > streamed.seconds(hardware)


def test_a_limit_is_planned_and_said_before_sampling_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "-p", "a small red circle", "--dry-run", "--runs", str(tmp_path), "--memory"]
    assert main([*command, "0.02"]) == 0
    said = "Memory: the text encoder is freed once the prompts are encoded. Peak"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "words"),
    [("0.001", "anyflow plan -r tiny --gpus 1x1GB"), ("much", "auto or a number"), ("-1", "above 0")],
)
def test_a_limit_that_nothing_keeps_is_refused_by_a_dry_run(
    limit: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "-p", "a small red circle", "--dry-run", "--runs", str(tmp_path)]
    assert main([*command, f"--memory={limit}"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "network"),
    [
        ("bidirectional1b", "1x8GB", "alternating"),
        ("bidirectional14b", "1x24GB", "streamed"),
        ("bidirectional14b", "1x12GB", "streamed"),
        ("bidirectional-a14b", "1x48GB", "alternating"),
        ("bidirectional-a14b", "1x24GB", "streamed"),
        ("i2v14b", "1x24GB", "streamed"),
    ],
)
def test_wan_samples_on_small_cards(name: str, gpus: str, network: str) -> None:
    """At 480x832x81, as the recipes have it."""
    target = target_of(load_recipe(name), parse_hardware(gpus))
    plan = plan_stage(target, "sample")
    assert plan.peak.total <= target.sampling_budget
    assert (plan.rung.network, plan.rung.weights) == (network, "full")  # type: ignore[union-attr]
