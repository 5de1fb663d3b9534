"""The training loop, one for every objective: draw, differentiate, update, average, report, save.

A step runs the objective's phases in order. A phase sums its gradient over loss terms and micro-batches, then
updates the weights of its role. Accelerate provides devices and processes. All randomness of a step is a
function of its number (``StepRng``), so a checkpoint needs no generator states, and a run that was killed at
any moment continues as if it had not been: bit for bit on one CPU.

Legend: N global batch, B micro-batch.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.base_storage import require_package
from anyflow_cli.model.parallelize import full_tensor, shard_like
from anyflow_cli.model.precision import Precision, autocast
from anyflow_cli.recipe import schema
from anyflow_cli.runs import checkpoint, dcp
from anyflow_cli.runs.checkpoint import LoopState
from anyflow_cli.train.alarms import AlarmError, Alarms
from anyflow_cli.train.checkpointer import Checkpointer
from anyflow_cli.train.ema import WeightEma
from anyflow_cli.train.loss_terms import Sums, micro_batch
from anyflow_cli.train.metrics import Metrics, finish_trackers, start_trackers
from anyflow_cli.train.objectives import Objective, Phase
from anyflow_cli.train.rng import BoundaryMean, StepRng, micro_positions, stream_seed
from anyflow_cli.utils.distributed import COLLECTIVE_TIMEOUT, computed_by_first, world_size
from anyflow_cli.utils.signals import fatal_signals, stop_requests

log = logging.getLogger(__name__)

OnStep = Callable[[int, Mapping[str, float]], None]
PreviewHook = Callable[[int], None]
NOT_SHARDED = schema.LaunchSection()


class BatchSource(Protocol):
    """Global batches by step, or one process's part of each; ``data.dataset.Batches`` is one."""

    def stream(self, start: int, part: slice = ..., workers: int = ...) -> Iterator[Batch]:
        """Yield the batches of steps start, start + 1, ... without end."""

    def account(self, step: int, places: Iterable[int]) -> None:
        """Count the samples at these places of a global batch as corrupt; raise if there are too many."""


class StoppedError(AnyflowError):
    """A signal ended the run, and its state is saved."""

    exit_code = 130

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(
            f"Stopped after step {step} of {steps}; the state is saved.",
            "Start the same command again: it continues from there.",
            everywhere=True,
        )


