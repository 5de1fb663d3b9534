"""Causal sampling: equal to diffusers' pipeline where it has no padding; conditioning; steps per chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.samplers import SAMPLERS, flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import batch_time, flow_map, guided
from anyflow_cli.model.causal import TeacherForced
from anyflow_cli.model.chunk_sampling import Guidance, sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import save_pipeline
from tests.model.helpers import distance, inputs, ours, theirs
from tests.tiny_pipeline import SHIFT

PARTITION = (1, 2, 1)
TEXT = inputs().text


@pytest.fixture(scope="module")
def network() -> FlowMapTransformer:
    reference = theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=2, chunk_partition=PARTITION)
    return ours(reference)


def noise(frames: int = 4, height: int = 8, width: int = 8, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 8, height, width, generator=torch.Generator().manual_seed(1))


def sample(network: FlowMapTransformer, z: Tensor, *steps: int, **options: Any) -> Tensor:
    model = Conditioned(network, Condition(TEXT[: len(z)]))
    grids = [grid(n, SHIFT) for n in steps]
    sampler = SAMPLERS[options.pop("sampler", "flow-map")]
    return torch.cat(list(sample_chunks(model, z, PARTITION, sampler, grids, **options)), dim=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("given", [0, 1, 3])
def test_a_causal_folder_gives_the_latents_of_diffusers(
    network: FlowMapTransformer, wan_folder: Path, tmp_path: Path, given: int
) -> None:
    """Frames of 128 tokens: the only ones in which their sampling step attends to no padding."""
    from diffusers import AnyFlowFARPipeline

    folder = save_pipeline(tmp_path / "causal", network, wan_folder, {})
    pipeline = AnyFlowFARPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = noise(height=16, width=32, batch=1)
    start = noise(height=16, width=32, batch=1).flip(1)[:, :given] if given else None
    theirs_ = pipeline(
        prompt_embeds=TEXT[:1], latents=z.transpose(1, 2), video_latents=start, height=128, width=256,
        num_frames=13, num_inference_steps=2, output_type="latent",
    ).frames  # fmt: skip
    assert distance(sample(network, z, 2, given=start).transpose(1, 2), theirs_) < 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_runs_over_the_cache(network: FlowMapTransformer, sampler: str) -> None:
    x = sample(network, noise(), 2, sampler=sampler, generator=torch.Generator().manual_seed(0))
    assert x.shape == noise().shape
    assert x.isfinite().all()


def test_steps_can_differ_from_chunk_to_chunk(network: FlowMapTransformer) -> None:
    many, few, mixed = (sample(network, noise(), *steps) for steps in ((4,), (1,), (4, 1)))
    torch.testing.assert_close(mixed[:, :1], many[:, :1], rtol=0, atol=0)
    assert distance(mixed[:, 1:], many[:, 1:]) > 1e-3
    assert distance(mixed[:, 1:], few[:, 1:]) > 1e-3
    # One step is one jump over the clean past.
    model = Conditioned(network, Condition(TEXT))
    cache = KeyCache(network, PARTITION, (8, 8), 2)
    cache.append(mixed[:, :1], model)
    z = noise()[:, 1:3]
    jump = flow_map(cache.next_velocity(model), z, batch_time(1, z), batch_time(0, z))
    torch.testing.assert_close(mixed[:, 1:3], jump, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_given_frames_come_back_and_are_continued(network: FlowMapTransformer, count: int) -> None:
    start = noise().flip(1)[:, :count]
    x = sample(network, noise(), 2, given=start)
    torch.testing.assert_close(x[:, :count], start, rtol=0, atol=0)
    other = sample(network, noise(), 2, given=start + 1)
    assert count == 4 or distance(other[:, count:], x[:, count:]) > 1e-3


def test_a_chunk_given_in_part_is_completed_under_its_given_frames(network: FlowMapTransformer) -> None:
    """Two of three frames are given: the third sees both as clean past, at one step too."""
    start = noise().flip(1)[:, :2]
    x = sample(network, noise(), 1, given=start)
    video = torch.cat((start, x[:, 2:3]), dim=1)
    forced = TeacherForced(Conditioned(network, Condition(TEXT)), video, (1, 1, 1))
    z = noise()[:, 1:3]  # the window; only its second frame is asked for
    expected = flow_map(forced, z, batch_time(1, z), batch_time(0, z))[:, 1:]
    assert distance(x[:, 2:3], expected) < 1e-5


def test_guidance_is_that_of_two_models_side_by_side(network: FlowMapTransformer) -> None:
    model, null = (
        Conditioned(network, Condition(TEXT)),
        Conditioned(network, Condition(torch.zeros_like(TEXT))),
    )
    x = sample(network, noise(), 2, guidance=Guidance(null, 3.0))
    caches = [KeyCache(network, PARTITION, (8, 8), 2) for _ in range(2)]
    parts = []
    for chunk in caches[0].chunks:
        velocity = guided(caches[0].next_velocity(model), caches[1].next_velocity(null), 3.0)
        parts.append(flow_map_euler(velocity, noise()[:, chunk.slice], grid(2, SHIFT)))
        if chunk is not caches[0].chunks[-1]:
            for cache, condition in zip(caches, (model, null), strict=True):
                cache.append(parts[-1], condition)
    assert distance(x, torch.cat(parts, dim=1)) < 1e-5


def test_chunks_arrive_as_they_are_finished(network: FlowMapTransformer) -> None:
    """The first is there before the second has been begun."""
    z = noise()
    z[:, 1:] = torch.nan
    arriving = sample_chunks(
        Conditioned(network, Condition(TEXT)), z, PARTITION, flow_map_euler, [grid(2, SHIFT)]
    )
    assert next(arriving).isfinite().all()
    assert next(arriving).isnan().any()


def test_a_partition_of_another_length_is_refused(network: FlowMapTransformer) -> None:
    with pytest.raises(UsageError, match="do not make up a video of 5"):
        sample(network, noise(5), 1)
