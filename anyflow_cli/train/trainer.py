"""The loop: draw, differentiate, update, average, report, save. One for every objective.

A step runs the objective's phases in order; a phase's gradient is summed over its terms and micro batches
and then moves its role's weights. Accelerate carries devices and processes. Whatever is random in a step
follows from its number (``draws``), so a checkpoint needs no generator states, and a run killed at
any moment goes on as if it had not been, bit for bit on one CPU.

Legend: N global batch, B micro batch.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.parallelize import full_tensor, shard_like
from anyflow_cli.model.precision import Precision, autocast
from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint, dcp
from anyflow_cli.train.alarms import AlarmError, Alarms
from anyflow_cli.train.checkpointer import Checkpointer
from anyflow_cli.train.ema import WeightEma
from anyflow_cli.train.metrics import Metrics
from anyflow_cli.train.objectives import LossTerm, Objective, Phase, Sums, micro_batch
from anyflow_cli.train.rng import BoundaryMean, StepRng, stream_seed
from anyflow_cli.train.trackers import finish_trackers, start_trackers

log = logging.getLogger(__name__)

OnStep = Callable[[int, Mapping[str, float]], None]
PreviewHook = Callable[[int], None]
NOT_SHARDED = schema.LaunchSection()
# How long processes wait for the first one's previews and for it to save the finished model; NCCL's own ten
# minutes are too few. One that dies is noticed at once, by whoever started it.
PATIENCE = timedelta(hours=2)


class BatchSource(Protocol):
    """Global batches by step, or a process's part of each; ``data.batches.Batches`` is one."""

    def stream(self, start: int, part: slice = ..., workers: int = ...) -> Iterator[Batch]:
        """Give batches of steps start, start + 1, ... without end."""

    def account(self, step: int, places: Iterable[int]) -> None:
        """Take note that the samples at these places of a global batch are corrupt, or refuse to go on."""


class StoppedError(AnyflowError):
    """The run was asked to end and has saved its state."""

    exit_code = 130

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(
            f"Stopped after step {step} of {steps}; the state is saved.",
            "Start the same command again: it continues from there.",
            everywhere=True,
        )


class TermModule(nn.Module):
    """A phase's terms as a module over its own parameters, which is what DDP wraps."""

    def __init__(
        self, parameters: list[nn.Parameter], terms: tuple[LossTerm, ...], precision: Precision, divided: bool
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters)
        self.terms, self.precision, self.divided = terms, precision, divided

    def forward(self, number: int, batch: Batch, draws: StepRng) -> tuple[Tensor, Sums]:
        """Loss and report of one term."""
        with autocast(self.precision, batch.latents.device, keeps_casts=not self.divided):
            return self.terms[number](batch, draws)


