"""Benchmarks of a recipe: its own networks with random weights, through the code that samples and trains.

Work is counted as ``anyflow plan`` counts it, from the network calls that samplers and objectives declare, so
that the speeds found here carry over to plans. Everything runs in one process on one device.

Legend: B batch, F latent frames, C channels, H W latent height and width, L text tokens, D text width.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_cli.bench.machine import CallKey, MachineSpeed, interleaved, machine_speed, synchronize
from anyflow_cli.bench.record import (
    DECODING,
    FIRST_FRAME,
    ITERATIONS,
    SAMPLING_STEP,
    VIDEO_STEPS,
    WHOLE_VIDEO,
    Bench,
    Row,
)
from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import partition_for
from anyflow_cli.model.encoders import VideoVAE
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.parallelize import parallelize
from anyflow_cli.model.pipeline_io import (
    PIPELINES,
    load_network,
    transformer_weights_of,
    write_transformer,
)
from anyflow_cli.model.precision import autocast
from anyflow_cli.plan.estimate import MACHINE, PLANNED_STAGES, Target, step_moments, target_of, training_setup
from anyflow_cli.plan.hardware import this_machine
from anyflow_cli.plan.networks import Setup, condition_of, meta_backbone
from anyflow_cli.plan.steps import sampling_cost, step_cost
from anyflow_cli.recipe import schema
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.train.objectives import objective_of
from anyflow_cli.train.trainer import Trainer, make_accelerator
from anyflow_cli.utils.memory_tracker import MemoryTracker

log = logging.getLogger(__name__)

OURS, THEIRS = "ours", "diffusers"
STD = 0.02  # of random weights


def run_bench(
    recipe: schema.Recipe,
    parts: Sequence[str] = (),
    *,
    batch: int | None = None,
    repeats: int = 5,
    on_part: Callable[[str], None] = lambda part: None,
) -> Bench:
    """Measure a recipe on this machine, on its GPU if there is one.

    Args:
        recipe: The recipe; the weights of its models are not needed.
        parts: Which of ``BENCH_PARTS`` to measure; none: all.
        batch: Samples per training iteration; None: the recipe's micro batch, or an eighth of its batch.
        repeats: Runs of which the median is taken.
        on_part: Called before each part with its name.
    """
    hardware = replace(this_machine(), count=1)
    alone = recipe.model_copy(update={"launch": schema.LaunchSection()})
    device, target = torch.device("cuda" if hardware.is_gpu else "cpu"), target_of(alone, hardware)
    torch.manual_seed(0)
    on_part("machine")
    machine = machine_speed(device, target.precision)
    sections = {name: section_of(recipe, stage) for name, stage in ITERATIONS.items()}
    batches = {
        name: batch or own.micro_batch or max(own.global_batch // MACHINE, 1)
        for name, own in sections.items()
    }
    runner = Runner(target, machine, device, repeats, batches)
    rows: dict[str, Row] = {}
    for part in parts or BENCH_PARTS:
        on_part(part)
        rows.update(BENCH_PARTS[part](runner))
    import diffusers

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    return Bench(recipe.name, machine, target.precision, versions, batches, runner.frames, rows)


def section_of(recipe: schema.Recipe, stage: str) -> schema.TrainingSection:
    """A training section of the recipe, by the stage's name in PLANNED_STAGES."""
    section: schema.TrainingSection = getattr(recipe, PLANNED_STAGES[stage][2])
    return section


def random_condition(setup: Setup, samples: int, device: torch.device) -> Condition:
    """Random text, and pictures where the network takes them."""
    empty = condition_of(setup, samples, "meta")
    shapes = {name: getattr(empty, name).shape for name in empty.present}
    return Condition(**{name: torch.randn(shape, device=device) for name, shape in shapes.items()})


def random_backbone(setup: Setup, device: torch.device) -> Backbone:
    """The networks of a process, as training builds them, with random weights."""
    backbone = meta_backbone(setup).to_empty(device=device)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.normal_(std=STD)
    return backbone


