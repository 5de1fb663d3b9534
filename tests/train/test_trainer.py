"""The loop: schedule, clipping, averages, checkpoints, signals, and what ends it."""

from __future__ import annotations

import json
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import InitProcessGroupKwargs

from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.recipe import schema
from anyflow_cli.runs.checkpoint import complete, newest
from anyflow_cli.train.trainer import StoppedError, make_accelerator
from tests.train import small
from tests.train.small import RandomData, same_run, trainer


def test_a_run_saves_checkpoints_metrics_and_its_last_step(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=5)
    run.run()
    assert [path.name for path in complete(tmp_path / "checkpoints")] == ["step-000004", "step-000005"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert {"loss", "boundary", "non_boundary", "student_gradient", "seconds", "memory"} <= rows[0].keys()


def test_a_finished_run_given_more_steps_equals_a_longer_one(tmp_path: Path) -> None:
    trainer(tmp_path / "a", steps=3).run()
    trainer(tmp_path / "a", steps=6).run()
    trainer(tmp_path / "b", steps=6).run()
    same_run(tmp_path / "a", tmp_path / "b")


def test_restarting_a_finished_run_does_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).run()
    seen: list[int] = []
    trainer(tmp_path, steps=2, hooks={"on_step": lambda step, _: seen.append(step)}).run()
    assert seen == []


def test_warm_up_is_linear_then_constant(tmp_path: Path) -> None:
    rates: list[float] = []
    optimizer = small.OPTIMISER.model_copy(update={"warmup_steps": 4, "lr": 0.8e-3})
    run = trainer(tmp_path, steps=6, optimizer=optimizer)
    run.optimizers[0].settings = optimizer
    run.on_step = lambda *_: rates.append(run.optimizers[0].optimizer.param_groups[0]["lr"])
    run.run()
    assert rates == pytest.approx([0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 0.8e-3, 0.8e-3])


def test_gradients_are_clipped(tmp_path: Path) -> None:
    role = trainer(tmp_path).optimizers[0]
    role.settings = role.settings.model_copy(update={"grad_clip": 1e-3})
    for parameter in role.weights:
        parameter.grad = torch.ones_like(parameter)
    seen: list[torch.Tensor] = []
    role.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in role.weights if p.grad is not None]))
    )
    norm = role.clip().item()
    role.update(1, norm)
    assert norm == pytest.approx(sum(p.numel() for p in role.weights) ** 0.5, rel=1e-5)
    assert float(seen[0].norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_average_starts_where_the_recipe_says(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=2, ema=schema.EmaSection(decay=0.9, start=3))
    run.run()
    for name, value in run.backbone.state_dict_of("student").items():
        assert torch.equal(run.ema.shadow[name], value)
    longer = trainer(tmp_path, steps=4, ema=schema.EmaSection(decay=0.9, start=3))
    longer.run()
    moved = longer.backbone.state_dict_of("student")
    assert any(not torch.equal(longer.ema.shadow[name], value) for name, value in moved.items())


def test_previews_use_the_average_and_restore_the_weights(tmp_path: Path) -> None:
    seen: dict[int, torch.Tensor] = {}
    name = "proj_out.weight"
    run = trainer(tmp_path, steps=4, preview_every=2, ema=schema.EmaSection(decay=0.9, start=1))
    run.preview = lambda step: seen.update({step: run.backbone.state_dict_of("student")[name].clone()})
    run.run()
    assert sorted(seen) == [2, 4]
    assert torch.equal(seen[4], run.ema.shadow[name])
    trainer(tmp_path / "plain", steps=4, ema=schema.EmaSection(decay=0.9, start=1)).run()
    same_run(tmp_path, tmp_path / "plain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_how_to_continue(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)

    def ask(step: int, _: object) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match="step 3 of 6") as stop:
        trainer(tmp_path / "a", hooks={"on_step": ask}, checkpoint_every=100).run()
    assert stop.value.exit_code == 130
    assert "same command" in str(stop.value.hint)
    assert signal.getsignal(number) is before
    assert newest(tmp_path / "a" / "checkpoints") == tmp_path / "a" / "checkpoints" / "step-000003"
    trainer(tmp_path / "a", checkpoint_every=100).run()
    trainer(tmp_path / "b", checkpoint_every=100).run()
    same_run(tmp_path / "a", tmp_path / "b")


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hooks = {"on_step": lambda *_: os.kill(os.getpid(), signal.SIGHUP)}
        trainer(tmp_path, hooks=hooks, steps=3).run()
    finally:
        signal.signal(signal.SIGHUP, before)


class Poisoned(RandomData):
    """Data that is not a number from its fourth step on."""

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Any:
        for step, batch in enumerate(super().stream(start, part, workers), start=start + 1):
            if step >= 4:
                batch.latents[0, 0, 0, 0, 0] = float("nan")
            yield batch


@pytest.mark.parametrize("kind", ["flow-map", "on-policy"])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_spreads(tmp_path: Path, kind: Any) -> None:
    run = trainer(tmp_path, kind, source=Poisoned(4))
    with pytest.raises(AnyflowError, match="student's loss or gradient is not finite at step 4") as error:
        run.run()
    last = newest(tmp_path / "checkpoints")
    assert last is not None
    assert last.name == "step-000002"
    assert str(last) in str(error.value.hint)
    assert all(parameter.isfinite().all() for parameter in run.backbone.parameters())
    assert len(run.backbone.state_dict_of("student")) > 0


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    class Three:
        process_index, num_processes = 0, 3

    run = trainer(tmp_path)
    with pytest.raises(UsageError, match="cannot be split over 3"):
        type(run)(
            tmp_path, small.objective("flow-map", run.backbone), RandomData(4), small.training(),
            accelerator=Three(),
        )  # fmt: skip


def test_bf16_gives_gradients_close_to_those_of_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a call without gradient came first: its casts must not be taken for the graph's."""
    runs = [trainer(tmp_path / p, hooks={"precision": p}) for p in ("fp32", "bf16")]
    gradients = []
    for run in runs:
        run.step, role = 1, run.optimizers[0]
        monkeypatch.setattr(role, "update", lambda step, norm: None)
        run.train_step(next(RandomData(4).stream(0)))
        gradients.append(torch.cat([p.grad.flatten() for p in role.weights if p.grad is not None]))
    assert gradients[0].shape == gradients[1].shape
    assert torch.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.99


@pytest.mark.parametrize(("gpu", "offload"), [(False, True), (True, False), (True, True)])
def test_processes_wait_long_for_the_main_one_and_reduce_on_the_gradients_device(
    gpu: bool, offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Previews of a large model, and saving one, take longer than NCCL waits by itself."""
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("accelerate.Accelerator", lambda **options: given.update(options))
    make_accelerator(schema.LaunchSection(sharding="full", offload=offload))
    group = next(one for one in given["kwargs_handlers"] if isinstance(one, InitProcessGroupKwargs))
    assert given["cpu"] is not gpu
    assert group.timeout >= timedelta(hours=1)
    assert group.backend == ("cpu:gloo,cuda:nccl" if gpu and offload else None)
