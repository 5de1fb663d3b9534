"""Every placement of the parts samples the plain path's video, within a stated distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.base_storage import keep_base_on_host, store_base
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.network import FlowMapTransformer, is_quantizable
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline, save_pipeline
from anyflow_cli.model.placement import FP8, PlacedNetwork, storage_of, stream_weights
from anyflow_cli.plan.networks import fake_tensors
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import MemorySection
from anyflow_cli.sample.sampler import VideoSampler
from tests.plan.small import CONFIG, LATENT, TEXT

PROMPT = "a small red circle moving left"
EXACT = 0.0
NEEDED = {"int8": "torchao", "base in int8": "torchao", "base in nf4": "bitsandbytes"}
# All paths: keys of the section memory, or how the frozen matrices under adapters are stored ("base"), and
# the bound of a pixel's mean difference, of 255. docs/machines.md has the measured ones.
PLACEMENTS: dict[str, tuple[dict[str, str], float]] = {
    "products in bf16": ({"precision": "bf16"}, 0.3),
    "text encoder freed": ({"text_encoder": "freed"}, EXACT),
    "text encoder streamed": ({"text_encoder": "streamed"}, EXACT),
    "VAE on demand": ({"vae": "on-demand"}, EXACT),
    "network alternating": ({"network": "alternating", "text_encoder": "freed"}, EXACT),
    "network streamed": ({"network": "streamed", "vae": "on-demand"}, EXACT),
    "network block by block": ({"network": "blocks", "text_encoder": "streamed"}, EXACT),
    "fp8": ({"weights": "fp8"}, 1.5),
    "fp8, streamed": ({"weights": "fp8", "network": "streamed"}, 1.5),
    "int8": ({"weights": "int8"}, 0.5),
    "VAE in tiles of 48 pixels": ({"vae": "tiled", "tile": "48"}, 0.5),
    "base on the host": ({"base": "host"}, EXACT),
    "base in fp8": ({"base": "fp8"}, 1.5),
    "base in int8": ({"base": "int8"}, 0.5),
    "base in nf4": ({"base": "nf4"}, 4.0),
}


def sampled(precision: str = "fp32", tile: str = "", base: str = "", **memory: str) -> Any:
    values = {"model.precision": precision} | {f"memory.{k}": v for k, v in memory.items()}
    settings = load_recipe("tiny", [f"{key}={value}" for key, value in values.items()])
    sampler = VideoSampler.load("tiny-anyflow", settings, device="cpu")
    if tile:
        sampler.vae._model.enable_tiling(int(tile), int(tile), 32, 32)
    if base == "host":
        keep_base_on_host(sampler._network, sampler.device)
    elif base:
        store_base(sampler._network, cast("Any", base))
    return next(sampler.videos([PROMPT], [0], 4)).astype(np.int64)


@pytest.fixture(scope="module")
def plain() -> Any:
    return sampled()


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_placement_samples_the_plain_video(name: str, plain: Any) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    memory, mean = PLACEMENTS[name]
    difference = np.abs(sampled(**memory) - plain).mean()
    assert difference == 0 if mean == EXACT else 0 < difference < mean


def test_int8_weights_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anyflow_cli.model.base_storage.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="torchao"):
        sampled(weights="int8")


def test_a_causal_model_streams_its_blocks_and_its_video(tmp_path: Path) -> None:
    """Its cache is written inside the blocks; the VAE stays for the whole stream."""
    chunks = CausalConfig(full_chunks=2, partition=(1, 2))
    folder = resolve_pipeline("tiny-anyflow")
    save_pipeline(tmp_path / "causal", causal_from(load_network(folder), chunks), folder, {})
    clips = []
    for memory in ({}, {"network": "streamed", "vae": "on-demand", "text_encoder": "freed"}):
        settings = load_recipe("tiny", ["model.frames=9", *(f"memory.{k}={v}" for k, v in memory.items())])
        sampler = VideoSampler.load(str(tmp_path / "causal"), settings, device="cpu")
        clips.append(np.concatenate(list(sampler.stream(PROMPT, 0, 2))))
    assert np.array_equal(clips[0], clips[1])


@pytest.fixture
def fakes_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake parameters move as real ones do, by their ``data``; the host is another device."""
    plain: Any = Tensor.data

    def assign(tensor: FakeTensor, value: FakeTensor) -> None:
        plain.__set__(tensor, value.to("cpu"))
        tensor.fake_device = value.device

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor]) -> nn.Module:
        for parameter in self.parameters():
            parameter.data = fn(parameter.data)
        return self

    monkeypatch.setattr("anyflow_cli.model.placement.HOST", torch.device("meta"))
    monkeypatch.setattr(FakeTensor, "data", property(Tensor.detach, assign))
    monkeypatch.setattr(nn.Module, "_apply", apply)