@dataclass(frozen=True)
class Runner:
    """A recipe on a machine, and how often and on what batches to run it."""

    target: Target
    machine: MachineSpeed
    device: torch.device
    repeats: int
    batches: Mapping[str, int]

    @property
    def frames(self) -> int:
        """Frames of a sampled video."""
        recipe = self.target.recipe
        return recipe.sample.frames or recipe.model.frames

    def load(self) -> Iterator[tuple[str, Row]]:
        """Open the network, or two experts, from files in the page cache, onto the device."""
        network = random_backbone(self.target.setup(None, None), torch.device("cpu")).network_of("student")
        size = _bytes_of(network)
        with tempfile.TemporaryDirectory(prefix="anyflow-bench-") as place:
            folders = {Path(place) / name: own for name, own in transformer_weights_of(network).items()}
            for folder, weights in folders.items():
                write_transformer(folder, network.config, weights)
            del network, folders, weights
            where = Path(",".join(map(str, sorted(Path(place).iterdir()))))
            seconds = self._seconds({"load": lambda: load_network(where, dtype=None).to(self.device)})
        yield "load", Row(seconds["load"], self.machine.floor(0, size))

    def sampling(self) -> Iterator[tuple[str, Row]]:
        """Latents by ours and by diffusers over the same weights, then pixels."""
        setup = self.target.setup(None, self.frames)
        network = random_backbone(setup, self.device).network_of("student").eval().requires_grad_(False)
        condition = random_condition(setup, 1, self.device)
        sampler = VideoSampler(network, self.target.recipe.model, setup.latent, vae=self._random_vae())
        samplers: dict[str, Callable[[int], object]] = {
            OURS: lambda steps: list(sampler.latents(condition, [0], steps))
        }
        if theirs := self._diffusers_sampler(network, setup, condition.text):
            samplers[THEIRS] = theirs
        calls = {
            (who, steps): partial(call, steps) for who, call in samplers.items() for steps in (1, VIDEO_STEPS)
        }
        seconds, cost, size = self._seconds(calls), sampling_cost(setup, 1), _bytes_of(network)
        step = {who: (seconds[who, VIDEO_STEPS] - seconds[who, 1]) / (VIDEO_STEPS - 1) for who in samplers}
        causal = network.config.causal
        chunks = len(partition_for(causal, setup.latent[0])) if causal else 1  # evaluated one by one
        floor = self.machine.floor(cost.step_flops, chunks * size)
        yield SAMPLING_STEP, Row(step[OURS], floor, cost.step_flops, step.get(THEIRS))
        flops = VIDEO_STEPS * cost.step_flops + cost.cache_flops
        evaluations = VIDEO_STEPS * chunks + chunks - 1  # a finished chunk is cached by one more
        floor, peak = self.machine.floor(flops, evaluations * size), self._peak(calls[OURS, VIDEO_STEPS])
        whole = f"latents in {VIDEO_STEPS} steps"
        yield whole, Row(seconds[OURS, VIDEO_STEPS], floor, flops, seconds.get((THEIRS, VIDEO_STEPS)), peak)
        yield from self._pixels(sampler, condition)

    def training(self) -> Iterator[tuple[str, Row]]:
        """Whole iterations of both stages, optimizers and averages included."""
        for name, stage in ITERATIONS.items():
            size = {"global_batch": self.batches[name], "micro_batch": None}
            settings = section_of(self.target.recipe, stage).model_copy(update=size)
            recipe = self.target.recipe.model_copy(update={PLANNED_STAGES[stage][2]: settings})
            setup = training_setup(self.target._replace(recipe=recipe), stage)
            iteration, trained = self._iteration(recipe, setup, settings)
            seconds = self._seconds({name: iteration})[name]
            flops = step_cost(setup, range(2, self.repeats + 2)).flops  # the first step was the warm-up
            floor = self.machine.floor(flops, 7 * trained)  # AdamW reads four tensors and writes three
            planned = max(moment.total for moment in step_moments(setup))
            yield name, Row(seconds, floor, flops, peak=self._peak(iteration), planned=planned)

    def _pixels(self, sampler: VideoSampler, prompt: Condition) -> Iterator[tuple[str, Row]]:
        """The decoder alone, then whole videos: streamed by a causal model, at once by another."""
        latents = torch.randn(1, *sampler.shape, device=self.device)
        with MemoryTracker(gpu=self.device.type == "cuda") as tracker:
            sampler.decode(latents)
        flops = tracker.linear + tracker.attention

        def video(parts: int | None = None) -> None:
            if sampler.is_causal:
                pixels = sampler.stream(prompt, 0, VIDEO_STEPS)
            else:
                pixels = sampler.videos(prompt, [0], VIDEO_STEPS)
            for _ in islice(pixels, parts):
                pass

        calls: dict[str, Callable[[], object]] = {DECODING: lambda: sampler.decode(latents)}
        calls[WHOLE_VIDEO] = video
        if sampler.is_causal:  # a bidirectional model's first frame comes with all others
            calls[FIRST_FRAME] = partial(video, 1)
        seconds = self._seconds(calls)
        yield DECODING, Row(seconds.pop(DECODING), self.machine.floor(flops), flops)
        yield from ((name, Row(value)) for name, value in seconds.items())

    def _random_vae(self) -> VideoVAE:
        from diffusers import AutoencoderKLWan

        with self.device:
            model: Any = AutoencoderKLWan.from_config(dict(self.target.pipeline.vae))
        return VideoVAE(model)

    def _diffusers_sampler(
        self, network: FlowMapTransformer, setup: Setup, text: Tensor
    ) -> Callable[[int], object] | None:
        """Sample latents by diffusers' pipeline over the network's own weights; None if it cannot."""
        import diffusers

        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        model, config = self.target.recipe.model, network.config
        if config.boundary is not None:
            return None  # it has no pipeline of two any-step experts
        with self.device:
            theirs: Any = getattr(diffusers, config.class_name).from_config(config.to_diffusers())
        theirs.load_state_dict(network.state_dict(), assign=True)
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=model.shift)
        parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler}
        pipeline = getattr(diffusers, PIPELINES[config.class_name])(transformer=theirs.eval(), **parts)
        pipeline.set_progress_bar_config(disable=True)
        size = {"height": model.height, "width": model.width, "num_frames": self.frames}
        chunks = partition_for(config.causal, setup.latent[0]) if config.causal else None
        own = {"chunk_partition": list(chunks)} if chunks else {}

        def sample(steps: int) -> object:
            with torch.no_grad(), autocast(self.target.precision, self.device):
                options = {"num_inference_steps": steps, "output_type": "latent", **size, **own}
                return pipeline(prompt_embeds=text, **options)

        try:
            sample(1)
        except Exception as error:  # whatever a library does not support
            log.warning("diffusers cannot sample this model, so it is not compared: %s", error)
            return None
        return sample

    def _iteration(
        self, recipe: schema.Recipe, setup: Setup, settings: schema.TrainingSection
    ) -> tuple[Callable[[], None], int]:
        """A training iteration on a random batch, and the bytes of the weights that it trains."""
        backbone, count = random_backbone(setup, self.device), settings.global_batch
        parallelize(backbone.networks(), recipe.model, recipe.launch, self.device)
        latents = torch.randn(count, *setup.latent, device=self.device)
        condition = random_condition(setup, count, self.device)
        trainer = Trainer(
            Path("bench"),  # where nothing is written
            objective_of(recipe.model, settings, backbone, condition.text[0]),
            RandomBatches(Batch(latents, condition, [""] * count, [0] * count)),
            settings,
            accelerator=make_accelerator(partly=True),
            precision=setup.precision,
        )
        batches = trainer.source.stream(0)

        def iteration() -> None:
            trainer.step += 1
            trainer.train_step(next(batches))
            trainer.ema.update(trainer.step)

        return iteration, sum(weight.nbytes for role in trainer.optimizers for weight in role.weights)

    def _seconds(self, calls: Mapping[CallKey, Callable[[], object]]) -> dict[CallKey, float]:
        return interleaved(calls, self.repeats, self.device)

    def _peak(self, call: Callable[[], object]) -> int | None:
        """Peak of a GPU's memory while a call runs."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device)


BENCH_PARTS: dict[str, Callable[[Runner], Iterator[tuple[str, Row]]]] = {
    "load": Runner.load, "sampling": Runner.sampling, "training": Runner.training
}  # fmt: skip


@dataclass(frozen=True)
class RandomBatches:
    """A source of batches that are all the same."""

    batch: Batch

    def stream(self, start: int, part: slice = slice(None), workers: int = 0) -> Iterator[Batch]:
        """Yield the batch without end."""
        return repeat(self.batch)

    def account(self, step: int, places: Iterable[int]) -> None:
        """Do nothing: no sample is corrupt."""


def _bytes_of(network: FlowMapTransformer) -> int:
    return sum(weight.nbytes for weight in network.parameters())
