"""The objectives: which losses train which role, and how their times and noise are drawn.

An objective has phases, in the order in which a step runs them. A phase has the weights of one role, an
optimizer, and loss terms that are added up, for one or several updates in turn. Each term is evaluated and
differentiated by itself, so one graph is in memory at a time. ``trainer`` has the loop.

    flow-map          stage 1, Alg. 1          student: flow map
    flow-matching     tuning of the teacher    student: flow matching, one time
    consistency-ode   baseline of Table 2      student: f(z, t, 0) against the teacher's x
    on-policy         stage 2, Alg. 2          student: matching, and flow map on data; fake: its score

A causal student trains on windows of its videos (``causal_windows``); teacher and scores are bidirectional.

A term returns its mean loss over the micro-batch and, for reports, pairs (sum, count), which add up exactly
over micro-batches and processes. It also declares the network calls that it makes with the same random
numbers (``network_calls``), from which ``anyflow plan`` computes FLOPs and memory.

Legend: N global batch, B micro-batch, F latent frames, K noised chunks, C channels, H W latent height and
width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import UsageError
from anyflow_cli.flow import losses, matching, simulation, times
from anyflow_cli.flow.noise import batch_noise
from anyflow_cli.flow.velocity import Velocity, checkpointed, guided
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.causal import partition_for
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.experts import guidance_of
from anyflow_cli.model.parallelize import local_tensor
from anyflow_cli.recipe import schema
from anyflow_cli.train import causal_windows
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.rng import StepRng, stream_seed
from anyflow_cli.train.trained_expert import ONE_NETWORK, TrainedExpert

Sums = Mapping[str, Tensor]  # name -> (sum, count), (2,)
LatentShape = tuple[int, int, int, int]  # F, C, H, W


class LossTerm(Protocol):
    """One loss of a phase, on a micro batch."""

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Evaluate the mean loss () of a micro-batch, and what is reported of it."""

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """List the forward passes that ``__call__`` makes with these random numbers, in order."""


