"""The ladder of sampling: its order, what each rung holds, and which one is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.cli.app import main
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.placement import FP8
from anyflow_cli.plan.estimate import plan_stage, target_of
from anyflow_cli.plan.hardware import PINNED_LINK, RESERVE, Hardware, parse_hardware
from anyflow_cli.plan.ladder import EVERYTHING_KEPT, network_bytes, rung_in_words, rungs
from anyflow_cli.plan.networks import encoding_cost, fake_tensors, tiled_cost
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import MemorySection
from anyflow_cli.utils.memory_tracker import MemoryTracker
from tests.plan.small import CONFIG, setup

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


def small(memory: int, **values: object) -> Any:
    """The plan of sampling tiny on a GPU with so many bytes for tensors."""
    hardware = Hardware(1, memory + RESERVE, peak=1e12)
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


def test_copies_take_time_where_they_are_not_overlapped() -> None:
    streamed, hardware = small(10**12, **{"memory.network": "streamed"})
    blocks, _ = small(10**12, **{"memory.network": "blocks"})
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
    ("limit", "words"), [("0.001", "Sampling needs"), ("much", "auto or a number"), ("-1", "above 0")]
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
    ],
)
def test_wan_samples_on_small_cards(name: str, gpus: str, network: str) -> None:
    """At 480x832x81, as the recipes have it."""
    target = target_of(load_recipe(name), parse_hardware(gpus))
    plan = plan_stage(target, "sample")
    assert plan.peak.total <= target.sampling_budget
    assert (plan.rung.network, plan.rung.weights) == (network, "full")  # type: ignore[union-attr]
