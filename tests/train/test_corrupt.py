"""Corrupt samples while training: replaced and counted alike on one process and on two."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import LatentSample, shard_path, write_manifest, write_negative, write_shard
from anyflow_cli.errors import UsageError
from tests.train.small import LATENT, NEGATIVE, rows, trainer

BATCH, COUNT, BAD = 4, 12, (2, 3, 9)


def run(directory: Path, data: Path, max_corrupt: int) -> str:
    """Train one epoch; the message if that ends early."""
    batches = Batches(LatentData(data, len(NEGATIVE)), BATCH, 1, max_corrupt)
    try:
        trainer(directory, source=batches, steps=COUNT // BATCH, global_batch=BATCH, log_every=1).run()
    except UsageError as error:
        return error.message
    return str(sorted(batches.corrupt))


def process(rank: int, port: int, directory: Path, data: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    for allowed in (3, 1):
        said = run(directory / str(allowed), data, allowed)
        (directory / f"{allowed}-{rank}.txt").write_text(said)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    samples = [
        LatentSample(
            index, f"caption {index}",
            torch.randn(LATENT, generator=generator) / (index not in BAD), torch.zeros(1, 8),
        )
        for index in range(COUNT)
    ]  # fmt: skip
    write_negative(directory, NEGATIVE)
    write_manifest(directory, [write_shard(shard_path(directory, 0), samples)], {})
    return directory


def test_two_processes_replace_and_count_as_one(tmp_path: Path, data: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=process, args=(rank, port, tmp_path, data)) for rank in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    alone = {allowed: run(tmp_path / f"alone-{allowed}", data, allowed) for allowed in (3, 1)}
    assert alone[3] == str(list(BAD))
    assert "samples of" in alone[1]
    assert "(data.max_corrupt)" in alone[1]
    for allowed, said in alone.items():
        assert [(tmp_path / f"{allowed}-{rank}.txt").read_text() for rank in (0, 1)] == [said, said]
    for here, there in zip(rows(tmp_path / "alone-3"), rows(tmp_path / "3"), strict=True):
        assert there == pytest.approx(here, rel=2e-3, abs=1e-5)
    assert sum(row.get("corrupt", 0) for row in rows(tmp_path / "alone-3")) == len(BAD)
