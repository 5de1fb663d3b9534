"""The two experts of Wan 2.2 A14B as one network: opened, sampled as by diffusers, saved, offloaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.experts import EXPERTS, ExpertName
from anyflow_cli.flow.samplers import euler, flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import guided
from anyflow_cli.model.experts import ExpertPair, bind, guidance_of, keep_idle_on_host
from anyflow_cli.model.layouts.expert_files import expert_places
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.pipeline_io import (
    component,
    has_components,
    load_network,
    read_config,
    resolve_pipeline,
    save_pipeline,
)
from anyflow_cli.model.pipeline_sizes import pipeline_sizes
from anyflow_cli.recipe.schema import ExpertGuidance, ModelSection
from anyflow_cli.sample.sampler import VideoSampler
from tests.tiny_pipeline import CHANNELS, TEXT_DIM, make_expert_folder, wan_transformer

BOUNDARY = 0.875


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_expert_folder(tmp_path_factory.mktemp("experts") / "a14b", boundary=BOUNDARY)


def opened(place: Path) -> ExpertPair:
    network = load_network(place)
    assert isinstance(network, ExpertPair)
    return network


def same(network: ExpertPair, other: ExpertPair) -> bool:
    return all(
        torch.equal(one, two)
        for one, two in zip(network.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_diffusers_folder_opens_with_its_boundary(folder: Path) -> None:
    pair = opened(folder)
    assert (pair.boundary, pair.config.boundary, read_config(folder).boundary) == (BOUNDARY,) * 3
    assert not torch.equal(pair.high.proj_out.weight, pair.low.proj_out.weight)


def original(folder: Path, target: Path) -> Path:
    """The folder in the layout of Wan's own release."""
    from safetensors.torch import load_file, save_file

    for name, place in (("transformer", "high_noise_model"), ("transformer_2", "low_noise_model")):
        weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        config = json.loads((folder / name / "config.json").read_text())
        (target / place).mkdir(parents=True)
        named = {TRANSFORMER_NAMES.to_original(key): weight for key, weight in weights.items()}
        save_file(named, target / place / "diffusion_pytorch_model.safetensors")
        stated = {
            "dim": config["num_attention_heads"] * config["attention_head_dim"], "model_type": "t2v",
            "num_heads": config["num_attention_heads"], "num_layers": config["num_layers"],
            "ffn_dim": config["ffn_dim"], "in_dim": CHANNELS, "out_dim": CHANNELS, "text_dim": TEXT_DIM,
            "freq_dim": config["freq_dim"],
        }  # fmt: skip
        (target / place / "config.json").write_text(json.dumps(stated))
    return target


def test_an_original_folder_holds_the_same_experts(folder: Path, tmp_path: Path) -> None:
    pair = opened(original(folder, tmp_path / "wan"))
    assert same(pair, opened(folder))
    assert pair.boundary == BOUNDARY


