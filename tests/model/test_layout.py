"""Layouts: what follows from segments, and that several compute what a mask over one sequence does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.errors import UsageError
from anyflow_cli.model import blocks
from anyflow_cli.model.layout import Layout, Segment, bidirectional
from tests.model.helpers import distance, inputs, ours, theirs

PARTITIONS = [(1, 2, 1, 2), (2, 2), (1, 1, 1, 1, 1)]


def chunk_causal(partition: tuple[int, ...], height: int, width: int) -> Layout:
    """Every chunk sees itself and all before it."""
    firsts = [sum(partition[:i]) for i in range(len(partition))]
    segments = [Segment(firsts[i], n, tuple(range(i + 1))) for i, n in enumerate(partition)]
    return Layout(tuple(segments), height, width)


def teacher_forcing(partition: tuple[int, ...], full: int, height: int, width: int) -> Layout:
    """[compressed context | noisy full chunks | the same chunks clean] of FACTS 4, as plain data."""
    chunks = [(sum(partition[:i]), n) for i, n in enumerate(partition)]
    split = max(len(chunks) - full, 0)
    past, window = chunks[:split], chunks[split:]
    context = tuple(range(split))
    clean = [split + len(window) + i for i in range(len(window))]
    segments = [Segment(*chunk, context[: i + 1], "compressed", read=False) for i, chunk in enumerate(past)]
    segments += [Segment(*chunk, (*context, split + i, *clean[:i])) for i, chunk in enumerate(window)]
    segments += [Segment(*chunk, (*context, *clean[: i + 1]), read=False) for i, chunk in enumerate(window)]
    return Layout(tuple(segments), height, width)


def test_the_bidirectional_layout_is_one_span_and_one_group() -> None:
    layout = bidirectional(3, 4, 6)
    assert layout.frames == 3
    assert [span.tokens for span in layout.even_spans] == [slice(0, 18)]
    assert [(group.queries, group.keys) for group in layout.groups] == [(slice(0, 18), (slice(0, 18),))]


def test_groups_and_spans_of_teacher_forcing() -> None:
    layout = teacher_forcing(
        (1, 2, 1), full=2, height=8, width=8
    )  # 4 tokens a compressed frame, 16 a full one
    assert [span.tokens for span in layout.even_spans] == [slice(0, 4), slice(4, 4 + 6 * 16)]
    assert [span.frames for span in layout.even_spans] == [slice(0, 1), slice(1, 7)]
    keys = [group.keys for group in layout.groups]
    assert keys == [
        (slice(0, 4),),  # context sees itself
        (slice(0, 36),),  # the first noisy chunk: context and itself
        (
            slice(0, 4),
            slice(36, 84),
        ),  # the second: context, itself, then the first clean chunk, which touches it
        (slice(0, 4), slice(52, 84)),  # the first clean chunk
        (slice(0, 4), slice(52, 100)),
    ]


def test_neighbours_with_the_same_view_attend_together() -> None:
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
    attend = blocks.attend

    def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if key.shape[1] != len(mask):  # the text's
            return attend(query, key, value)
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


def test_one_time_a_sample_serves_every_segment() -> None:
    network = ours(theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=1))
    x, layout = inputs(frames=5, height=8, width=8), teacher_forcing((1, 2), 1, 8, 8)
    t, r = x.t[:, 0], x.r[:, 0]
    each = network(x.z, t[:, None].expand(2, 5), r[:, None].expand(2, 5), x.text, layout)
    assert distance(network(x.z, t, r, x.text, layout), each) < 1e-6


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_teacher_forcing_as_a_layout_equals_the_masked_causal_class(clean: bool) -> None:
    """The causal layouts are data too; diffusers' training path takes a mask, padding and branches."""
    partition, limit = (1, 2, 1, 2), 2
    reference = theirs("AnyFlowFARTransformer3DModel", full_chunk_limit=limit, chunk_partition=partition)
    x = inputs(frames=6, height=8, width=8)
    t, r = x.t.clone(), x.r.clone()
    t[:, :3] = r[:, :3] = 0
    tail = torch.randn(2, 3, 8, 8, 8, generator=torch.Generator().manual_seed(5))
    zeros = torch.zeros(2, 3)
    options: dict[str, Any] = {"clean_hidden_states": tail, "clean_timestep": zeros} if clean else {}
    with torch.no_grad():
        expected = reference(x.z, 1000 * t, 1000 * r, x.text, list(partition), return_dict=False, **options)[
            0
        ]

    layout = teacher_forcing(partition, limit, 8, 8)
    z, t, r = (torch.cat(pair, 1) for pair in ((x.z, tail), (t, zeros), (r, zeros)))
    if not clean:
        layout = Layout(_without_clean(layout), 8, 8)
        z, t, r = x.z, t[:, :6], r[:, :6]
    assert distance(ours(reference)(z, t, r, x.text, layout), expected) < 1e-5


def _without_clean(layout: Layout) -> tuple[Segment, ...]:
    """Context and noisy chunks, each seeing all before it and itself."""
    return tuple(
        Segment(s.first, s.frames, tuple(range(i + 1)), s.patch, s.read)
        for i, s in enumerate(layout.segments[:4])
    )