class PhaseState:
    """A phase with its optimizer and schedule."""

    def __init__(
        self,
        phase: Phase,
        parameters: list[nn.Parameter],
        accelerator: Any,
        precision: Precision,
        divided: bool,
    ) -> None:
        settings = phase.optimizer
        self.name, self.clip, self.warmup, self.lr = (
            phase.role,
            settings.grad_clip,
            settings.warmup_steps,
            settings.lr,
        )
        self.parameters = parameters
        self.terms = phase.terms
        module = TermModule(parameters, phase.terms, precision, divided)
        self.module = module if divided else accelerator.prepare_model(module)
        self.optimizer = torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def update(self, step: int) -> float:
        """Clip, take the optimizer's ``step``-th step (from 1) if the gradient is finite, clear; its norm."""
        norm = float(full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.clip)))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, step / max(self.warmup, 1))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state, of a sharded run or not."""
        moments = {
            number: {key: shard_like(value, self.parameters[number]) if value.dim() else value
                     for key, value in kept.items()}
            for number, kept in state["state"].items()
        }  # fmt: skip
        self.optimizer.load_state_dict({**state, "state": moments})


class Trainer:
    """Everything a run holds in memory, and the loop over it."""

    def __init__(
        self,
        directory: Path,
        objective: Objective,
        source: BatchSource,
        settings: schema.TrainingSection,
        *,
        accelerator: Any,
        launch: schema.LaunchSection = NOT_SHARDED,
        precision: Precision = "fp32",
        workers: int = 0,
        on_step: OnStep | None = None,
        preview: PreviewHook | None = None,
    ) -> None:
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self.backbone, self.settings, self.accelerator = objective.backbone, settings, accelerator
        self.source, self.workers = source, workers
        self.on_step, self.preview = on_step, preview
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        if settings.global_batch % self.ranks:
            raise UsageError(
                f"A global batch of {settings.global_batch} cannot be divided among {self.ranks} processes.",
                f"Set batch to a multiple of {self.ranks}.",
                everywhere=True,
            )
        self.share = settings.global_batch // self.ranks
        self.micro = min(settings.micro_batch or self.share, self.share)
        self.divided = launch.sharding != "none"
        self.phases = [
            PhaseState(phase, self.backbone.parameters_of(phase.role), accelerator, precision, self.divided)
            for phase in objective.phases
        ]
        student = self.backbone.named_parameters_of("student")
        self.ema = WeightEma(student, settings.ema.decay, settings.ema.start)
        self.metrics = Metrics(
            directory,
            settings.log_every,
            writes=accelerator.is_main_process,
            tensorboard=settings.tensorboard,
            log=accelerator.log if settings.trackers else None,
        )
        self.saver = Checkpointer(
            self.checkpoints,
            settings.keep_checkpoints,
            accelerator,
            self.divided,
            not launch.async_checkpoint,
        )
        self.alarms = Alarms(settings.alarms)
        self.step, self.rollbacks = 0, 0

    def run(self) -> None:
        """Train from where the run stands to ``settings.steps``; saved at the end."""
        settings, part = self.settings, slice(self.rank, None, self.ranks)
        self.resume()
        start_trackers(self.accelerator, settings.trackers, self.directory, settings.model_dump(mode="json"))
        with _signals() as stop:
            batches = self.source.stream(self.step, part, self.workers)
            while self.step < settings.steps:
                try:
                    values = self._advance(next(batches))
                except AlarmError as alarm:
                    self._roll_back(alarm)
                    batches = self.source.stream(self.step, part, self.workers)
                    continue
                self.saver.poll()
                if self.on_step is not None:
                    self.on_step(self.step, values)
                if self.preview is not None and _due(self.step, settings.preview_every):
                    with self.ema.swapped():
                        self.preview(self.step)
                if stop.is_set():
                    self.accelerator.set_trigger()
                stopped = self.accelerator.check_trigger()  # by a signal to any process
                if stopped or self.step == settings.steps or _due(self.step, settings.checkpoint_every):
                    self.save()
                if stopped and self.step < settings.steps:
                    self.saver.finish()
                    raise StoppedError(self.step, settings.steps)
        self.saver.finish()
        finish_trackers(self.accelerator)

    def _advance(self, batch: Batch) -> dict[str, float]:
        """One step, its average and its report; raises an alarm."""
        self.step += 1
        values = self._train_step(_on(batch, self.accelerator.device))
        self.ema.update(self.step)
        if _due(self.step, self.settings.log_every):
            with self.backbone.role("student"):
                values["embedding_norm"] = float(self.backbone.network_of("student").embedding_norm())
        row = self.metrics.add(self.step, values)
        if row is not None:
            self.alarms.look(self.step, row)
        return values

    def _roll_back(self, alarm: AlarmError) -> None:
        """Go back to the last checkpoint before an alarm, and on with other random numbers; or pass it on."""
        self.saver.finish()
        good = [
            path
            for path in checkpoint.complete(self.checkpoints)
            if checkpoint.checkpoint_step(path) < alarm.step
        ]
        settings = self.settings.alarms
        if settings.action != "roll-back" or not good or self.rollbacks == settings.rollbacks:
            raise alarm
        if self.accelerator.is_main_process:
            checkpoint.discard_after(good[-1])
        self.accelerator.wait_for_everyone()
        for phase in self.phases:
            phase.optimizer.zero_grad(set_to_none=True)  # of the step that went wrong
        count = self.rollbacks + 1
        self.resume()
        self.rollbacks = count
        log.warning("%s Rolled back to %s (%d of %d).", alarm.message, good[-1], count, settings.rollbacks)

    def _train_step(self, batch: Batch) -> dict[str, float]:
        """All phases on this process's share of a global batch; what is reported of the step."""
        values = self._account(batch)
        for phase in self.phases:
            tallies = self._accumulate(phase, batch)
            report = {name: total / count for name, (total, count) in tallies.items() if count}
            self._refuse_divergence(phase.name, *report.values())
            norm = phase.update(self.step)
            self._refuse_divergence(phase.name, norm)
            values |= report | {f"{phase.name}_gradient": norm}
        return values

    def _account(self, batch: Batch) -> dict[str, float]:
        """Tell the source of all processes' corrupt samples, on each of them alike; how many if there are."""
        corrupt = torch.zeros(self.settings.global_batch, device=self.accelerator.device)
        corrupt[[self.rank + place * self.ranks for place in batch.replaced]] = 1
        places = self._reduce(corrupt).nonzero().flatten().tolist()
        if places:
            self.source.account(self.step - 1, places)
        return {"corrupt": float(len(places))} if places else {}

    def _accumulate(self, phase: PhaseState, batch: Batch) -> dict[str, list[float]]:
        """Sum the gradient over micro batches and terms; (sum, count) of each report over all processes."""
        total: dict[str, Tensor] = {}
        means = [BoundaryMean(self._reduce) for _ in phase.terms]
        starts = range(0, self.share, self.micro)
        for start in starts:
            micro = micro_batch(batch, start, start + self.micro)
            positions = tuple(range(self.rank, self.settings.global_batch, self.ranks))[
                start : start + self.micro
            ]
            for number, mean in enumerate(means):
                draws = StepRng(self._seed(), self.step, self.settings.global_batch, positions, mean)
                last = start == starts[-1] and number == len(means) - 1
                with self._synchronised(phase, last):
                    loss, tallies = phase.module(number, micro, draws)
                    self.accelerator.backward(loss * len(positions) / self.share)
                for name, value in tallies.items():
                    total[name] = total[name] + value if name in total else value
        summed = self._reduce(torch.stack(list(total.values()))).tolist()
        return dict(zip(total, summed, strict=True))

    def _seed(self) -> int:
        """The recipe's; another after each roll-back, or the same draws would lead to the same alarm."""
        seed = self.settings.seed
        return stream_seed(seed, "rolled back", self.rollbacks) if self.rollbacks else seed

    def _synchronised(self, phase: PhaseState, last: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients once a phase, in its last backward pass."""
        context: AbstractContextManager[Any] = self.accelerator.no_sync(phase.module)
        return nullcontext() if last else context

    def _reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def _refuse_divergence(self, phase: str, *values: float) -> None:
        if all(map(math.isfinite, values)):
            return
        last = checkpoint.newest(self.checkpoints)
        raise AlarmError(
            f"The loss of the {phase} is not a number at step {self.step}; its weights were not moved.",
            self.step,
            (f"The last good state is {last}. " if last else "")
            + "Go on from it with --set model.precision=fp32, or begin anew with a lower optimizer.lr.",
        )

    # --- state

    def state(self) -> checkpoint.CheckpointState:
        """Everything that a step changes."""
        tensors: dict[str, Mapping[str, Tensor]] = {"ema": self.ema.shadow}
        tensors |= {phase.name: self.backbone.state_dict_of(phase.name) for phase in self.phases}
        return checkpoint.CheckpointState(
            step=self.step,
            tensors=tensors,
            optimizers={phase.name: phase.optimizer.state_dict() for phase in self.phases},
            extra={**self.metrics.state(), "alarms": self.alarms.state(), "rollbacks": self.rollbacks},
        )

    def save(self) -> None:
        """Write a checkpoint of all processes."""
        self.saver.save(self.state())

    def resume(self) -> None:
        """Take up the newest complete checkpoint, if there is one."""
        path = checkpoint.newest(self.checkpoints)
        if path is None:
            self.metrics.restart()
            return
        state = checkpoint.load(path, self._divided_parts() if self.divided else None)
        self.step = state.step
        for phase in self.phases:
            self.backbone.load_state_dict_of(phase.name, state.tensors[phase.name])
            phase.load_optimizer(state.optimizers[phase.name])
        self.ema.load(state.tensors["ema"])
        self.metrics.resume(state.step, state.extra)
        self.rollbacks = state.extra.get("rollbacks", 0)  # neither is in a checkpoint of 0.1
        if "alarms" in state.extra:
            self.alarms.resume(state.extra["alarms"])

    def _divided_parts(self) -> dict[str, Tensor]:
        """For what a checkpoint holds, a tensor that is divided as it shall be."""
        tensors = self.state().tensors
        moments: dict[str, Any] = {
            phase.name: {
                "state": {
                    number: dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.detach())
                    for number, parameter in enumerate(phase.parameters)
                }
            }
            for phase in self.phases
        }
        return dcp.flattened(tensors, moments)


def make_accelerator(launch: schema.LaunchSection = NOT_SHARDED, *, causal: bool = False) -> Any:
    """Accelerate's view of this process: its device, and the other processes.

    ``causal``: not every step compresses chunks, so that some leave weights without a gradient.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    # Without being told, accelerate takes several processes without a GPU for one.
    cpu = not torch.cuda.is_available()
    # what lies in the CPU's memory is summed there
    backend = "cpu:gloo,cuda:nccl" if launch.offload and not cpu else None
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=causal),
        InitProcessGroupKwargs(backend=backend, timeout=PATIENCE),
    ]
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, so that the step at hand is finished and saved."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _on(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, latents=batch.latents.to(device), text=batch.text.to(device))
