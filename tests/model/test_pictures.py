"""Networks under pictures: image-to-video Wan against diffusers' class, and given first frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.samplers import SAMPLERS
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import guided
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network
from tests.model.helpers import distance, inputs, ours, theirs
from tests.model.layouts.written import ORIGINAL_CONFIG, as_original
from tests.tiny_pipeline import CLIP_DIM, PICTURE_SETTINGS

TEXT = 512  # diffusers' class splits image tokens from text by this length
KINDS = PICTURE_SETTINGS
X = inputs(text=TEXT)


def reference_of(kind: str) -> Any:
    """The class of diffusers with random weights, its learned positions included."""
    network = theirs("WanTransformer3DModel", in_channels=20, **KINDS[kind])
    embedder = network.condition_embedder.image_embedder
    if embedder is not None and embedder.pos_embed is not None:
        embedder.pos_embed.data.normal_(generator=torch.Generator().manual_seed(2))
    return network


def condition_of(kind: str, batch: int = 2) -> Condition:
    draw = torch.Generator().manual_seed(4)
    picture = torch.randn(batch, 10 if "FLF" in kind else 5, CLIP_DIM, generator=draw)
    channels = torch.randn(batch, 3, 12, *X.z.shape[-2:], generator=draw)
    return Condition(X.text, channels, picture if KINDS[kind] else None)


def their_velocity(network: Any, condition: Condition, z: Tensor, t: Tensor) -> Tensor:
    assert condition.channels is not None
    picture = condition.picture
    if (
        picture is not None and picture.shape[1] == 10
    ):  # it takes the tokens of both pictures one after another
        picture = torch.unflatten(picture, 1, (2, 5)).flatten(0, 1)
    x = torch.cat((z, condition.channels), dim=2).transpose(1, 2)
    v: Tensor = network(x, 1000 * t, condition.text, picture, return_dict=False)[0]
    return v.transpose(1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_class_of_diffusers(kind: str) -> None:
    reference, condition = reference_of(kind), condition_of(kind)
    with torch.no_grad():
        expected = their_velocity(reference, condition, X.z, X.t[:, 0])
        bound = Conditioned(ours(reference), condition)
        assert distance(bound(X.z, X.t[:, 0], X.t[:, 0]), expected) < 1e-5
        trained = Conditioned(ours(reference).requires_grad_(True), condition)  # without shared keys
        assert distance(trained(X.z, X.t[:, 0], X.t[:, 0]), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_parameter_is_trained_like_that_of_diffusers(kind: str) -> None:
    reference, condition = reference_of(kind), condition_of(kind)
    network = ours(reference).requires_grad_(True)
    torch.autograd.backward(Conditioned(network, condition)(X.z, X.t[:, 0], X.t[:, 0]).square().sum())
    torch.autograd.backward(their_velocity(reference, condition, X.z, X.t[:, 0]).square().sum())
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert distance(parameter.grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_of_diffusers_is_written_as_it_was_read(kind: str) -> None:
    reference = reference_of(kind)
    written = ours(reference).config.to_diffusers()
    stated = {name: getattr(reference.config, name) for name in reference.config if name[0] != "_"}
    assert {name: written[name] for name in stated} == stated | {"patch_size": [1, 2, 2]}
    two_time = two_time_from(ours(reference)).config
    assert NetworkConfig.from_diffusers(two_time.to_diffusers()) == two_time


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_follow_their_samples(kind: str) -> None:
    network, condition = ours(reference_of(kind)), condition_of(kind)
    index, t = torch.tensor([1, 0, 1]), X.t[:, 0]
    with torch.no_grad():
        whole = Conditioned(network, condition)(X.z, t, t)
        some = Conditioned(network, condition).select(index)(X.z[index], t[index], t[index])
        assert distance(some, whole[index]) < 1e-5
        null = Conditioned(network, condition.with_text(torch.zeros(TEXT, 32)))
        both = Conditioned(network, condition).concat(null)(
            X.z.repeat(2, 1, 1, 1, 1), t.repeat(2), t.repeat(2)
        )
        assert distance(both[:2], whole) < 1e-5
        assert distance(both[2:], null(X.z, t, t)) < 1e-5
        assert distance(both[2:], whole) > 1e-3


@pytest.fixture(scope="module")
def flow_map() -> Any:
    return two_time_from(ours(theirs("WanTransformer3DModel")))


def with_frame() -> Condition:
    return Condition(X.text, frames=torch.randn(2, 1, 8, 4, 6, generator=torch.Generator().manual_seed(5)))


def test_a_given_frame_is_clean_at_time_0_and_has_no_velocity(flow_map: Any) -> None:
    condition, t = with_frame(), X.t[:, 0]
    clean = torch.cat((condition.put_back(X.z)[:, :1], X.z[:, 1:]), dim=1)
    at = torch.stack((torch.zeros(2), t, t), dim=1)
    expected = flow_map(clean, at, at / 2, X.text)
    bound = Conditioned(flow_map, condition)
    for z in (X.z, clean):  # whatever a sampler made of the frame
        for times in (t, X.t.clone()):
            if times.dim() == 2:
                times[:, 1:] = t[:, None]
            u = bound(z, times, times / 2)
            assert distance(u[:, 1:], expected[:, 1:]) < 1e-5
            assert not u[:, 0].any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_leaves_a_given_frame(flow_map: Any, name: str) -> None:
    condition = with_frame()
    cond = Conditioned(flow_map, condition)
    model = guided(cond, Conditioned(flow_map, condition.with_text(torch.zeros(TEXT, 32))), 2.0)
    generator = torch.Generator().manual_seed(1)
    start = condition.put_back(X.z)
    end = condition.put_back(SAMPLERS[name](model, start, grid(3, 5.0), generator))
    torch.testing.assert_close(end[:, :1], condition.frames)
    other = condition.put_back(SAMPLERS[name](model, X.z, grid(3, 5.0), generator.manual_seed(1)))
    assert distance(other, end) < 1e-6  # the start's own first frame does not matter


# Wan's own names beside those of diffusers, for what an image-to-video network has in addition.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stated", [False, True], ids=["one file", "folder"])
def test_original_files_open_as_the_network_of_diffusers(tmp_path: Path, kind: str, stated: bool) -> None:
    settings = KINDS[kind] | ({"added_kv_proj_dim": 256} if KINDS[kind] else {})
    network = theirs("WanTransformer3DModel", in_channels=20, attention_head_dim=128, **settings)
    (tmp_path / "wan").mkdir()
    file = tmp_path / "wan" / "diffusion_pytorch_model.safetensors"
    save_file(as_original(network.state_dict()), file)
    if stated:
        kinds = {"model_type": "flf2v" if "FLF" in kind else "i2v", "in_dim": 20, "out_dim": 8}
        (tmp_path / "wan" / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | kinds))
    opened = load_network(file.parent if stated else file)
    assert opened.config == ours(network).config
    for name, tensor in network.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name