@dataclass(frozen=True)
class FunctionTerm:
    """A loss term from two functions: the loss, and the declaration of its network calls."""

    loss: Callable[[Batch, StepRng], tuple[Tensor, Sums]]
    calls: Callable[[LatentShape, StepRng], list[NetworkCall]]

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Call ``loss``."""
        return self.loss(batch, rng)

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """Call ``calls``."""
        return self.calls(latent, rng)


@dataclass(frozen=True)
class Phase:
    """The part of a step that updates the weights of one role.

    Attributes:
        role: The role.
        optimizer: AdamW and its schedule.
        terms: Loss terms of all updates, in order.
        updates: Optimizer steps, each on an equal share of the terms.
    """

    role: Role
    optimizer: schema.OptimizerSection
    terms: tuple[LossTerm, ...]
    updates: int = 1


@dataclass(frozen=True)
class Objective:
    """The phases of a step, in order, over the roles of one backbone."""

    backbone: Backbone
    phases: tuple[Phase, ...]


def roles_of(settings: schema.TrainingSection | None) -> tuple[Role, ...]:
    """The roles that a stage, or sampling (None), evaluates."""
    if isinstance(settings, schema.DistillSection) and settings.matching == "distribution":
        return ("student", "real", "fake")
    flow_map = getattr(settings, "flow_map", None)
    learns_flow_map = getattr(settings, "objective", "flow-map") == "flow-map"
    with_teacher = flow_map is not None and learns_flow_map and flow_map.target == "teacher"
    return ("student", "real") if with_teacher else ("student",)


def objective_of(
    model: schema.ModelSection, settings: schema.TrainingSection, backbone: Backbone, negative: Tensor
) -> Objective:
    """The objective of a training stage.

    Args:
        model: Model section of the recipe.
        settings: The stage's section.
        backbone: The networks.
        negative: Embedding (L, D) of the negative prompt.
    """
    experts = TrainedExpert(backbone.network_of("student").config.boundary, model.expert)
    _check_guidance(settings, backbone)
    if isinstance(settings, schema.DistillSection):
        return on_policy(backbone, negative, settings, model.shift, model.causal, experts)
    assert isinstance(settings, schema.TrainFlowMapSection | schema.FinetuneSection)
    name = settings.objective if isinstance(settings, schema.TrainFlowMapSection) else "flow-map"
    return stage_one(
        name, backbone, negative, settings.flow_map, settings.optimizer, model.shift, model.causal, experts
    )


def _check_guidance(settings: schema.TrainingSection, backbone: Backbone) -> None:
    """Refuse a scale of guidance per expert for a model that is one network."""
    assert isinstance(settings, schema.TrainFlowMapSection | schema.DistillSection | schema.FinetuneSection)
    guidance_of(backbone.network_of("student"), settings.flow_map.guidance)
    if isinstance(settings, schema.DistillSection) and "real" in backbone.roles:
        guidance_of(backbone.network_of("real"), settings.real_guidance)


def stage_one(
    name: Literal["flow-map", "flow-matching", "consistency-ode"],
    backbone: Backbone,
    negative: Tensor,
    settings: schema.FlowMapSection,
    optimizer: schema.OptimizerSection,
    shift: float,
    causal: schema.CausalSection | None = None,
    experts: TrainedExpert = ONE_NETWORK,
) -> Objective:
    """Build an objective of the student alone, on data.

    Args:
        name: Which one.
        backbone: Networks, of which the student is trained.
        negative: Embedding (L, D) of the negative prompt.
        settings: How times are drawn, guidance and text dropout.
        optimizer: AdamW and its schedule.
        shift: Timestep shift of the model.
        causal: Chunks and windows of a causal student; None: bidirectional.
        experts: Which expert each step trains, of a model that has two.
    """
    windows = windows_for(causal, settings)
    whole = causal_windows.WHOLE_VIDEOS if causal is not None else windows
    matching = FlowMatchingTerm(backbone, negative, settings.text_dropout, shift, whole, experts)
    terms: dict[str, LossTerm] = {
        "flow-map": FlowMapTerm(backbone, negative, settings, shift, windows, experts),
        "flow-matching": matching,
        "consistency-ode": ConsistencyTerm(backbone, settings, shift, windows, experts),
    }
    student: tuple[LossTerm, ...] = (terms[name],)
    if causal is not None and name != "flow-matching":
        bidirectional = weighted(matching, 1.0, "bidirectional_")
        student = (with_probability(bidirectional, causal.bidirectional, "bidirectional"), *student)
        student = tuple(touch_unused(term, backbone) for term in student)
    return Objective(backbone, (Phase("student", optimizer, student),))


def on_policy(
    backbone: Backbone,
    negative: Tensor,
    settings: schema.DistillSection,
    shift: float,
    causal: schema.CausalSection | None = None,
    experts: TrainedExpert = ONE_NETWORK,
) -> Objective:
    """Build stage 2: the student by Alg. 2 and, in the same update, by Alg. 1 on data; then the fake score.

    Args:
        backbone: Student, real and fake score.
        negative: Embedding (L, D) of the negative prompt.
        settings: The recipe's section.
        shift: Timestep shift of the model.
        causal: Chunks of a causal student; None: bidirectional.
        experts: Which expert each step trains, of a model that has two.
    """
    matches = settings.matching == "distribution"
    policy = OnPolicyTerms(backbone, negative, settings, shift, causal, experts)
    student: tuple[LossTerm, ...] = (FunctionTerm(policy.matching, policy.matching_calls),) * matches
    if settings.joint:
        flow_map = FlowMapTerm(
            backbone, negative, settings.flow_map, shift, windows_for(causal, settings.flow_map), experts
        )
        student += (weighted(flow_map, settings.joint_weight, "flow_map_"),)
    if causal is not None:
        student = tuple(touch_unused(term, backbone) for term in student)
    fake_scores = tuple(
        FunctionTerm(partial(policy.fake_score, update=k), partial(policy.fake_score_calls, update=k))
        for k in range(settings.fake_updates)
    )
    own = settings.fake_optimizer or settings.optimizer
    fake = Phase("fake", own, fake_scores, settings.fake_updates)
    return Objective(backbone, (Phase("student", settings.optimizer, student), *(fake,) * matches))


def windows_for(
    causal: schema.CausalSection | None, settings: schema.FlowMapSection
) -> causal_windows.WindowOf:
    """Whole videos for a bidirectional student, windows with teacher forcing for a causal one."""
    if causal is None:
        return causal_windows.WholeVideo(settings.conditioning_prob)
    return causal_windows.TeacherForcing(causal, settings.conditioning_prob)


@dataclass(frozen=True)
class FlowMapTerm:
    """Algorithm 1 on data."""

    backbone: Backbone
    negative: Tensor  # (L, D)
    settings: schema.FlowMapSection
    shift: float
    window_of: causal_windows.WindowOf = causal_windows.WHOLE_VIDEOS
    experts: TrainedExpert = ONE_NETWORK

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Evaluate ``losses.flow_map_loss``."""
        settings, window = self.settings, self.window_of(batch.latents, rng)
        expert = self.experts.of_step(rng)
        x = window.x
        t, r = map(window.by_frame, self._times(rng, window.times_per_sample))
        batch, dropped = drop_text(batch, self.negative, settings.text_dropout, rng)
        batch = replace(batch, condition=window.condition(batch.condition))
        scale = expert.scale(settings.guidance)
        result = losses.flow_map_loss(
            window.bind(self.backbone.velocity("student", batch.condition)),
            window.bind(_uncond(self.backbone, "student", self.negative, batch)),
            x, window.noise(rng.noise("noise", x.shape[1:])), t, r,
            guidance=scale,
            delta=settings.delta,
            weight=times.loss_weight(settings.weight, self.shift),
            adaptive=settings.adaptive,
            loss_scale=settings.loss_scale,
            guidance_path=settings.guidance_path,
            teacher=self._teacher(batch, scale) if settings.target == "teacher" else None,
            s=self._between(t, r, rng) if settings.objective == "composition" else None,
            fp32_target=settings.derivative_precision == "fp32",
            global_mean=rng.global_mean,
            null_mask=dropped,
            t_max=expert.interval.high,
        )  # fmt: skip
        boundary = (t == r).to(x.device)
        return result.loss, {
            "loss": sums(result.loss, len(x)),
            "boundary": sums(result.errors, boundary),
            "non_boundary": sums(result.errors, ~boundary),
        }

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """Calls of ``losses.flow_map_loss``: those without gradient, then all B samples with it."""
        layout, times_per_sample = causal_windows.layout_of(
            self.window_of, self.backbone.network_of("student"), latent, rng
        )
        t, _ = self._times(rng, times_per_sample)
        call = NetworkCall("student", len(t), gradient=True, layout=layout)
        others = [
            call._replace(role=role, samples=n, gradient=False, joined=True)
            for role, n in self._target_calls(rng, times_per_sample)
        ]
        return [*others, call]

    def _target_calls(self, rng: StepRng, times_per_sample: int | None) -> list[tuple[Role, int]]:
        """List role and samples of the calls for the target: of the teacher, u_null, then u for t > r.

        With guidance or a teacher a call without samples takes one: every rank must make the same calls.
        """
        settings, scale = self.settings, self.experts.of_step(rng).scale(self.settings.guidance)
        t, r = self._times(rng, times_per_sample)
        inner = (t != r).reshape(len(t), -1).any(1)
        composes, has_text = settings.objective == "composition", ~dropped_text(settings.text_dropout, rng)
        jumps = [int(inner.sum()) or 1] * 2 if composes else [2 * int(inner.sum())]
        if settings.target == "teacher":
            boundary = int((~inner).sum()) or 1
            samples = (boundary if composes else len(t)) * (1 if scale == 1 else 2)
            return [("real", samples), *(("student", n or 1) for n in jumps)]
        if scale == 1:
            calls = [n for n in jumps if n]
        elif composes:
            calls = [int((has_text & ~inner).sum()) or 1, *jumps]
        elif settings.guidance_path == "guided":
            calls = [int(has_text.sum()) or 1, jumps[0] or 1]
        else:
            calls = [int(has_text.sum()) + jumps[0] or 1]
        return [("student", n) for n in calls]

    def _teacher(self, batch: Batch, scale: float) -> Velocity:
        """The frozen teacher's velocity, guided."""
        real = self.backbone.velocity("real", batch.condition)
        null = _uncond(self.backbone, "real", self.negative, batch)
        return real if scale == 1 else guided(real, null, scale)

    def _between(self, t: Tensor, r: Tensor, rng: StepRng) -> Tensor:
        """Draw a time between r and t, at the same share of the way in all frames of a sample."""
        share = rng.local(torch.rand(rng.count, generator=rng.generator("between"))).to(t)
        return r + share.reshape(-1, *(1,) * (t.dim() - 1)) * (t - r)

    def _times(self, rng: StepRng, times_per_sample: int | None) -> tuple[Tensor, Tensor]:
        """Draw t and r of the micro-batch, (B,) or, with K times per sample, (B, K).

        Boundary samples (r = t) come first in the global batch, as ``BoundaryMean`` needs them.
        """
        ratios = times.TimeRatios(self.settings.boundary, self.settings.to_zero)
        interval = self.experts.of_step(rng).interval
        t, r = times.sample_times(
            rng.count, self.shift, ratios, rng.generator("times"), times_per_sample, interval
        )
        order = (t != r).reshape(len(t), -1).any(1).to(torch.uint8).argsort(stable=True)
        return rng.local(t[order]), rng.local(r[order])


