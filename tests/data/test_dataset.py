from __future__ import annotations

import json
import logging
from itertools import islice
from pathlib import Path

import pytest
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import LatentSample, shard_path, write_manifest, write_shard
from anyflow_cli.errors import UsageError
from tests.data.datasets import SHAPE, TEXT_DIM, make_data, make_sample

TOKENS = 6


@pytest.fixture
def data(tmp_path: Path) -> LatentData:
    return LatentData(make_data(tmp_path / "d"), TOKENS)


def test_an_epoch_visits_every_sample_once_across_batch_borders(data: LatentData) -> None:
    batches = Batches(data, 4, seed=0)
    flat = [position for step in range(15) for position in batches.positions(step)]  # six epochs of ten
    epochs = [flat[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_order_follows_from_seed_and_step_alone(data: LatentData) -> None:
    forwards = [Batches(data, 4, seed=3).positions(step) for step in range(8)]
    fresh = Batches(data, 4, seed=3)
    assert [fresh.positions(step) for step in reversed(range(8))] == forwards[::-1]
    assert [Batches(data, 4, seed=4).positions(step) for step in range(8)] != forwards


def test_parts_of_ranks_make_the_global_batch(data: LatentData) -> None:
    batches = Batches(data, 6, seed=1)
    whole = batches.load(2)
    parts = [batches.load(2, slice(rank * 2, rank * 2 + 2)) for rank in range(3)]
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert [caption for part in parts for caption in part.captions] == whole.captions


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_changes_nothing_and_starts_anywhere(data: LatentData, workers: int) -> None:
    batches = Batches(data, 4, seed=1)
    read = list(islice(batches.stream(5, slice(0, 2), workers), 4))
    for step, batch in enumerate(read, 5):
        assert torch.equal(batch.latents, batches.load(step, slice(0, 2)).latents)


def test_a_sample_keeps_its_caption_text_and_latents(data: LatentData) -> None:
    batch = data.batch([7, 2])
    assert batch.captions == ["caption 7", "caption 2"]
    assert torch.equal(batch.latents, torch.stack([torch.full(SHAPE, 7.0), torch.full(SHAPE, 2.0)]))
    assert batch.condition.text.shape == (2, TOKENS, TEXT_DIM)
    assert batch.condition.text.sum((1, 2)).tolist() == [
        2 * TEXT_DIM,
        3 * TEXT_DIM,
    ]  # 1 + index % 3 tokens, then zeros
    assert torch.equal(batch.condition.text[1, 3:], torch.zeros(TOKENS - 3, TEXT_DIM))


def test_what_the_data_set_says_of_itself(data: LatentData) -> None:
    assert (len(data), data.latent_shape, data.text_dim) == (10, SHAPE, TEXT_DIM)
    assert data.negative.shape == (TOKENS, TEXT_DIM)
    assert data.negative[:2].flatten().tolist() == [7.0] * 2 * TEXT_DIM
    assert not data.negative[2:].any()


def test_stored_bf16_is_read_as_fp32(tmp_path: Path) -> None:
    sample = LatentSample(0, "a", torch.ones(SHAPE).bfloat16(), torch.ones(2, TEXT_DIM).bfloat16())
    write_manifest(tmp_path, [write_shard(shard_path(tmp_path, 0), [sample])], {})
    batch = LatentData(tmp_path, TOKENS).batch([0])
    assert batch.latents.dtype == batch.condition.text.dtype == torch.float32


def test_longer_texts_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="texts of 3 tokens") as error:
        LatentData(make_data(tmp_path), 2).batch([2])
    assert error.value.hint is not None
    assert "model.max_text_tokens" in error.value.hint


def test_a_corrupt_sample_is_named_once_and_its_neighbour_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = LatentData(make_data(tmp_path, nan=(3, 4, 9)), TOKENS)
    with caplog.at_level(logging.WARNING):
        batch = data.batch([1, 3, 9, 3])
    assert batch.captions == ["caption 1", "caption 5", "caption 0", "caption 5"]
    assert batch.replaced == [1, 2, 3]
    assert len(caplog.records) == 3
    assert "Sample 00000003 of" in caplog.text


def test_a_flipped_bit_is_a_corrupt_sample(tmp_path: Path) -> None:
    data = LatentData(make_data(tmp_path), TOKENS)
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1  # in the latents of sample 0, which stay finite
    path.write_bytes(content)
    assert data.batch([0, 1]).captions == ["caption 1", "caption 1"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_global_batches_stay_exact_around_corrupt_samples(tmp_path: Path, ranks: int) -> None:
    batches = Batches(LatentData(make_data(tmp_path, nan=(2, 3, 9)), TOKENS), 6, seed=1, max_corrupt=3)
    for step in range(5):
        whole = batches.load(step)
        parts = [batches.load(step, slice(rank, None, ranks)) for rank in range(ranks)]
        assert sorted(whole.captions) == sorted(caption for part in parts for caption in part.captions)
        met = {rank + place * ranks for rank, part in enumerate(parts) for place in part.replaced}
        assert (
            met
            == set(whole.replaced)
            == {place for place, position in enumerate(batches.positions(step)) if position in (2, 3, 9)}
        )
        batches.account(step, met)
    assert batches.corrupt == {2, 3, 9}


def test_more_corrupt_samples_than_the_recipe_allows_end_the_run(tmp_path: Path) -> None:
    batches = Batches(LatentData(make_data(tmp_path), TOKENS), 4, seed=0, max_corrupt=2)
    batches.account(0, [0, 1])
    batches.account(0, [1])  # known already, as after an epoch
    with pytest.raises(UsageError, match=r"3 samples .* are corrupt by step 2; .* 2 \(data\.max_corrupt\)"):
        batches.account(1, [0])


def test_a_stretch_of_corrupt_samples_is_no_matter_of_samples(tmp_path: Path) -> None:
    data = LatentData(make_data(tmp_path, count=20, size=20, nan=range(18)), TOKENS)
    assert data.batch([2]).captions == ["caption 18"]
    with pytest.raises(UsageError, match="More than 16 consecutive samples"):
        data.batch([1])


def test_a_missing_or_cut_shard_is_named_before_training(tmp_path: Path) -> None:
    shard = make_data(tmp_path) / "00001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-600])
    with pytest.raises(UsageError, match=r"00001\.tar has .* bytes"):
        LatentData(tmp_path, TOKENS)
    shard.unlink()
    with pytest.raises(UsageError, match=r"00001\.tar is missing"):
        LatentData(tmp_path, TOKENS)


def test_a_shard_that_vanishes_while_training_is_named(data: LatentData) -> None:
    Path(data.storage.root, "00002.tar").unlink()
    assert data.batch([0]).captions == ["caption 0"]
    with pytest.raises(UsageError, match=r"00002\.tar is missing"):
        data.batch([9])


def test_another_latent_shape_is_refused_by_name(tmp_path: Path) -> None:
    odd = LatentSample(1, "b", torch.zeros(1, 3, 4, 4), torch.zeros(1, TEXT_DIM))
    first, second = (write_shard(shard_path(tmp_path, n), [s]) for n, s in enumerate((make_sample(0), odd)))
    write_manifest(tmp_path, [first], {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    forged = manifest["shards"][0] | {"name": second.name, "bytes": second.bytes}
    manifest["shards"].append(forged)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"count": 2}))
    with pytest.raises(
        UsageError, match=r"Sample 00000001 of .*latents \(1, 3, 4, 4\), the data set \(2, 3, 4, 4\)"
    ):
        LatentData(tmp_path, TOKENS).batch([1])