class RoleOptimizer(nn.Module):
    """The weights of one role, the losses that train them, and AdamW with a linear warm-up.

    ``replicated`` is this module as DDP wraps it, or itself with sharded weights or one process.
    """

    def __init__(
        self,
        phase: Phase,
        parameters: list[nn.Parameter],
        accelerator: Any,
        precision: Precision,
        *,
        sharded: bool,
    ) -> None:
        super().__init__()
        self.name, self.terms, self.settings = phase.role, phase.terms, phase.optimizer
        each = len(phase.terms) // phase.updates
        self.updates = [range(each * number, each * (number + 1)) for number in range(phase.updates)]
        self.weights = nn.ParameterList(parameters)
        self.precision, self.sharded = precision, sharded
        self.optimizer = optimizer_class(self.settings.states)(
            parameters,
            lr=self.settings.lr,
            betas=self.settings.betas,
            weight_decay=self.settings.weight_decay,
        )
        self._set_rate(self.settings.lr)
        # in a tuple, since a module cannot contain itself
        self._replicated = (self if sharded else accelerator.prepare_model(self),)

    @property
    def replicated(self) -> Any:
        """The module to call: a backward pass of its result exchanges gradients."""
        return self._replicated[0]

    def forward(self, term: int, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Evaluate one of the loss terms."""
        with autocast(self.precision, batch.latents.device, keeps_casts=not self.sharded):
            return self.terms[term](batch, rng)

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before, () fp64."""
        norm = full_tensor(nn.utils.clip_grad_norm_(self.weights, self.settings.grad_clip))
        return norm.detach().double()

    def update(self, step: int, norm: float) -> None:
        """Take step ``step`` (from 1) if the gradient's norm is finite, and clear the gradient."""
        if math.isfinite(norm):
            rate = self.settings.lr * min(1.0, step / max(self.settings.warmup_steps, 1))
            # torchao's step takes a tensor; a checkpoint keeps numbers
            self._set_rate(rate if self.settings.states == "fp32" else torch.tensor(rate))
            self.optimizer.step()
            self._set_rate(rate)
        self.optimizer.zero_grad(set_to_none=True)

    def _set_rate(self, rate: float | Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def load_optimizer(self, state: Mapping[str, Any]) -> None:
        """Restore a saved optimizer state, whether it was saved sharded or not.

        Raises:
            ValueError: The state is of other parameters.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        for number, saved in state["state"].items():
            weight = self.weights[number]
            if any(value.dim() and value.shape != weight.shape for value in saved.values()):
                raise ValueError(f"moments of parameter {number} of the {self.name} have another shape")
            moments[number] = {
                key: shard_like(value, weight) if value.dim() else value for key, value in saved.items()
            }
        self.optimizer.load_state_dict({**state, "state": moments})


def optimizer_class(states: str) -> type[torch.optim.AdamW]:
    """AdamW with moments of a type."""
    require_package(states)
    if states == "fp32":
        return torch.optim.AdamW
    from torchao.optim import AdamW8bit

    return AdamW8bit  # type: ignore[no-any-return]


class Trainer:
    """The state of a training run in memory, and the loop over it."""

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
        """Prepare a run; nothing is read or written before ``run``.

        Args:
            directory: The run's directory.
            objective: Losses by role, over a backbone that is on its device and, if so launched, sharded.
            source: Training data.
            settings: The recipe's section of this stage.
            accelerator: This process among the others.
            launch: Sharding, and whether checkpoints are written in the background.
            precision: Of the arithmetic.
            workers: Threads that read batches ahead.
            on_step: Called after every step with its number and its values.
            preview: Called with the step, while the averaged weights are in place.
        """
        self.directory, self.checkpoints = directory, directory / "checkpoints"
        self.backbone, self.settings, self.accelerator = objective.backbone, settings, accelerator
        self.source, self.workers = source, workers
        self.on_step, self.preview = on_step, preview
        shared = launch.context_parallel or 1  # processes with the same samples and random numbers
        self.rank, self.ranks = accelerator.process_index // shared, accelerator.num_processes // shared
        if settings.global_batch % self.ranks:
            raise UsageError(
                f"A global batch of {settings.global_batch} cannot be split over {self.ranks} "
                + ("processes." if shared == 1 else f"groups of {shared} processes."),
                f"Set global_batch to a multiple of {self.ranks}.",
                everywhere=True,
            )
        self.local_batch = settings.global_batch // self.ranks
        self.sharded = launch.sharding != "none"
        self.optimizers = [
            RoleOptimizer(
                phase,
                self.backbone.parameters_of(phase.role),
                accelerator,
                precision,
                sharded=self.sharded,
            )
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
        self.checkpointer = Checkpointer(
            self.checkpoints,
            settings.keep_checkpoints,
            accelerator,
            sharded=self.sharded,
            blocking=not launch.async_checkpoint,
        )
        self.alarms = Alarms(settings.alarms)
        self.step, self.rollbacks = 0, 0

    def run(self) -> None:
        """Train from the newest checkpoint to ``settings.steps``, and save the end.

        Raises:
            StoppedError: A signal asked for the end; the state is saved.
            AlarmError: A loss or gradient is not finite, or an alarm's action is to stop.
        """
        settings = self.settings
        self.resume()
        start_trackers(self.accelerator, settings.trackers, self.directory, settings.model_dump(mode="json"))
        with stop_requests() as stop, closing(self.metrics):
            batches = self._batches(self.step)
            while self.step < settings.steps:
                self.step += 1
                try:
                    values = self.train_step(next(batches))
                    self.ema.update(self.step)
                    self._log_step(values)
                except AlarmError as alarm:
                    self._roll_back(alarm)
                    batches = self._batches(self.step)
                    continue
                self.checkpointer.poll()
                if self.on_step is not None:
                    self.on_step(self.step, values)
                if self.preview is not None and _is_due(self.step, settings.preview_every):
                    with self.ema.swapped():
                        self.preview(self.step)
                if stop.is_set():
                    self.accelerator.set_trigger()
                stopped = self.accelerator.check_trigger()  # by a signal to any of the processes
                if stopped or self.step == settings.steps or _is_due(self.step, settings.checkpoint_every):
                    self.checkpointer.save(self.state())
                if stopped and self.step < settings.steps:
                    self.checkpointer.finish()
                    raise StoppedError(self.step, settings.steps)
        self.checkpointer.finish()
        finish_trackers(self.accelerator)

    def _batches(self, start: int) -> Iterator[Batch]:
        """This process's part of each batch from a step on; of processes that share it, the first reads."""
        batches = self.source.stream(start, slice(self.rank, None, self.ranks), self.workers)
        context = self.backbone.network_of("student").context
        while True:
            yield next(batches) if context is None else computed_by_first(batches.__next__, context.everyone)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Update every role from this process's part of a global batch; return the values to report."""
        device = self.accelerator.device
        corrupt = torch.zeros(self.settings.global_batch, dtype=torch.float64, device=device)
        if batch.replaced:
            corrupt[[self.rank + place * self.ranks for place in batch.replaced]] = 1
        batch = replace(batch, latents=batch.latents.to(device), condition=batch.condition.to(device))
        values: dict[str, float] = {}
        updates = [(role, terms) for role in self.optimizers for terms in role.updates]
        for number, (role, terms) in enumerate(updates):
            sums: dict[str, Tensor] = {}  # name -> (sum, count)
            for term, micro, rng, is_last in self._evaluations(terms, batch):
                # processes exchange gradients once, in the last backward pass
                with nullcontext() if is_last else self.accelerator.no_sync(role.replicated):
                    loss, report = role.replicated(term, micro, rng)
                    self.accelerator.backward(loss * len(rng.positions) / self.local_batch)
                for name, value in report.items():
                    sums[name] = sums[name] + value if name in sums else value
            # one reduction per update; the first also carries which samples are corrupt
            more = [corrupt] if number == 0 else []
            total = self._reduce(torch.cat([*sums.values(), *more]))
            # the only values of the step that the host waits for
            *reduced, norm = torch.cat([total, role.clip().to(total).reshape(1)]).tolist()
            pairs = {name: reduced[2 * i : 2 * i + 2] for i, name in enumerate(sums)}
            places = [place for place, found in enumerate(reduced[2 * len(sums) :]) if found]
            if places:
                self.source.account(self.step - 1, places)
                values["corrupt"] = float(len(places))
            means = {name: total / count for name, (total, count) in pairs.items() if count}
            self._check_finite(role.name, *means.values())
            role.update(self.step, norm)
            self._check_finite(role.name, norm)
            values |= means | {f"{role.name}_gradient": norm}
        return values

    def _evaluations(self, terms: range, batch: Batch) -> Iterator[tuple[int, Batch, StepRng, bool]]:
        """Each loss term of an update on each micro-batch, with its random numbers; True: the last one."""
        seed = self.settings.seed
        if self.rollbacks:  # the same numbers would lead to the same alarm
            seed = stream_seed(seed, "rolled back", self.rollbacks)
        means = {term: BoundaryMean(self._reduce) for term in terms}
        count, stop = self.settings.global_batch, 0
        for positions in micro_positions(count, self.settings.micro_batch, self.rank, self.ranks):
            start, stop = stop, stop + len(positions)
            micro = micro_batch(batch, start, stop)
            for term, mean in means.items():
                rng = StepRng(seed, self.step, count, positions, mean)
                yield term, micro, rng, stop == self.local_batch and term == terms[-1]

    def _reduce(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def _check_finite(self, role: str, *values: float) -> None:
        if all(map(math.isfinite, values)):
            return
        last = checkpoint.newest(self.checkpoints)
        raise AlarmError(
            f"The {role}'s loss or gradient is not finite at step {self.step}; the update was skipped.",
            self.step,
            (f"The last good state is {last}. " if last else "")
            + "Continue from it with --set model.precision=fp32, or start anew with a lower optimizer.lr.",
        )

    def _log_step(self, values: dict[str, float]) -> None:
        """Add a step to the metrics; at the end of a row, let the alarms look at it."""
        if _is_due(self.step, self.settings.log_every):
            with self.backbone.role("student"):
                values["embedding_norm"] = float(self.backbone.network_of("student").embedding_norm())
        row = self.metrics.add(self.step, values)
        if row is not None:
            self.alarms.look(self.step, row)

    def _roll_back(self, alarm: AlarmError) -> None:
        """Go back to the last checkpoint before an alarm, with new random numbers from then on; or raise."""
        self.checkpointer.finish()
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
        for role in self.optimizers:
            role.optimizer.zero_grad(set_to_none=True)  # left by the failed step
        count = self.rollbacks + 1
        self.resume()
        self.rollbacks = count
        log.warning("%s Rolled back to %s (%d of %d).", alarm.message, good[-1], count, settings.rollbacks)

    def state(self) -> checkpoint.CheckpointState:
        """Everything that a step changes."""
        tensors: dict[str, Mapping[str, Tensor]] = {checkpoint.AVERAGE: self.ema.shadow}
        tensors |= {role.name: self.backbone.state_dict_of(role.name) for role in self.optimizers}
        return checkpoint.CheckpointState(
            step=self.step,
            tensors=tensors,
            optimizers={role.name: role.optimizer.state_dict() for role in self.optimizers},
            loop=LoopState(dict(self.metrics.sums), self.metrics.steps, self.alarms.state(), self.rollbacks),
        )

    def resume(self) -> None:
        """Restore the newest complete checkpoint, if there is one."""
        path = checkpoint.newest(self.checkpoints)
        if path is None:
            self.metrics.restart()
            return
        state = checkpoint.load(path, self._sharded_tensors() if self.sharded else None)
        with checkpoint.readable(path, checkpoint.DAMAGED):
            for role in self.optimizers:
                self.backbone.load_state_dict_of(role.name, state.tensors[role.name])
                role.load_optimizer(state.optimizers[role.name])
            self.ema.load(state.tensors[checkpoint.AVERAGE])
        self.step, self.rollbacks = state.step, state.loop.rollbacks
        self.metrics.resume(state.step, state.loop.sums, state.loop.steps)
        if state.loop.alarms is not None:
            self.alarms.resume(state.loop.alarms)

    def _sharded_tensors(self) -> dict[str, Tensor]:
        """For every tensor of a checkpoint, one that is sharded as it shall be."""
        moments: dict[str, Any] = {
            role.name: {
                "state": {
                    number: dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.detach())
                    for number, parameter in enumerate(role.weights)
                }
            }
            for role in self.optimizers
        }
        return dcp.flattened(self.state().tensors, moments)


def make_accelerator(launch: schema.LaunchSection = NOT_SHARDED, *, partly: bool = False) -> Any:
    """Accelerate's view of this process: its device, and the other processes.

    ``partly``: some steps leave weights without a gradient, of compressed chunks or of one of two experts.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size() > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {world_size()}, and {missing[0]} is not set.",
            "Start the processes with --nproc, torchrun or accelerate launch.",
        )
    cpu = not torch.cuda.is_available()  # unless told so, accelerate does not see several processes on CPUs
    # offloaded gradients are on CPUs, and so are batches that processes share
    on_cpu = launch.offload or (launch.context_parallel or 1) > 1
    backend = "cpu:gloo,cuda:nccl" if on_cpu and not cpu else None
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, find_unused_parameters=partly),
        InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT),
    ]
    with fatal_signals():  # while it waits for the other processes, which may have been ended
        return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=handlers)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
