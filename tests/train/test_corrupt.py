"""Corrupt samples in training: replaced and counted in the same way by one process and by two."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import LatentSample, shard_path, write_manifest, write_negative, write_shard
from anyflow_cli.errors import UsageError
from anyflow_cli.model.parallelize import parallelize
from anyflow_cli.recipe.schema import LaunchSection, ModelSection
from anyflow_cli.train.preview import PreviewSettings, make_preview
from tests.train.ranks import start
from tests.train.small import LATENT, NEGATIVE, backbone, rows, trainer

BATCH, COUNT, BAD = 4, 12, (2, 3, 9)


def run(directory: Path, data: Path, max_corrupt: int, context: int = 1) -> str:
    """Train one epoch; the message if that ends early."""
    batches = Batches(LatentData(data, len(NEGATIVE)), BATCH, 1, max_corrupt)
    hooks = {"launch": LaunchSection(context_parallel=context)}
    steps = COUNT // BATCH
    try:
        trainer(directory, source=batches, hooks=hooks, steps=steps, global_batch=BATCH, log_every=1).run()
    except UsageError as error:
        return error.message
    return str(sorted(batches.corrupt))


def run_all(directory: Path, data: Path, others: Path) -> None:
    """Each process has samples of its own; then both share each, and those of one are all corrupt."""
    rank = int(os.environ["RANK"])
    for allowed in (3, 1):
        said = run(directory / str(allowed), data, allowed)
        (directory / f"{allowed}-{rank}.txt").write_text(said)
    for name, places in (("shared", (data, others)), ("lost", (others, data))):
        said = run(directory / name, places[rank], 3, context=2)
        (directory / f"{name}-{rank}.txt").write_text(said)
    roles, together = backbone("flow-map"), LaunchSection(context_parallel=2)
    parallelize(roles.networks(), ModelSection(), together, torch.device("cpu"))
    latents = LatentData((data, others)[rank], len(NEGATIVE))
    how = PreviewSettings("flow-map", (1,), captions=2)
    make_preview(directory, roles, latents, directory, how, ModelSection(precision="fp32"), writes=False)(0)


def write_data(directory: Path, bad: Collection[int]) -> Path:
    generator = torch.Generator().manual_seed(0)
    samples = [
        LatentSample(
            index, f"caption {index}",
            torch.randn(LATENT, generator=generator) / (index not in bad), torch.zeros(1, 8),
        )
        for index in range(COUNT)
    ]  # fmt: skip
    directory.mkdir()
    write_negative(directory, NEGATIVE)
    write_manifest(directory, [write_shard(shard_path(directory, 0), samples)], {})
    return directory


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave; with the same data each, or with data of which one can read nothing."""
    directory = tmp_path_factory.mktemp("two")
    data, others = write_data(directory / "data", BAD), write_data(directory / "others", range(COUNT))
    assert start(2, run_all, directory, data, others) == [0, 0]
    return directory


def test_two_processes_replace_and_count_the_same_samples_as_one(tmp_path: Path, two: Path) -> None:
    alone = {allowed: run(tmp_path / f"alone-{allowed}", two / "data", allowed) for allowed in (3, 1)}
    assert alone[3] == str(list(BAD))
    assert "samples of" in alone[1]
    assert "(data.max_corrupt)" in alone[1]
    for allowed, said in alone.items():
        assert [(two / f"{allowed}-{rank}.txt").read_text() for rank in (0, 1)] == [said, said]
    for here, there in zip(rows(tmp_path / "alone-3"), rows(two / "3"), strict=True):
        assert there == pytest.approx(here, rel=2e-3, abs=1e-5)
    assert sum(row.get("corrupt", 0) for row in rows(tmp_path / "alone-3")) == len(BAD)


def test_processes_that_share_samples_train_on_what_the_first_one_reads(tmp_path: Path, two: Path) -> None:
    """The other one's copies of the samples are all corrupt. Previews are of what the first reads, too."""
    found = run(tmp_path / "alone", two / "data", 3)
    assert [(two / f"shared-{rank}.txt").read_text() for rank in (0, 1)] == [found, found]
    for here, there in zip(rows(tmp_path / "alone"), rows(two / "shared"), strict=True):
        assert there == pytest.approx(here, rel=2e-3, abs=1e-5)


def test_processes_that_share_samples_fail_as_the_first_one_does(two: Path) -> None:
    said = {(two / f"lost-{rank}.txt").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert "consecutive samples" in said.pop()
