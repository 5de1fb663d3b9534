from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from anyflow_cli.data.verify import verify
from anyflow_cli.errors import UsageError
from tests.data.datasets import make_data


def test_a_sound_data_set_has_no_problem(tmp_path: Path) -> None:
    seen: list[str] = []
    result = verify(make_data(tmp_path), seen.append)
    assert (result.shards, result.samples, result.problems) == (3, 10, ())
    assert seen == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_flipped_bit_is_found_and_its_sample_named(tmp_path: Path) -> None:
    shard = make_data(tmp_path) / "00001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # inside the tensors of its first sample, whose other checks it passes
    shard.write_bytes(content)
    of_shard, of_sample = verify(tmp_path).problems
    assert "00001.tar is not what was written (its hash differs)" in of_shard
    assert "Sample 00000004 of" in of_sample


def test_every_bad_sample_is_named(tmp_path: Path) -> None:
    make_data(tmp_path, count=200, size=50)
    bad = {3, 4, 49, 50, 120, 199}
    for index in bad:
        path, row = tmp_path / f"{index // 50:05d}.tar", index % 50
        offset = int(np.load(path.with_suffix(".npy"))[row]["offset"])
        content = bytearray(path.read_bytes())
        content[offset + 250] ^= 4
        path.write_bytes(content)
    problems = verify(tmp_path).problems
    named = {int(problem[7:15]) for problem in problems if problem.startswith("Sample ")}
    assert named == bad
    assert len(problems) == len(bad) + 4  # each shard's hash differs as well


def test_a_lost_index_is_found(tmp_path: Path) -> None:
    (make_data(tmp_path) / "00001.npy").unlink()
    (problem,) = verify(tmp_path).problems
    assert "00001.tar has no index" in problem


@pytest.mark.parametrize("left", [1000, 0])
def test_a_shard_cut_short_is_found(tmp_path: Path, left: int) -> None:
    shard = make_data(tmp_path) / "00002.tar"
    shard.write_bytes(shard.read_bytes()[:left])
    problems = verify(tmp_path).problems
    assert len(problems) >= 2
    assert all("00002.tar" in problem for problem in problems)


def test_missing_parts_are_found(tmp_path: Path) -> None:
    make_data(tmp_path)
    (tmp_path / "00000.tar").unlink()
    (tmp_path / "negative.safetensors").unlink()
    problems = verify(tmp_path).problems
    assert len(problems) == 2
    assert any("00000.tar is missing" in problem for problem in problems)
    assert any("negative.safetensors" in problem for problem in problems)


def test_numbers_that_are_not_finite_are_found_behind_a_right_hash(tmp_path: Path) -> None:
    problems = verify(make_data(tmp_path, nan=(2, 8))).problems
    assert len(problems) == 2
    assert "Sample 00000002" in problems[0]
    assert "Sample 00000008" in problems[1]


def test_no_data_set_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a data set"):
        verify(tmp_path)
