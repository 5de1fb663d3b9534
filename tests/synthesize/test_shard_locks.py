from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from anyflow_cli.synthesize.shard_locks import ShardLocks


def test_one_process_claims_a_shard_until_it_ends(tmp_path: Path) -> None:
    with ShardLocks(tmp_path, 0, 2) as claims, claims.shard(3) as mine:
        assert mine
        assert in_another_process(tmp_path, 3) == (False, True)
    assert in_another_process(tmp_path, 3) == (True, True)


def in_another_process(directory: Path, number: int) -> tuple[bool, bool]:
    """Whether another process may make this shard, and the one after it."""
    child = os.fork()
    if child == 0:
        with (
            ShardLocks(directory, 1, 2) as claims,
            claims.shard(number) as this,
            claims.shard(number + 1) as following,
        ):
            os._exit(this + 2 * following)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return bool(code & 1), bool(code & 2)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_shards_are_divided_by_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with ShardLocks(tmp_path, 1, 3) as claims:
        mine = []
        for number in range(6):
            with claims.shard(number) as is_mine:
                mine.append(is_mine)
        assert mine == [False, True, False, False, True, False]
        with claims.shared_files():
            pass