@pytest.mark.parametrize("suffix", ["", "@0.9"])
def test_two_places_are_one_model(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Folders of experts, files, or folders with two experts, of which each gives its own."""
    high, low = folder / "transformer", folder / "transformer_2"
    path = resolve_pipeline(f"{high},{low}{suffix}")
    assert opened(path).boundary == (0.9 if suffix else BOUNDARY)
    assert same(opened(path), opened(folder))
    twice = resolve_pipeline(f"{folder},{folder}{suffix}")
    assert same(opened(twice), opened(folder))
    assert has_components(twice)
    assert component(twice, "vae") == folder / "vae"


def test_two_places_have_sizes_to_plan_with(folder: Path) -> None:
    sizes = pipeline_sizes(f"{folder},{folder}@0.9")
    assert (sizes.network.boundary, sizes.vae["z_dim"]) == (0.9, CHANNELS)


@pytest.mark.parametrize("missing", ["high", "low"])
def test_a_place_without_an_expert_is_named(folder: Path, missing: str) -> None:
    places = {"high": folder / "transformer", "low": folder / "transformer_2"} | {missing: folder / "nothing"}
    with pytest.raises(UsageError, match="nothing"):
        expert_places(resolve_pipeline(f"{places['high']},{places['low']}"))


def test_experts_of_two_sizes_are_refused_with_what_differs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    wan_transformer(num_layers=1).save_pretrained(tmp_path / "model" / "transformer_2")
    with pytest.raises(UsageError, match=r"layers 2.*layers 1"):
        read_config(tmp_path / "model")


def test_a_saved_pair_opens_in_diffusers_and_here(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pair = opened(folder)
    save_pipeline(tmp_path / "saved", pair, folder, {})
    assert same(opened(tmp_path / "saved"), pair)
    pipe: Any = WanPipeline.from_pretrained(tmp_path / "saved")
    assert pipe.config.boundary_ratio == BOUNDARY
    assert torch.equal(pipe.transformer_2.proj_out.weight, pair.low.proj_out.weight)


# --- parity with diffusers


SCHEDULERS: dict[str, dict[str, Any]] = {
    "unipc": {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0},
    "euler": {"shift": 12.0},
}
CLASSES = {"unipc": "UniPCMultistepScheduler", "euler": "FlowMatchEulerDiscreteScheduler"}
STEPS = 8


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_guided_sampling_equals_diffusers(folder: Path, scheduler: str) -> None:
    """Latents of WanPipeline with transformer_2, guidance_scale and guidance_scale_2."""
    import diffusers

    pipe: Any = diffusers.WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, CLASSES[scheduler])(**SCHEDULERS[scheduler])
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, CHANNELS, 3, 4, 6, generator=generator)
    text, null = torch.randn(2, 1, 7, TEXT_DIM, generator=generator)
    wanted = pipe(
        prompt_embeds=text, negative_prompt_embeds=null, latents=noise, height=32, width=48, num_frames=9,
        num_inference_steps=STEPS, guidance_scale=4.0, guidance_scale_2=3.0, output_type="latent",
    ).frames.transpose(1, 2)  # fmt: skip
    used = {"high": pipe.scheduler.timesteps >= 875, "low": pipe.scheduler.timesteps < 875}
    assert all(times.any() for times in used.values()), "the test needs steps of both experts"
    pair, start = opened(folder), noise.transpose(1, 2)
    if scheduler == "unipc":
        sampler = VideoSampler(
            pair, ModelSection(shift=12.0, precision="fp32"), tuple(start.shape[1:]), method="unipc",
            guidance=ExpertGuidance(high=4.0, low=3.0), negative=null[0],
            streams=lambda seed, shape: (start[0], torch.Generator()),
        )  # fmt: skip
        (latents,) = sampler.latents(Condition(text), [0], STEPS)
    else:  # whose own grid ends above 0
        scale = guidance_of(pair, ExpertGuidance(high=4.0, low=3.0))
        velocity = guided(bind(pair, Condition(text)), bind(pair, Condition(null)), scale)
        latents = euler(velocity, start, pipe.scheduler.sigmas)
    torch.testing.assert_close(latents, wanted, rtol=1e-5, atol=1e-5)


# --- the idle expert


def test_the_idle_expert_stays_on_the_host_and_a_pass_moves_each_expert_once(folder: Path) -> None:
    """A sampling pass of several steps: where the weights are is checked at every evaluation."""
    pair, noise = opened(folder), torch.randn(1, 3, CHANNELS, 4, 6)
    cond, null = (Condition(text) for text in torch.randn(2, 1, 7, TEXT_DIM))
    wanted = flow_map_euler(guided(bind(pair, cond), bind(pair, null), 3.0), noise, grid(6, 12.0))
    at_rest = {name: [weight.data for weight in pair.expert(name).parameters()] for name in EXPERTS}
    keep_idle_on_host(pair, torch.device("cpu"), move=torch.clone)
    moves: list[str] = []

    def is_moved(name: ExpertName) -> bool:
        weights = zip(pair.expert(name).parameters(), at_rest[name], strict=True)
        return all(weight.data_ptr() != stored.data_ptr() for weight, stored in weights)

    switch = pair.activate

    def watched(name: ExpertName) -> None:
        before = is_moved(name)
        switch(name)
        assert is_moved(name)
        assert not any(is_moved(other) for other in EXPERTS if other != name), (
            "both experts are on the device"
        )
        moves.extend([name] * (not before))

    pair.activate = watched
    for _ in range(2):
        latents = flow_map_euler(guided(bind(pair, cond), bind(pair, null), 3.0), noise, grid(6, 12.0))
        torch.testing.assert_close(latents, wanted, rtol=0, atol=0)
    assert moves == ["low", "high", "low"]
