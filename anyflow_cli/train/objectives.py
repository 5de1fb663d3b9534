"""The objectives: which losses train which role, and how their times and noise are drawn.

An objective has phases, in the order in which a step runs them. A phase has the weights of one role, an
optimizer, and loss terms that are added up, for one or several updates in turn. Each term is evaluated and
differentiated by itself, so one graph is in memory at a time. ``trainer`` has the loop.

    flow-map          stage 1, Alg. 1          student: flow map
    flow-matching     tuning of the teacher    student: flow matching, one time
    consistency-ode   baseline of Table 2      student: f(z, t, 0) against the teacher's x
    on-policy         stage 2, Alg. 2          student: matching, and flow map on data; fake: its score

A causal student trains on windows of its videos (``causal_windows``); teacher and scores are bidirectional.

``loss_terms`` says what a term is; the terms of stage 2 on the student's own samples are in ``on_policy``.

Legend: N global batch, B micro-batch, F latent frames, K noised chunks, C channels, H W latent height and
width, L text tokens, D text width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch, no_noise
from anyflow_cli.flow import losses, times
from anyflow_cli.flow.noise import batch_noise
from anyflow_cli.flow.velocity import Velocity, flow_map, guided
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.experts import guidance_of
from anyflow_cli.recipe import schema
from anyflow_cli.train import causal_windows
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.loss_terms import (
    FunctionTerm,
    LatentShape,
    LossTerm,
    Sums,
    drop_text,
    dropped_text,
    sums,
    touch_unused,
    uncond_velocity,
    weighted,
    with_probability,
)
from anyflow_cli.train.on_policy import OnPolicyTerms
from anyflow_cli.train.rng import StepRng
from anyflow_cli.train.trained_expert import ONE_NETWORK, TrainedExpert


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
    matching = settings.matching if isinstance(settings, schema.DistillSection) else "none"
    if matching == "distribution":
        return ("student", "real", "fake")
    flow_map = getattr(settings, "flow_map", None)
    learns_flow_map = getattr(settings, "objective", "flow-map") == "flow-map"
    with_teacher = flow_map is not None and learns_flow_map and flow_map.target == "teacher"
    return ("student", "real") if with_teacher or matching == "fake-free" else ("student",)


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
    matches, has_fake = settings.matching != "none", "fake" in backbone.roles
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
    return Objective(backbone, (Phase("student", settings.optimizer, student), *(fake,) * has_fake))


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
        if settings.noise == "paired":
            eps = paired_noise(batch, window)
        else:
            eps = window.noise(rng.noise("noise", x.shape[1:]))
        student = window.bind(self.backbone.velocity("student", batch.condition))
        if settings.states == "own":
            with torch.no_grad():  # between equal ends there is one state; the teacher says where it moves
                until = t.to(eps.device)
                x = eps = flow_map(student, eps, torch.ones_like(until), until)
        result = losses.flow_map_loss(
            student,
            window.bind(uncond_velocity(self.backbone, "student", self.negative, batch)),
            x, eps, t, r,
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
        """Calls of the network's own states, if any, of the target, and of all B samples with gradient."""
        layout, times_per_sample = causal_windows.layout_of(
            self.window_of, self.backbone.network_of("student"), latent, rng
        )
        t, _ = self._times(rng, times_per_sample)
        call = NetworkCall("student", len(t), gradient=True, layout=layout)
        others = [
            call._replace(role=role, samples=n, gradient=False, joined=True)
            for role, n in self._target_calls(rng, times_per_sample)
        ]
        if self.settings.states == "own":
            jumps = self.experts.evaluations(1.0, self.experts.of_step(rng).interval.low)
            others = [*[call._replace(gradient=False)] * jumps, *others]
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
        null = uncond_velocity(self.backbone, "real", self.negative, batch)
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


def paired_noise(batch: Batch, window: causal_windows.TrainingWindow) -> Tensor:
    """The noise that the teacher sampled each video of a window from, drawn again from its seed."""
    seeds = [seed for seed in batch.seeds if seed is not None]
    if len(seeds) < len(batch.latents):
        raise no_noise("the data set")
    return window.noise(window.of(batch_noise(seeds, batch.latents.shape[1:])))


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
        shape = (rng.count, *([] if window.times_per_sample is None else [window.times_per_sample]))
        interval = self.experts.of_step(rng).interval
        drawn = times.sample_uniform(math.prod(shape), self.shift, rng.generator("times"), interval=interval)
        t = drawn.reshape(shape)
        t = window.by_frame(rng.local(t)).to(videos)
        z = losses.interpolate(window.x, paired_noise(batch, window), t)
        weight = times.loss_weight(self.settings.weight, self.shift)
        model = window.bind(self.backbone.velocity("student", window.condition(batch.condition)))
        loss = losses.consistency_loss(model, z, t, window.x, weight)
        return loss, {"loss": sums(loss, len(videos))}

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """One call on the window; two where the jump to 0 crosses from one expert to the other."""
        layout, _ = causal_windows.layout_of(self.window_of, self.backbone.network_of("student"), latent, rng)
        jump = NetworkCall("student", len(rng.positions), gradient=True, layout=layout)
        return [jump] * self.experts.evaluations(self.experts.of_step(rng).interval.high, 0.0)
