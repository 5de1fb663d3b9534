"""Weights are read once, tensor by tensor, in the type and on the device where they are used."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.encoders import TextEncoder
from anyflow_cli.model.experts import bind
from anyflow_cli.model.lora import LoraSize, MergedNetwork
from anyflow_cli.model.network import FlowMapTransformer, kept_in_fp32, two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.open import open_model
from anyflow_cli.sample.sampler import VideoSampler
from tests.model.layouts import written
from tests.plan.small import Live

PROMPTS = ["a small red circle moving left", "a large blue square"]


class HostLive(Live):  # type: ignore[no-untyped-call]
    """Bytes of live tensors on the CPU."""

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "cpu":
            super()._see(tensor)


def recipe(**sample: Any) -> Any:
    values = {"model.precision": "bf16", "model.frames": 5, "model.height": 32, "model.width": 32}
    return load_recipe("tiny", [f"{key}={value}" for key, value in (values | sample).items()])


def dtypes(network: FlowMapTransformer) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in network.named_parameters()}


def test_sampling_in_bf16_stores_the_weights_in_bf16() -> None:
    opened = VideoSampler.load("tiny-anyflow", recipe(), device="cpu")
    for name, dtype in dtypes(opened._network).items():
        assert dtype == (torch.float32 if kept_in_fp32(name) else torch.bfloat16), name


def test_weights_in_bf16_give_the_video_of_weights_that_autocast_casts_in_every_call() -> None:
    stored = VideoSampler.load("tiny-anyflow", recipe(), device="cpu")
    cast = VideoSampler.load("tiny-anyflow", recipe(), device="cpu")
    cast._network = open_model("tiny-anyflow", recipe()).network.eval()
    cast._bind = partial(bind, cast._network)
    videos = [next(one.latents(PROMPTS[:1], [0], 2)) for one in (stored, cast)]
    assert torch.equal(*videos)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_weights_go_straight_to_the_device(wan_folder: Path, dtype: torch.dtype | None) -> None:
    """In bytes of live tensors on the CPU: one tensor at a time."""
    live = HostLive([])
    with live:
        network = load_network(wan_folder, dtype, "meta")
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}
    stored = load_network(wan_folder)
    largest = max(parameter.nbytes for parameter in stored.parameters())
    whole = sum(parameter.nbytes for parameter in stored.parameters())
    assert 0 < live.peak <= 2 * largest < whole / 2


def test_a_checkpoint_is_merged_where_its_weights_are(wan_folder: Path) -> None:
    """The adapter's device multiplies; the base is moved there one tensor at a time."""
    size = LoraSize(4, 4)
    adapter = Backbone(two_time_from(load_network(wan_folder)), lora=size).state_dict_of("student")
    on_meta = {name: value.to("meta") for name, value in adapter.items()}
    merged = MergedNetwork(two_time_from(load_network(wan_folder)), on_meta, size).lazy_weights()
    assert merged["blocks.0.attn1.to_q.weight"].load().device.type == "meta"
    assert merged["blocks.0.attn2.to_q.weight"].load().device.type == "cpu"


def test_a_frozen_score_without_adapters_is_stored_in_the_precision_of_the_products() -> None:
    network = open_model("tiny", load_recipe("tiny")).network
    roles = Backbone(two_time_from(network), ("student", "real", "fake"), teacher=network, precision="bf16")
    for role, expected in {"student": torch.float32, "real": torch.bfloat16, "fake": torch.float32}.items():
        assert dtypes(roles.network_of(role))["blocks.0.attn1.to_q.weight"] == expected, role  # type: ignore[arg-type]


def test_every_prompt_is_encoded_once_for_all_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    original = TextEncoder.encode

    def encode(self: TextEncoder, prompts: Any, *args: Any, **options: Any) -> Tensor:
        encoded.extend(prompts)
        return original(self, prompts, *args, **options)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    opened = VideoSampler.load("tiny-anyflow", recipe(), device="cpu")
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    for nfe in (1, 2):
        for _ in opened.latents(prompts, [0, 1, 2], nfe, batch=2):
            pass
    assert encoded == PROMPTS


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_allocates_one_tensor_above_what_stays(
    wan_folder: Path, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """In bytes of the CPU's allocator, which also sees copies inside of operators; without mapped files."""
    save_pipeline(tmp_path / "saved", load_network(wan_folder), wan_folder, {}, dtype=stored)
    (file,) = (tmp_path / "saved" / "transformer").glob("*.safetensors")
    network, changes = allocations(tmp_path / "saved", dtype, file.stat().st_size)
    largest = max(p.nbytes for p in network.parameters() if p.dtype == dtype)
    held = list(itertools.accumulate(changes))
    assert max(held, default=0) - sum(changes) <= largest
    assert sum(changes) <= sum(p.nbytes for p in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opening_a_pickled_file_allocates_its_weights_and_no_copies(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Freed copies of larger tensors between those that stay are holes that the allocator keeps."""
    file = tmp_path / "wan.pt"
    torch.save(written.as_original(written.reference().state_dict()), file)
    network, changes = allocations(file, dtype, file.stat().st_size)
    kept = sorted(p.nbytes for p in network.parameters())
    assert max(changes) <= kept[-1]
    assert sum(change for change in changes if change > 0) < 1.1 * sum(kept)


def allocations(model: Path, dtype: torch.dtype, mapped: int) -> tuple[FlowMapTransformer, list[int]]:
    """An opened network, and the bytes allocated and freed for it, without mappings of ``mapped`` bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        network = load_network(model, dtype)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return network, [change for change in changes if abs(change) != mapped]


def test_a_network_without_storage_does_not_import_the_compiler() -> None:
    """The import takes 0.6 s of every command that opens a model."""
    script = """
    import sys
    from anyflow_cli.model.config import NetworkConfig
    from anyflow_cli.model.network import on_meta
    network = on_meta(NetworkConfig(heads=2, head_dim=8, layers=1, ffn_dim=32, in_channels=4, out_channels=4))
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
