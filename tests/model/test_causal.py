"""Causal layouts against diffusers' masked training path, and their causality."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.causal import (
    TeacherForced,
    causal_from,
    check_partition,
    partition_for,
    remembered_for,
    resolved_chunks,
    split_after,
    teacher_forcing,
)
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.recipe import schema
from tests.model.helpers import Inputs, distance, inputs, ours, theirs
from tests.tiny_pipeline import sizes

FLEX = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
# partition, chunks in full, latent height and width
CASES = [((1, 2, 1, 2), 2, (8, 8)), ((1, 3, 2), 1, (4, 12)), ((2, 2), 3, (8, 4)), ((3,), 1, (4, 4))]


def far(full_chunks: int = 2, partition: tuple[int, ...] = (1, 2, 1, 2)) -> Any:
    return theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=full_chunks, chunk_partition=partition)


def window(partition: tuple[int, ...], full_chunks: int) -> int:
    return sum(partition[-full_chunks:])


@FLEX
@pytest.mark.parametrize(("partition", "full_chunks", "size"), CASES)
def test_teacher_forcing_equals_the_masked_path_of_diffusers(
    partition: tuple[int, ...], full_chunks: int, size: tuple[int, int]
) -> None:
    reference, frames = far(full_chunks, partition), sum(partition)
    x, video = inputs(frames=frames, height=size[0], width=size[1]), clean_like(frames, size)
    noisy = window(partition, full_chunks)
    z = torch.cat((video[:, : frames - noisy], x.z[:, frames - noisy :]), dim=1)
    t, r = x.t.clone(), x.r.clone()
    t[:, : frames - noisy] = r[:, : frames - noisy] = 0
    with torch.no_grad():
        expected = reference(
            z, 1000 * t, 1000 * r, x.text, list(partition), return_dict=False,
            clean_hidden_states=video[:, frames - noisy :], clean_timestep=torch.zeros(2, noisy),
        )[0]  # fmt: skip
    model = TeacherForced(Conditioned(ours(reference), Condition(x.text)), video, partition)
    got = model(x.z[:, model.window], x.t[:, model.window], x.r[:, model.window])
    assert distance(got, expected) < 1e-5


@FLEX
@pytest.mark.parametrize(("partition", "full_chunks", "size"), CASES[:2])
def test_without_clean_copies_too(
    partition: tuple[int, ...], full_chunks: int, size: tuple[int, int]
) -> None:
    reference = far(full_chunks, partition)
    x = inputs(frames=sum(partition), height=size[0], width=size[1])
    with torch.no_grad():
        expected = reference(x.z, 1000 * x.t, 1000 * x.r, x.text, list(partition), return_dict=False)[0]
    network = ours(reference)
    layout = teacher_forcing(network.config, partition, *size, clean=False)
    assert distance(network(x.z, x.t, x.r, x.text, layout), expected) < 1e-5


def clean_like(frames: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(2, frames, 8, *size, generator=torch.Generator().manual_seed(5))


def forced(network: FlowMapTransformer, x: Inputs, video: Tensor, partition: tuple[int, ...]) -> Tensor:
    """Velocity of the window, all of whose frames are noised alike."""
    model = TeacherForced(Conditioned(network, Condition(x.text)), video, partition)
    return model(x.z[:, model.window], x.t[:, 0], x.r[:, 0])


@pytest.mark.parametrize("full_chunks", [2, 4])
def test_a_later_chunk_never_changes_an_earlier_output(full_chunks: int) -> None:
    partition, frames = (1, 2, 1, 2), 6
    network = ours(far(full_chunks, partition))
    x, video = inputs(frames=frames, height=8, width=8), clean_like(frames, (8, 8))
    before = forced(network, x, video, partition)
    start = frames - before.shape[1]
    firsts = [sum(partition[:i]) for i in range(len(partition))]
    for changed, first in enumerate(firsts):
        frame = slice(first, first + partition[changed])
        other, z = video.clone(), x.z.clone()
        other[:, frame] += 1
        z[:, frame] += 1
        after = forced(network, replace(x, z=z), other, partition)
        for chunk in range(len(partition)):
            own = slice(firsts[chunk] - start, firsts[chunk] - start + partition[chunk])
            if own.start < 0:
                continue
            if chunk < changed:
                torch.testing.assert_close(after[:, own], before[:, own], rtol=0, atol=0)
            else:
                assert distance(after[:, own], before[:, own]) > 1e-4


def test_a_noisy_chunk_does_not_see_its_own_clean_copy_nor_other_noise() -> None:
    partition = (1, 2, 2)
    network = ours(far(3, partition))
    x, video = inputs(frames=5, height=8, width=8), clean_like(5, (8, 8))
    before = forced(network, x, video, partition)
    other = video.clone()
    other[:, 3:] += 1  # the last chunk's copy, which nothing sees
    torch.testing.assert_close(forced(network, x, other, partition), before, rtol=0, atol=0)
    z = x.z.clone()
    z[:, :3] += 1
    after = forced(network, replace(x, z=z), video, partition)
    torch.testing.assert_close(after[:, 3:], before[:, 3:], rtol=0, atol=0)


def test_a_forced_velocity_carries_its_video() -> None:
    partition = (1, 2, 1, 2)
    network = ours(far(2, partition))
    x, video = inputs(frames=6, height=8, width=8), clean_like(6, (8, 8))
    model = TeacherForced(Conditioned(network, Condition(x.text)), video, partition)
    z, t, r = x.z[:, model.window], x.t[:, 0], x.r[:, 0]
    whole = model(z, t, r)
    order = torch.tensor([1, 0, 1])
    joined = model.select(torch.tensor([1])).concat(model.select(torch.tensor([0, 1])))
    assert distance(joined(z[order], t[order], r[order]), whole[order]) < 1e-6


def test_compressed_weights_start_as_those_of_diffusers() -> None:
    import diffusers

    fresh = ours(diffusers.AnyFlowFARTransformer3DModel(**sizes(full_chunk_limit=2)))
    made = causal_from(without_far(fresh), CausalConfig(full_chunks=2))
    assert made.config == fresh.config
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(made.state_dict()[name], value, rtol=0, atol=1e-7)


def without_far(network: FlowMapTransformer) -> FlowMapTransformer:
    plain = FlowMapTransformer(replace(network.config, causal=None))
    state = {name: value for name, value in network.state_dict().items() if "far_" not in name}
    plain.load_state_dict(state)
    return plain


def test_a_causal_network_starts_as_the_bidirectional_one() -> None:
    bidirectional = ours(theirs("AnyFlowTransformer3DModel"))
    x = inputs()
    got = causal_from(bidirectional)(x.z, x.t, x.r, x.text)
    torch.testing.assert_close(got, bidirectional(x.z, x.t, x.r, x.text), rtol=0, atol=0)


def test_partitions() -> None:
    causal = CausalConfig()
    assert partition_for(causal, 21) == (1, 3, 3, 3, 3, 3, 3, 2)
    assert partition_for(causal, 81) == (1, *[3] * 26, 2)
    assert partition_for(causal, 10) == (1, 3, 3, 3)
    assert partition_for(causal, 1) == (1,)
    assert partition_for(CausalConfig(partition=(3, 1)), 2) == (2,)
    assert split_after((1, 3, 3), 0) == (1, 3, 3)
    assert split_after((1, 3, 3), 1) == (1, 3, 3)
    assert split_after((1, 3, 3), 3) == (1, 2, 1, 3)
    assert split_after((1, 3, 3), 7) == (1, 3, 3)


@pytest.mark.parametrize("partition", [(1, 3), (1, 0, 4), (), (6, -1)])
def test_a_partition_that_is_not_the_videos_is_refused(partition: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="do not make up a video of 5"):
        check_partition(partition, 5)


def test_beyond_the_trained_length_no_more_is_remembered_than_was_ever_seen() -> None:
    causal = CausalConfig(full_chunks=3, partition=(1, 3, 3, 3, 3, 3, 3, 2))
    assert [remembered_for(causal, frames) for frames in (5, 21, 22, 81)] == [None, None, 5, 5]
    assert remembered_for(CausalConfig(full_chunks=3, partition=(1, 1)), 9) == 0
    assert [remembered_for(replace(causal, remember=2), frames) for frames in (21, 81)] == [None, 2]


@pytest.mark.parametrize(
    ("stated", "recipe", "used", "words"),
    [
        (True, (1, 3), (1, 3), None),
        (True, (1, 3, 3, 1), (1, 3), None),  # the model's, for a longer video
        (True, None, (1, 3), None),
        (False, (1, 2, 2), (1, 2, 2), "states no chunk_partition; the recipe's is used: 1, 2, 2"),
        (False, None, (1, 3), "states no chunk_partition; AnyFlow's default is used: 1, 3"),
    ],
)
def test_chunks_that_recipe_and_model_do_not_agree_on_are_named(
    stated: bool, recipe: tuple[int, ...] | None, used: tuple[int, ...], words: str | None
) -> None:
    causal = CausalConfig(full_chunks=2, partition=(1, 3), is_stated=stated)
    section = None if recipe is None else schema.CausalSection(partition=recipe)
    result, message = resolved_chunks(causal, section, "model")
    assert (result.partition, result.full_chunks) == (used, 2)
    assert message is None if words is None else re.search(words, str(message))


@pytest.mark.parametrize(("recipe", "followed"), [((2, 2), "1, 3"), ((1, 2, 2), "1, 3, 1")])
def test_chunks_that_a_model_was_not_trained_with_are_refused(recipe: tuple[int, ...], followed: str) -> None:
    causal = CausalConfig(full_chunks=2, partition=(1, 3))
    with pytest.raises(UsageError, match="trained with chunks of 1, 3 latent frames") as error:
        resolved_chunks(causal, schema.CausalSection(partition=recipe), "model")
    assert str(error.value.hint).endswith(f"--set 'model.causal.partition=[{followed}]'.")