@dataclass(frozen=True)
class FlowMatchingTerm:
    """Flow matching on whole videos, with logit-normal times."""

    backbone: Backbone
    negative: Tensor  # (L, D)
    text_dropout: float
    shift: float
    window_of: causal_windows.WindowOf = causal_windows.WHOLE_VIDEOS
    experts: TrainedExpert = ONE_NETWORK

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Evaluate ``losses.flow_matching_loss``."""
        window = self.window_of(batch.latents, rng)
        x = window.x
        interval = self.experts.of_step(rng).interval
        t = times.sample_logit_normal(rng.count, self.shift, rng.generator("times"), interval)
        t = rng.local(t).to(x)
        batch, _ = drop_text(batch, self.negative, self.text_dropout, rng)
        model = window.bind(self.backbone.velocity("student", window.condition(batch.condition)))
        loss = losses.flow_matching_loss(model, x, window.noise(rng.noise("noise", x.shape[1:])), t)
        return loss, {"loss": sums(loss, len(x))}

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """One call on whole videos."""
        return [NetworkCall("student", len(rng.positions), gradient=True)]


@dataclass(frozen=True)
class ConsistencyTerm:
    """Consistency ODE initialization: one jump from any t of a path to the teacher's video at its end.

    The path is the chord between the video and the very noise that the teacher sampled it from, drawn again
    from its seed. With fresh noise the target would be the mean of many videos.
    """

    backbone: Backbone
    settings: schema.FlowMapSection
    shift: float
    window_of: causal_windows.WindowOf = causal_windows.WHOLE_VIDEOS
    experts: TrainedExpert = ONE_NETWORK

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Evaluate ``losses.consistency_loss``."""
        videos, window = batch.latents, self.window_of(batch.latents, rng)
        seeds = [seed for seed in batch.seeds if seed is not None]
        if len(seeds) < len(videos):
            raise UsageError(
                "consistency-ode needs the noise behind each video, and the data set has real clips.",
                "Train it on videos that `anyflow synthesize` sampled from the teacher.",
            )
        shape = (rng.count, *([] if window.times_per_sample is None else [window.times_per_sample]))
        interval = self.experts.of_step(rng).interval
        drawn = times.sample_uniform(math.prod(shape), self.shift, rng.generator("times"), interval=interval)
        t = drawn.reshape(shape)
        t = window.by_frame(rng.local(t)).to(videos)
        eps = window.noise(window.of(batch_noise(seeds, videos.shape[1:])))
        z = losses.interpolate(window.x, eps, t)
        weight = times.loss_weight(self.settings.weight, self.shift)
        model = window.bind(self.backbone.velocity("student", window.condition(batch.condition)))
        loss = losses.consistency_loss(model, z, t, window.x, weight)
        return loss, {"loss": sums(loss, len(videos))}

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """One call on the window; two where the jump to 0 crosses from one expert to the other."""
        layout, _ = causal_windows.layout_of(self.window_of, self.backbone.network_of("student"), latent, rng)
        jump = NetworkCall("student", len(rng.positions), gradient=True, layout=layout)
        return [jump] * self.experts.evaluations(self.experts.of_step(rng).interval.high, 0.0)


