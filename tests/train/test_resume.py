"""A run killed at any moment ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.runs import checkpoint
from tests.train import small
from tests.train.small import Kind, same_run, trainer

KINDS: tuple[Kind, ...] = ("flow-map", "on-policy", "causal-flow-map", "causal-on-policy")


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up, as nothing can after SIGKILL."""


def killer(at: int, patch: pytest.MonkeyPatch) -> None:
    """Die in the ``at``-th step of writing checkpoints: a file, the marker, the rename, a removal."""
    calls = 0

    def counting(original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Killed
            return original(*args, **options)

        return call

    patch.setattr(os, "fsync", counting(os.fsync))
    patch.setattr(Path, "touch", counting(Path.touch))
    patch.setattr(Path, "rename", counting(Path.rename))
    patch.setattr("shutil.rmtree", counting(__import__("shutil").rmtree))


def die_at(step: int) -> Any:
    def die(now: int, _: object) -> None:
        if now == step:
            raise Killed

    return die


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    for kind in KINDS:
        trainer(directory / kind, kind).run()
    return directory


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_killed_after_a_step(tmp_path: Path, undisturbed: Path, kind: Kind, step: int) -> None:
    with pytest.raises(Killed):
        trainer(tmp_path, kind, hooks={"on_step": die_at(step)}).run()
    trainer(tmp_path, kind).run()
    same_run(tmp_path, undisturbed / kind)


@pytest.mark.parametrize("moment", [1, 3, 5, 6, 7, 8, 10, 14, 16, 17, 20])
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    with monkeypatch.context() as patch:
        killer(moment, patch)
        with pytest.raises(Killed):
            trainer(tmp_path).run()
    trainer(tmp_path).run()
    same_run(tmp_path, undisturbed / "flow-map")


def test_killed_repeatedly_with_adapters(tmp_path: Path) -> None:
    trainer(tmp_path / "b", "on-policy", lora=True).run()
    for step in (2, 3, 5):
        with pytest.raises(Killed):
            trainer(tmp_path / "a", "on-policy", lora=True, hooks={"on_step": die_at(step)}).run()
    trainer(tmp_path / "a", "on-policy", lora=True).run()
    same_run(tmp_path / "a", tmp_path / "b")


def test_moments_in_8_bits_go_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(small, "OPTIMISER", small.OPTIMISER.model_copy(update={"states": "8bit"}))
    monkeypatch.setattr(small, "CONFIG", replace(small.CONFIG, ffn_dim=256))  # 4096 weights at least
    for name, hooks in (("whole", {}), ("killed", {"on_step": die_at(3)}), ("killed", {})):
        ends = pytest.raises(Killed) if hooks else nullcontext()
        with torch.compiler.set_stance("force_eager"), ends:  # torchao compiles its step
            trainer(tmp_path / name, hooks=hooks).run()
    newest = checkpoint.newest(tmp_path / "whole" / "checkpoints")
    assert newest is not None
    (states,) = checkpoint.load(newest).optimizers.values()
    moments = [one["exp_avg"] for one in states["state"].values()]
    assert {type(one).__name__ for one in moments} == {"Tensor", "OptimState8bit"}
    same_run(tmp_path / "killed", tmp_path / "whole")


def test_sigkill(tmp_path: Path, undisturbed: Path) -> None:
    script = f"""
    import os, signal
    from pathlib import Path
    from tests.train.small import trainer

    def die(step, values):
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer(Path({str(tmp_path)!r}), hooks={{"on_step": die}}).run()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    trainer(tmp_path).run()
    same_run(tmp_path, undisturbed / "flow-map")
