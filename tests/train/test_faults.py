"""What ends a run of two processes: a full disk while a sharded checkpoint is written, a process that dies.

All that is left ends with one sentence, the checkpoint before is untouched, and the next start ends where an
undisturbed run does. The scenes follow one another in one pair of processes, since starting them is slow.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from anyflow_cli.cli.errors import failure_of
from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint
from anyflow_cli.train.trainer import RoleOptimizer, Trainer
from tests.train.ranks import start
from tests.train.small import same_run, trainer
from tests.train.test_ranks import same_training

STEPS, DIED = 3, 9
PATIENCE = 60  # seconds within which a process whose peer died has ended


@contextmanager
def full_disk(is_full: bool) -> Iterator[None]:
    """No file of this process may grow beyond a page, which fails as a full disk does: in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if is_full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make(directory: Path, waits: bool, steps: int) -> Trainer:
    launch = schema.LaunchSection(sharding="full", async_checkpoint=not waits)
    return trainer(
        directory, "on-policy", lora=True, hooks={"launch": launch}, steps=steps, checkpoint_every=1,
        keep_checkpoints=1,
    )  # fmt: skip


def said(error: BaseException) -> str:
    """What this process would print, and how it would end."""
    failure = failure_of(error)
    assert failure is not None, f"taken for a bug: {error!r}"
    return json.dumps([failure.message, failure.hint, failure.code, failure.silent])


def scenes(directory: Path) -> None:
    """The second process has a full disk; then it dies in the middle of a step."""
    rank = int(os.environ["RANK"])
    for waits in (True, False):
        home = directory / f"waits {waits}"
        make(home, waits, STEPS - 1).run()
        try:
            with full_disk(rank == 1):
                make(home, waits, STEPS).run()
        except Exception as error:
            (home / f"said-{rank}.json").write_text(said(error))
        (home / f"left-{rank}.txt").write_text(str(sorted(path.name for path in home.glob("checkpoints/*"))))
        torch.distributed.barrier()
        make(home, waits, STEPS).run()
    make(directory / "undisturbed", True, STEPS).run()
    home = directory / "died"
    make(home, True, STEPS - 1).run()
    if rank == 1:
        RoleOptimizer.update = lambda *_: os._exit(DIED)  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        make(home, True, STEPS).run()
    except Exception as error:
        (home / f"said-{rank}.json").write_text(said(error))
        (home / "seconds.txt").write_text(str(time.monotonic() - began))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    assert start(2, scenes, directory) == [0, DIED]
    return directory


@pytest.mark.parametrize("waits", [True, False])
def test_a_full_disk_of_one_process_ends_all_and_keeps_the_previous_checkpoint(
    two: Path, waits: bool
) -> None:
    home = two / f"waits {waits}"
    (first, hint, code, quiet), (same, *_, second_quiet) = (
        json.loads((home / f"said-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first == same
    assert first.startswith(f"The checkpoint of step {STEPS} could not be written to {home}/checkpoints: ")
    assert "File too large" in first
    assert "\n" not in first
    assert "start the same command again" in hint
    assert (code, quiet, second_quiet) == (1, False, True)
    for rank in (0, 1):
        assert (home / f"left-{rank}.txt").read_text() == f"['step-{STEPS - 1:06d}']"


@pytest.mark.parametrize("waits", [True, False])
def test_after_a_full_disk_the_next_start_equals_an_undisturbed_run(two: Path, waits: bool) -> None:
    same_run(two / "undisturbed", two / f"waits {waits}")


def test_a_process_that_dies_during_a_step_ends_the_others(two: Path) -> None:
    message, hint, code, quiet = json.loads((two / "died" / "said-0.json").read_text())
    assert message == "Another process of this run ended, so this one cannot go on."
    assert "Start the same command again" in hint
    assert (code, quiet) == (1, False)
    assert float((two / "died" / "seconds.txt").read_text()) < PATIENCE


def test_after_a_process_died_the_run_continues_on_the_other_alone(two: Path) -> None:
    left = checkpoint.newest(two / "died" / "checkpoints")
    assert left is not None
    assert checkpoint.checkpoint_step(left) == STEPS - 1
    trainer(two / "died", "on-policy", lora=True, steps=STEPS, checkpoint_every=1).run()
    same_training(two / "undisturbed", two / "died", f"checkpoints/step-{STEPS:06d}")
