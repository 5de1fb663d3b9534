"""No sample is lost and none is made twice, whichever processes of synthesis die when."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.verify import verify
from tests.synthesize.kills import SHARDS, SIZE

KILLS = 50


def run(directory: Path, kills: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.synthesize.kills", str(directory), str(kills), "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_four_processes_killed_at_random_moments(tmp_path: Path) -> None:
    found = run(tmp_path / "killed", KILLS)
    assert found["killed"] >= KILLS
    assert found["failed"] == 0
    assert found["shards lost"] <= found["killed"]  # at most the one that each had open
    assert run(tmp_path / "quiet", 0)["shards lost"] == 0
    killed, quiet = (tmp_path / name / "data" for name in ("killed", "quiet"))
    names = sorted(path.name for path in quiet.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names  # and nothing half-written beside them
    assert all((killed / name).read_bytes() == (quiet / name).read_bytes() for name in names)
    assert verify(killed).problems == ()
    data = LatentData(killed, 8)
    indices = [data.sample(position).index for position in range(len(data))]
    assert indices == list(range(SHARDS * SIZE - 2))