class OnPolicyTerms:
    """Algorithm 2: distribution matching on the student's samples, and the fake score, which follows them.

    ``reuse_rollout`` trains the fake score on the samples that the student was just trained on, which saves
    the second rollout. Without it, the updated student generates new ones, as in the paper.
    """

    def __init__(
        self,
        backbone: Backbone,
        negative: Tensor,
        settings: schema.DistillSection,
        shift: float,
        causal: schema.CausalSection | None = None,
        experts: TrainedExpert = ONE_NETWORK,
    ) -> None:
        self.backbone, self.negative, self.settings, self.shift = backbone, negative, settings, shift
        self.score_shift = settings.score_shift or shift
        self.causal, self.experts = causal, experts
        self.window_of = causal_windows.WholeVideo(settings.flow_map.conditioning_prob)
        self._rollouts: dict[tuple[int, ...], Tensor] = {}  # of this step, by the positions of a micro-batch

    def matching(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Evaluate distribution matching (Eq. 5) on a rollout with gradient."""
        settings = self.settings
        batch = self._conditioned(batch, rng, "rollout")
        x = self._rollout(batch, rng, "rollout")
        if settings.reuse_rollout:
            self._rollouts[rng.positions] = x.detach()
        expert = self.experts.of_step(rng)
        t = times.sample_uniform(
            rng.count,
            self.score_shift,
            rng.generator("matching-times"),
            settings.t_min,
            settings.t_max,
            expert.interval,
        )
        loss = matching.distribution_matching_loss(
            x,
            self.backbone.velocity("fake", batch.condition),
            self.backbone.velocity("real", batch.condition),
            _uncond(self.backbone, "real", self.negative, batch),
            rng.local(t).to(x),
            batch.condition.put_back(rng.noise("matching-noise", x.shape[1:]).to(x)),
            matching.guidance_until(settings.real_guidance_until, expert.scale(settings.real_guidance)),
        )
        return loss, {
            "matching": sums(loss, len(x)),
            **power_and_motion("sample", x),
            **power_and_motion("data", batch.latents),
        }

    def matching_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """A rollout with gradient, then both scores without; the real score is guided: 2B samples."""
        fake = NetworkCall("fake", len(rng.positions), gradient=False)
        real = NetworkCall("real", 2 * fake.samples, gradient=False, joined=True)
        return [*self._rollout_calls(latent, rng, "rollout", gradient=True), fake, real]

    def fake_score(self, batch: Batch, rng: StepRng, update: int = 0) -> tuple[Tensor, Sums]:
        """Evaluate flow matching of the fake score on the student's samples.

        All updates of a step use the same samples, with times and noise of their own.
        """
        stream = "rollout" if self.settings.reuse_rollout else "fake-rollout"
        batch = self._conditioned(batch, rng, stream)
        if update == 0 and not self.settings.reuse_rollout:
            with torch.no_grad():
                self._rollouts[rng.positions] = self._rollout(batch, rng, stream)
        is_last = update == self.settings.fake_updates - 1
        x = self._rollouts.pop(rng.positions) if is_last else self._rollouts[rng.positions]
        interval, more = self.experts.of_step(rng).interval, f"-{update}" if update else ""
        generator = rng.generator(f"fake-times{more}")
        t = times.sample_logit_normal(rng.count, self.score_shift, generator, interval)
        noise = rng.noise(f"fake-noise{more}", x.shape[1:]).to(x)
        eps, t = batch.condition.put_back(noise), rng.local(t).to(x)
        loss = matching.fake_score_loss(self.backbone.velocity("fake", batch.condition), x, eps, t)
        return loss, {"fake": sums(loss, len(x))}

    def fake_score_calls(self, latent: LatentShape, rng: StepRng, update: int = 0) -> list[NetworkCall]:
        """A rollout without gradient, unless one is reused, then the fake score with gradient."""
        reused = self.settings.reuse_rollout or update > 0
        rollout = [] if reused else self._rollout_calls(latent, rng, "fake-rollout", gradient=False)
        return [*rollout, NetworkCall("fake", len(rng.positions), gradient=True)]

    def _rollout(self, batch: Batch, rng: StepRng, stream: str) -> Tensor:
        """Generate samples of the student, (B, F, C, H, W); of a longer rollout, the last F frames."""
        model, skipped = self.backbone.velocity("student", batch.condition), self._skipped_frames(rng, stream)
        if skipped and batch.condition.present != ("text",):
            raise UsageError(
                "Rollouts that are longer than the videos of the data set cannot start with its pictures.",
                "Leave distill.rollout_frames null.",
                everywhere=True,
            )
        frames, *size = batch.latents.shape[1:]
        noise = rng.noise(f"{stream}-start", (frames + skipped, *size)).to(batch.latents)
        simulate = self._simulation(rng, stream)
        recomputes = self.settings.recompute_rollout and torch.is_grad_enabled()
        if self.causal is None:
            start = batch.condition.put_back(noise)
            return batch.condition.put_back(simulate(checkpointed(model) if recomputes else model, start, 0))
        given = batch.latents[:, : self._conditioning_frames(rng, stream, frames)]
        return causal_windows.roll_out(
            model, noise, self._rollout_partition(frames, skipped), simulate,
            given=given, recomputes=recomputes, skipped=skipped,
        )  # fmt: skip

    def _conditioned(self, batch: Batch, rng: StepRng, stream: str) -> Batch:
        """The batch with the first frames given that student and scores share (bidirectional models)."""
        if self.causal is not None:
            return batch
        given = self.window_of.draw(rng.generator(f"{stream}-given"))
        return replace(batch, condition=batch.condition.with_frames(batch.latents[:, :given]))

    def _rollout_calls(
        self, latent: LatentShape, rng: StepRng, stream: str, *, gradient: bool
    ) -> list[NetworkCall]:
        """List the calls of ``_rollout``; of a consistency rollout only the last one has a gradient."""
        settings, generator = self.settings, rng.generator(stream)
        if settings.simulation == "flow-map":
            steps, k = simulation.draw_segment(settings.step_budgets, generator)
            jumps = [(t, r, gradient) for t, r in simulation.rollout_jumps(steps, k, self.shift)]
        else:
            exit_step, grid = self._exit_step(generator, gradient=gradient)
            starts = grid.tolist()[: exit_step + 1]
            ends = grid.tolist()[1:] if settings.simulation == "fixed-steps" else [0.0] * len(starts)
            jumps = [
                (t, r, gradient and n == exit_step)
                for n, (t, r) in enumerate(zip(starts, ends, strict=False))
            ]
        recomputes = settings.recompute_rollout and gradient
        simulated = [
            NetworkCall("student", len(rng.positions), carries, group=n if recomputes and carries else None)
            for n, (t, r, carries) in enumerate(jumps)
            for _ in range(self.experts.evaluations(t, r))
        ]
        if self.causal is None:
            return simulated
        skipped = self._skipped_frames(rng, stream)
        return causal_windows.rollout_calls(
            simulated, self.backbone.network_of("student"), self._rollout_partition(latent[0], skipped),
            (latent[0] + skipped, *latent[1:]),
            known=self._conditioning_frames(rng, stream, latent[0]), recomputes=recomputes, skipped=skipped,
        )  # fmt: skip

    def _skipped_frames(self, rng: StepRng, stream: str) -> int:
        """Draw how many frames of a rollout precede those that are matched: chunks of the largest size.

        To the scores the frames after them are a video of its own. Its first latent frame, one frame of
        pixels in Wan, is then the last of a chunk; it has no gradient.
        """
        longest = self.settings.rollout_frames
        if self.causal is None or longest is None:
            return 0
        size, own = max(self.causal.partition), sum(self.causal.partition)
        most = (schema.latent_frames(longest) - own) // size
        return size * int(torch.randint(most + 1, (), generator=rng.generator(f"{stream}-length")))

    def _rollout_partition(self, frames: int, skipped: int) -> tuple[int, ...]:
        """Chunks of a rollout of videos of ``frames``: the recipe's, or those of sampling in a longer one."""
        assert self.causal is not None
        if not skipped:
            return causal_windows.first_chunks(self.causal, frames).partition
        return partition_for(CausalConfig.from_recipe(self.causal), frames + skipped)

    def _exit_step(self, generator: torch.Generator, *, gradient: bool) -> tuple[int, Tensor]:
        """Draw the step that ends a rollout over a grid (N + 1,); fixed steps without gradient run to 0."""
        count = self.settings.consistency_steps
        drawn = int(torch.randint(count, (), generator=generator))
        whole = self.settings.simulation == "fixed-steps" and not gradient
        return count - 1 if whole else drawn, times.grid(count, self.shift)

    def _conditioning_frames(self, rng: StepRng, stream: str, frames: int) -> int:
        """Draw how many frames of a causal rollout of videos of ``frames`` come from the data."""
        assert self.causal is not None
        causal = causal_windows.first_chunks(self.causal, frames)
        share = self.settings.flow_map.conditioning_prob
        return causal_windows.draw_conditioning_frames(causal, share, rng.generator(f"{stream}-given"))

    def _simulation(self, rng: StepRng, stream: str) -> causal_windows.Simulate:
        """Draw how the student jumps from noise to time 0: alike on every process and for every chunk."""
        settings, generator = self.settings, rng.generator(stream)
        if settings.simulation == "flow-map":
            steps, k = simulation.draw_segment(settings.step_budgets, generator)
            return lambda model, noise, _: simulation.flow_map_rollout(model, noise, steps, k, self.shift)
        exit_step, grid = self._exit_step(generator, gradient=torch.is_grad_enabled())
        if settings.simulation == "fixed-steps":
            return lambda model, noise, _: simulation.fixed_steps_rollout(model, noise, grid, exit_step)

        def consistency(model: Velocity, noise: Tensor, chunk: int) -> Tensor:
            streams = rng.generators(f"{stream}-noise-{chunk}")  # new ones: a chunk may be recomputed
            return simulation.consistency_rollout(model, noise, grid, exit_step, streams)

        return consistency


def with_probability(term: LossTerm, share: float, stream: str) -> LossTerm:
    """The term in a ``share`` of the steps, drawn alike on all processes, with random numbers of its own.

    In the other steps its loss is 0 and it makes no calls.
    """

    def own_rng(rng: StepRng) -> StepRng | None:
        if float(torch.rand((), generator=rng.generator(stream))) >= share:
            return None
        return replace(rng, seed=stream_seed(rng.seed, stream))

    def loss(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        own = own_rng(rng)
        return (batch.latents.new_zeros(()), {}) if own is None else term(batch, own)

    def calls(latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        own = own_rng(rng)
        return [] if own is None else term.network_calls(latent, own)

    return FunctionTerm(loss, calls)


def touch_unused(term: LossTerm, backbone: Backbone) -> LossTerm:
    """The term with a zero gradient for the compressed patch embedding where no chunk is compressed.

    Every process needs a gradient for every weight, and the optimizer must treat a step in which only some
    processes have one like any other.
    """

    def loss(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        value, report = term(batch, rng)
        embedding = backbone.network_of("student").far_patch_embedding
        return value + 0 * sum(local_tensor(weight).sum() for weight in embedding.parameters()), report

    return FunctionTerm(loss, term.network_calls)


def weighted(term: LossTerm, weight: float, prefix: str) -> LossTerm:
    """The term times ``weight``; its report keeps its scale, and its names get a prefix."""

    def scaled(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        loss, report = term(batch, rng)
        return weight * loss, {prefix + name: value for name, value in report.items()}

    return FunctionTerm(scaled, term.network_calls)


def drop_text(batch: Batch, negative: Tensor, share: float, rng: StepRng) -> tuple[Batch, Tensor]:
    """Replace the text of a ``share`` of the samples by ``negative`` (L, D); and which, (B,) on the host."""
    own = batch.condition.text
    dropped = dropped_text(share, rng)
    text = torch.where(dropped.to(own.device)[:, None, None], negative.to(own), own)
    return replace(batch, condition=batch.condition.with_text(text)), dropped


def dropped_text(share: float, rng: StepRng) -> Tensor:
    """Draw which samples (B,) of a micro-batch lose their text."""
    return rng.local(torch.rand(rng.count, generator=rng.generator("text-dropout"))) < share


def sums(values: Tensor, of: Tensor | int) -> Tensor:
    """Sum and count (2,) of values (B,) where the mask (B,) is true, or of a mean () over ``of`` samples."""
    values = values.detach().double()
    if isinstance(of, int):
        return torch.stack([values * of, torch.full_like(values, of)])
    return torch.stack([values.where(of, 0).sum(), of.sum().double()])  # an index by a mask would wait


def power_and_motion(name: str, x: Tensor) -> Sums:
    """Mean square of videos x (B, F, C, H, W) and of the change between frames; the alarms compare both."""
    power, motion = x.detach().square().mean(), x.detach().diff(dim=1).square().sum() / x.numel()
    return {f"{name}_power": sums(power, len(x)), f"{name}_motion": sums(motion, len(x))}


def _uncond(backbone: Backbone, role: Role, negative: Tensor, batch: Batch) -> Velocity:
    """The role's velocity under the negative prompt."""
    return backbone.velocity(role, batch.condition.with_text(negative))


def micro_batch(batch: Batch, start: int, stop: int) -> Batch:
    """Cut samples ``start`` to ``stop`` out of a batch."""
    part = slice(start, stop)
    return Batch(batch.latents[part], batch.condition[part], batch.captions[part], batch.seeds[part])