def test_a_file_in_fp8_is_opened_as_what_fp8_weights_are(tmp_path: Path) -> None:
    """``export --dtype fp8`` keeps what ``memory.weights: fp8`` makes, in half the bytes."""
    folder = resolve_pipeline("tiny-anyflow")
    network = load_network(folder)
    save_pipeline(tmp_path / "fp8", network, folder, {}, dtype=FP8)
    stored = load_network(tmp_path / "fp8", torch.float32, storage=FP8)
    expected = load_network(folder, torch.float32, storage=FP8)
    for name, value in expected.named_parameters():
        if is_quantizable(name):
            assert torch.equal(stored.get_parameter(name).float(), value.float()), name
    sizes = [sum(f.stat().st_size for f in (one / "transformer").glob("*.safetensors"))
             for one in (tmp_path / "fp8", folder)]  # fmt: skip
    assert sizes[0] < 0.75 * sizes[1]


def test_weights_that_are_copied_ahead_are_pinned_before_they_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise an unpinned copy of all of them stays until the first forward."""
    seen: list[object] = []

    def pin(tensor: Tensor) -> Tensor:
        seen.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(
        "diffusers.hooks.apply_group_offloading", lambda module, **options: seen.append(options["use_stream"])
    )
    for device, prefetch in (("cuda", True), ("cuda", False), ("cpu", True)):
        stream_weights(nn.Linear(3, 5), torch.device(device), prefetch=prefetch, whole_blocks=False)
    assert seen == [15, 5, True, False, False]


class OnSecondDevice:
    """A network of fake tensors that computes on one device while its weights wait on another.

    An operator whose arguments are on both raises an error.
    """

    def __init__(self, **memory: str) -> None:
        self.device, self.memory = torch.device("cpu"), MemorySection.model_validate(memory)
        self.at_forward = dict[int, int]()  # bytes on the device in each block's forward

    def run(self) -> FlowMapTransformer:
        storage = storage_of(self.memory)
        network = FlowMapTransformer(replace(CONFIG, layers=4)).store_as(torch.float32, storage).eval()
        network.requires_grad_(False)
        if self.memory.streams_network:
            network.to("meta")
        PlacedNetwork(network, self.memory, torch.float32, self.device)
        assert network.device == self.device
        for number, block in enumerate(network._typed_blocks):
            block.ffn.register_forward_pre_hook(lambda *_, number=number: self.look(network, number))
        z, text = (torch.randn(2, *shape, device=self.device) for shape in (LATENT, TEXT))
        velocity = Conditioned(network, Condition(text))
        for _ in range(2):
            velocity(z, torch.ones(2, device=self.device), torch.zeros(2, device=self.device))
        return network

    def look(self, network: FlowMapTransformer, number: int) -> None:
        here = (p for block in network.blocks for p in block.parameters() if p.device == self.device)
        self.at_forward[number] = sum(p.nbytes for p in here)


@pytest.mark.usefixtures("fakes_move")
@pytest.mark.parametrize("network", ["streamed", "blocks"])
@pytest.mark.parametrize("weights", ["full", "fp8"])
def test_a_streamed_network_has_one_block_on_the_device(network: str, weights: str) -> None:
    """Without a GPU there is no stream to copy ahead with: then both ways take turns."""
    one = OnSecondDevice(network=network, weights=weights)
    with fake_tensors():
        made = one.run()
        block = sum(p.nbytes for p in made.blocks[0].parameters())
        assert {p.device.type for p in made.parameters()} == {"meta"}
    assert set(one.at_forward) == {0, 1, 2, 3}
    assert max(one.at_forward.values()) <= 1.5 * block


@pytest.mark.usefixtures("fakes_move")
def test_kept_weights_in_fp8_are_a_quarter_of_those_in_fp32() -> None:
    with fake_tensors():
        made = {weights: OnSecondDevice(weights=weights).run() for weights in ("full", "fp8")}
        sizes = {
            weights: sum(p.nbytes for name, p in network.named_parameters() if is_quantizable(name))
            for weights, network in made.items()
        }
        assert {p.dtype for name, p in made["fp8"].named_parameters() if is_quantizable(name)} == {FP8}
    assert sizes["fp8"] * 4 == sizes["full"]
