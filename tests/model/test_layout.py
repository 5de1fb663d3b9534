"""Layouts: groups and spans that follow from segments, and equality with a mask over one sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model import blocks
from anyflow_cli.model.attention import Kernel, attend
from anyflow_cli.model.causal import teacher_forcing
from anyflow_cli.model.layout import Layout, Segment, bidirectional
from tests.model.helpers import distance, inputs, ours, theirs

PARTITIONS = [(1, 2, 1, 2), (2, 2), (1, 1, 1, 1, 1)]


def chunk_causal(partition: tuple[int, ...], height: int, width: int) -> Layout:
    """Every chunk attends to itself and to all before it."""
    firsts = [sum(partition[:i]) for i in range(len(partition))]
    segments = [Segment(firsts[i], n, tuple(range(i + 1))) for i, n in enumerate(partition)]
    return Layout(tuple(segments), height, width)


def forcing(partition: tuple[int, ...], full: int, height: int, width: int) -> Layout:
    config = ours(theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=full)).config
    return teacher_forcing(config, partition, height, width)


def test_the_bidirectional_layout_is_one_span_and_one_group() -> None:
    layout = bidirectional(3, 4, 6)
    assert layout.frames == 3
    assert [span.tokens for span in layout.even_spans] == [slice(0, 18)]
    assert [(group.queries, group.keys) for group in layout.groups] == [(slice(0, 18), (slice(0, 18),))]


def test_groups_and_spans_of_teacher_forcing() -> None:
    layout = forcing((1, 2, 1), 2, 8, 8)  # 4 tokens a compressed frame, 16 a full one
    assert [span.tokens for span in layout.even_spans] == [slice(0, 4), slice(4, 4 + 5 * 16)]
    assert [span.frames for span in layout.even_spans] == [slice(0, 1), slice(1, 6)]
    keys = [group.keys for group in layout.groups]
    assert keys == [
        (slice(0, 4),),  # context sees itself
        (slice(0, 36),),  # the first noisy chunk: context and itself
        (
            slice(0, 4),
            slice(36, 84),
        ),  # the second: context, itself, then the first clean chunk, which touches it
        (slice(0, 4), slice(52, 84)),  # the first clean chunk
    ]  # the last chunk has no clean copy: nothing would see it


def test_neighbors_with_the_same_view_attend_together() -> None:
    both = Layout((Segment(0, 1, (0, 1)), Segment(1, 2, (0, 1))), 4, 4)
    assert [group.queries for group in both.groups] == [slice(0, 12)]


def test_frames_that_the_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(UsageError, match="5x4"):
        bidirectional(1, 5, 4)
    with pytest.raises(UsageError, match="4x4 patches"):
        Layout((Segment(0, 1, (0,), "compressed"),), 6, 8)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_query_groups_equal_a_mask(partition: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    network = ours(theirs("AnyFlowTransformer3DModel"))
    x = inputs(frames=sum(partition))
    layout = chunk_causal(partition, 4, 6)
    grouped = network(x.z, x.t, x.r, x.text, layout)

    chunk_of_token = torch.repeat_interleave(torch.arange(len(partition)), torch.tensor(partition) * 6)
    mask = chunk_of_token[:, None] >= chunk_of_token[None, :]

    def masked(query: Tensor, key: Tensor, value: Tensor, kernel: Kernel) -> Tensor:
        if key.shape[1] != len(mask):  # the text's
            return attend(query, key, value, kernel)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2)

    monkeypatch.setattr(blocks, "attend", masked)
    assert distance(grouped, network(x.z, x.t, x.r, x.text)) < 1e-5


def test_segments_with_one_view_equal_one_segment() -> None:
    network = ours(theirs("AnyFlowTransformer3DModel"))
    x = inputs(frames=4)
    split = Layout((Segment(0, 1, (0, 1)), Segment(1, 3, (0, 1))), 4, 6)
    assert distance(network(x.z, x.t, x.r, x.text, split), network(x.z, x.t, x.r, x.text)) < 1e-6


def test_one_time_per_sample_serves_every_segment() -> None:
    network = ours(theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=1))
    x, layout = inputs(frames=5, height=8, width=8), forcing((1, 1, 2), 2, 8, 8)
    t, r = x.t[:, 0], x.r[:, 0]
    each = network(x.z, t[:, None].expand(2, 5), r[:, None].expand(2, 5), x.text, layout)
    assert distance(network(x.z, t, r, x.text, layout), each) < 1e-6


def test_cached_segments_are_read_from_the_cache() -> None:
    """4 tokens per compressed frame, 16 per full frame."""
    past = (
        Segment(0, 1, (0,), "compressed", cached=True, cache_offset=0),
        Segment(3, 1, (1,), cached=True, cache_offset=40),
    )
    again = Segment(1, 2, (0, 2), "compressed", is_output=False, cache_offset=4)
    layout = Layout((*past, again, Segment(4, 1, (0, 1, 2, 3))), 8, 8)
    assert layout.frames == 3
    assert [span.tokens for span in layout.spans] == [slice(0, 8), slice(8, 24)]
    assert [(group.keys, group.cached) for group in layout.groups] == [
        ((slice(0, 8),), (slice(0, 4),)),
        ((slice(0, 24),), (slice(0, 4), slice(40, 56))),
    ]
    assert [(write.tokens, write.cache) for write in layout.writes] == [(slice(0, 8), slice(4, 12))]
