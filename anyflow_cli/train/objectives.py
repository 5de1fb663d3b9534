"""What differs between trainings: which loss, of which role, drawn how. The loop is in ``trainer``.

An objective has phases in the order in which a step runs them, each with parameters, an optimizer and
terms: losses that are added up. Each term is run and differentiated by itself, so that one graph is held
at a time.

    flow-map          stage 1, Alg. 1         student: flow map
    flow-matching     the teacher's tuning    student: flow matching, one time
    consistency-ode   baseline of Table 2     student: f(z, t, 0) against the teacher's x
    on-policy         stage 2, Alg. 2         student: matching + flow map on data; fake: its score

A causal student trains on the windows of ``causal_windows.py``; teacher and scores are bidirectional.

A term returns its mean loss over the micro batch and, for reports, (sum, count) pairs, which add up
exactly over micro batches and processes. It also declares the network calls that it makes, from the same
random draws (``network_calls``); ``anyflow plan`` computes FLOPs and memory from these.

Legend: N global batch, B micro batch, F latent frames, C channels, H W latent height and width, L text
tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import UsageError
from anyflow_cli.flow import losses, matching, simulation, times
from anyflow_cli.flow.noise import batch_noise
from anyflow_cli.flow.velocity import Velocity, checkpointed
from anyflow_cli.model.backbone import Backbone, Role
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.parallelize import local_tensor
from anyflow_cli.recipe import schema
from anyflow_cli.train import causal_windows
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.rng import StepRng, stream_seed

Sums = Mapping[str, Tensor]  # name -> (sum, count), (2,)
LatentShape = tuple[int, int, int, int]  # F, C, H, W


class LossTerm(Protocol):
    """One loss of a phase, on a micro batch."""

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Mean loss (), and what is reported of it."""

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """The forward passes that ``__call__`` makes under these rng, in order."""


@dataclass(frozen=True)
class FunctionTerm:
    """A loss function, and the function that declares its network calls, as one term."""

    loss: Callable[[Batch, StepRng], tuple[Tensor, Sums]]
    calls: Callable[[LatentShape, StepRng], list[NetworkCall]]

    def __call__(self, batch: Batch, rng: StepRng, /) -> tuple[Tensor, Sums]:
        """Evaluate the loss."""
        return self.loss(batch, rng)

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """Its declaration."""
        return self.calls(latent, rng)


@dataclass(frozen=True)
class Phase:
    """One optimizer's part of a step: the losses that move one role's weights."""

    role: Role
    optimizer: schema.OptimizerSection
    terms: tuple[LossTerm, ...]


@dataclass(frozen=True)
class Objective:
    """Phases, in the order in which a step runs them, over the roles of one backbone."""

    backbone: Backbone
    phases: tuple[Phase, ...]


def stage_one(
    name: Literal["flow-map", "flow-matching", "consistency-ode"],
    backbone: Backbone,
    negative: Tensor,
    settings: schema.FlowMapSection,
    optimizer: schema.OptimizerSection,
    shift: float,
    causal: schema.CausalSection | None = None,
) -> Objective:
    """An objective of the student alone on data; ``negative`` (L, D) is the negative prompt's embedding."""
    view = window_of(causal, settings)
    matching = FlowMatchingTerm(backbone, negative, settings.text_dropout, shift)
    terms: dict[str, LossTerm] = {
        "flow-map": FlowMapTerm(backbone, negative, settings, shift, view),
        "flow-matching": matching,
        "consistency-ode": ConsistencyTerm(backbone, settings, shift, view),
    }
    student: tuple[LossTerm, ...] = (terms[name],)
    if causal is not None and name != "flow-matching":
        bidirectional = weighted(matching, 1.0, "bidirectional_")
        student = (WithProbability(bidirectional, causal.bidirectional, "bidirectional"), *student)
        student = tuple(TouchUnused(term, backbone) for term in student)
    return Objective(backbone, (Phase("student", optimizer, student),))


def on_policy(
    backbone: Backbone,
    negative: Tensor,
    settings: schema.DistillSection,
    shift: float,
    causal: schema.CausalSection | None = None,
) -> Objective:
    """Stage 2: Alg. 2 and, in the same update of the student, Alg. 1 on data; then the fake score."""
    policy = OnPolicyTerms(backbone, negative, settings, shift, causal)
    student: tuple[LossTerm, ...] = (FunctionTerm(policy.matching, policy.matching_calls),)
    if settings.joint:
        flow_map = FlowMapTerm(
            backbone, negative, settings.flow_map, shift, window_of(causal, settings.flow_map)
        )
        student += (weighted(flow_map, settings.joint_weight, "flow_map_"),)
    if causal is not None:
        student = tuple(TouchUnused(term, backbone) for term in student)
    fake_score = FunctionTerm(policy.fake_score, policy.fake_score_calls)
    fake = Phase("fake", settings.fake_optimizer or settings.optimizer, (fake_score,))
    return Objective(backbone, (Phase("student", settings.optimizer, student), fake))


def window_of(
    causal: schema.CausalSection | None, settings: schema.FlowMapSection
) -> causal_windows.WindowOf:
    """What the student sees of its data."""
    return (
        causal_windows.whole_video
        if causal is None
        else causal_windows.TeacherForcing(causal, settings.conditioning_prob)
    )


@dataclass(frozen=True)
class FlowMapTerm:
    """Algorithm 1 on data."""

    backbone: Backbone
    negative: Tensor  # (L, D)
    settings: schema.FlowMapSection
    shift: float
    view: causal_windows.WindowOf = causal_windows.whole_video

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Loss of a micro batch; boundary samples first in the global batch, as ``GlobalMean`` needs them."""
        settings, view = self.settings, self.view(batch.latents, rng)
        x = view.x
        t, r = map(view.by_frame, self._times(rng, view.each))
        batch, dropped = drop_text(batch, self.negative, settings.text_dropout, rng)
        result = losses.flow_map_loss(
            view.bind(self.backbone.velocity("student", batch.text)),
            view.bind(_null(self.backbone, "student", self.negative, batch)),
            x, rng.noise("noise", x.shape[1:]).to(x), t, r,
            guidance=settings.guidance,
            delta=settings.delta,
            weight=times.loss_weight(settings.weight, self.shift),
            adaptive=settings.adaptive,
            loss_scale=settings.loss_scale,
            guidance_path=settings.guidance_path,
            global_mean=rng.global_mean,
            null_mask=dropped,
        )  # fmt: skip
        boundary = t == r
        return result.loss, {
            "loss": sums(result.loss, len(x)),
            "boundary": sums(result.errors, boundary),
            "non_boundary": sums(result.errors, ~boundary),
        }

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """Calls of ``losses.flow_map_loss``: u_null (G samples) and du/dt (2I), then all B with gradient."""
        layout, each = causal_windows.layout_of(self.view, self.backbone.network_of("student"), latent, rng)
        t, r = self._times(rng, each)
        inner = int((t != r).reshape(len(t), -1).any(1).sum())
        guided = int((~dropped_text(self.settings.text_dropout, rng)).sum())
        # with guidance an empty call takes one sample: every rank must call alike
        if self.settings.guidance == 1:
            without_gradient = [2 * inner]
        elif self.settings.guidance_path == "guided":
            without_gradient = [guided or 1, 2 * inner or 1]
        else:
            without_gradient = [guided + 2 * inner or 1]
        call = NetworkCall("student", len(t), gradient=True, layout=layout)
        return [call._replace(samples=n, gradient=False) for n in without_gradient if n] + [call]

    def _times(self, rng: StepRng, each: int | None) -> tuple[Tensor, Tensor]:
        """Times t and r of the micro batch, (B,) or (B, K) for ``each`` = K times per sample."""
        ratios = times.TimeRatios(self.settings.boundary, self.settings.to_zero)
        t, r = times.sample_times(rng.count, self.shift, ratios, rng.generator("times"), each)
        order = (t != r).reshape(len(t), -1).any(1).to(torch.uint8).argsort(stable=True)
        return rng.local(t[order]), rng.local(r[order])


@dataclass(frozen=True)
class FlowMatchingTerm:
    """Plain flow matching on data, logit-normal times."""

    backbone: Backbone
    negative: Tensor  # (L, D)
    text_dropout: float
    shift: float

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Loss of a micro batch."""
        x = batch.latents
        t = rng.local(times.sample_logit_normal(rng.count, self.shift, rng.generator("times"))).to(x)
        batch, _ = drop_text(batch, self.negative, self.text_dropout, rng)
        model = self.backbone.velocity("student", batch.text)
        loss = losses.flow_matching_loss(model, x, rng.noise("noise", x.shape[1:]).to(x), t)
        return loss, {"loss": sums(loss, len(x))}

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """One call of whole videos."""
        return [NetworkCall("student", len(rng.positions), gradient=True)]


@dataclass(frozen=True)
class ConsistencyTerm:
    """Consistency ODE-init: one jump from any t of a path to the teacher's own video at its end.

    The path's start is the very noise that the teacher made the video from, drawn again from its seed; in
    between stands the chord. Fresh noise would make the target the mean of many videos.
    """

    backbone: Backbone
    settings: schema.FlowMapSection
    shift: float
    view: causal_windows.WindowOf = causal_windows.whole_video

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Loss of a micro batch."""
        videos, view = batch.latents, self.view(batch.latents, rng)
        seeds = [seed for seed in batch.seeds if seed is not None]
        if len(seeds) < len(videos):
            raise UsageError(
                "consistency-ode needs the noise each video was made from, and the data set has real clips.",
                "Train it on what `anyflow synthesize` made with the teacher.",
            )
        shape = (rng.count,) if view.each is None else (rng.count, view.each)
        t = times.sample_uniform(math.prod(shape), self.shift, rng.generator("times")).reshape(shape)
        t = view.by_frame(rng.local(t))
        eps = view.of(batch_noise(seeds, videos.shape[1:]).to(videos))
        z = losses.interpolate(view.x, eps, t)
        weight = times.loss_weight(self.settings.weight, self.shift)
        model = view.bind(self.backbone.velocity("student", batch.text))
        loss = losses.consistency_loss(model, z, t, view.x, weight)
        return loss, {"loss": sums(loss, len(videos))}

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """One call of the window."""
        layout, _ = causal_windows.layout_of(self.view, self.backbone.network_of("student"), latent, rng)
        return [NetworkCall("student", len(rng.positions), gradient=True, layout=layout)]


class OnPolicyTerms:
    """Algorithm 2: the student's own samples are pulled to the teacher's; the fake score follows them.

    ``reuse_rollout`` trains the fake score on the samples that the student was just trained on, which
    saves the second rollout; else it gets fresh ones from the updated student, as the paper does.
    """

    def __init__(
        self,
        backbone: Backbone,
        negative: Tensor,
        settings: schema.DistillSection,
        shift: float,
        causal: schema.CausalSection | None = None,
    ) -> None:
        self.backbone, self.negative, self.settings, self.shift = backbone, negative, settings, shift
        self.score_shift = settings.score_shift or shift
        self.causal = causal
        self._rollouts: dict[tuple[int, ...], Tensor] = {}  # of this step, by positions of a micro batch

    def matching(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Distribution matching (Eq. 5) on a rollout with gradient."""
        settings = self.settings
        x = self._rollout(batch, rng, "rollout")
        if settings.reuse_rollout:
            self._rollouts[rng.positions] = x.detach()
        t = times.sample_uniform(
            rng.count, self.score_shift, rng.generator("matching-times"), settings.t_min, settings.t_max
        )
        loss = matching.distribution_matching_loss(
            x,
            self.backbone.velocity("fake", batch.text),
            self.backbone.velocity("real", batch.text),
            _null(self.backbone, "real", self.negative, batch),
            rng.local(t).to(x),
            rng.noise("matching-noise", x.shape[1:]).to(x),
            settings.real_guidance,
        )
        return loss, {
            "matching": sums(loss, len(x)),
            **_vigour("sample", x),
            **_vigour("data", batch.latents),
        }

    def matching_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """A rollout with gradient, then both scores without; the real one is guided: 2B samples."""
        count = len(rng.positions)
        scores = NetworkCall("fake", count, gradient=False), NetworkCall("real", 2 * count, gradient=False)
        return [*self._rollout_calls(latent, rng, "rollout", gradient=True), *scores]

    def fake_score(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """Flow matching of the fake score on the student's samples."""
        if self.settings.reuse_rollout:
            x = self._rollouts.pop(rng.positions)
        else:
            with torch.no_grad():
                x = self._rollout(batch, rng, "fake-rollout")
        t = times.sample_logit_normal(rng.count, self.score_shift, rng.generator("fake-times"))
        eps, t = rng.noise("fake-noise", x.shape[1:]).to(x), rng.local(t).to(x)
        loss = matching.fake_score_loss(self.backbone.velocity("fake", batch.text), x, eps, t)
        return loss, {"fake": sums(loss, len(x))}

    def fake_score_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """A rollout without gradient, unless one is reused, then the fake score with gradient."""
        reused = self.settings.reuse_rollout
        rollout = [] if reused else self._rollout_calls(latent, rng, "fake-rollout", gradient=False)
        return [*rollout, NetworkCall("fake", len(rng.positions), gradient=True)]

    def _rollout(self, batch: Batch, rng: StepRng, stream: str) -> Tensor:
        """Samples of the student at time 0, (B, F, C, H, W)."""
        model = self.backbone.velocity("student", batch.text)
        noise = rng.noise(f"{stream}-start", batch.latents.shape[1:]).to(batch.latents)
        simulate = self._simulation(rng, stream)
        recomputes = self.settings.recompute_rollout and torch.is_grad_enabled()
        if self.causal is None:
            return simulate(checkpointed(model) if recomputes else model, noise, 0)
        given = batch.latents[:, : self._conditioning_frames(rng, stream)]
        return causal_windows.roll_out(
            model, noise, self.causal.partition, simulate, given=given, recomputes=recomputes
        )

    def _rollout_calls(
        self, latent: LatentShape, rng: StepRng, stream: str, *, gradient: bool
    ) -> list[NetworkCall]:
        """The calls of ``_rollout``; of a consistency rollout only the last one has a gradient."""
        settings, generator = self.settings, rng.generator(stream)
        if settings.simulation == "flow-map":
            steps, k = simulation.draw_segment(settings.step_budgets, generator)
            jumps = [gradient] * ((k > 0) + 1 + (k < steps - 1))  # one of zero length is skipped
        else:
            exit_step = int(torch.randint(settings.consistency_steps, (), generator=generator))
            jumps = [False] * exit_step + [gradient]
        recomputes = settings.recompute_rollout and gradient
        simulated = [NetworkCall("student", len(rng.positions), gradient=jump) for jump in jumps]
        if self.causal is None:
            return [
                call._replace(group=number if recomputes and call.gradient else None)
                for number, call in enumerate(simulated)
            ]
        return causal_windows.rollout_calls(
            simulated, self.backbone.network_of("student"), self.causal.partition, latent,
            known=self._conditioning_frames(rng, stream), recomputes=recomputes,
        )  # fmt: skip

    def _conditioning_frames(self, rng: StepRng, stream: str) -> int:
        """How many frames of a causal rollout come from the data."""
        assert self.causal is not None
        share = self.settings.flow_map.conditioning_prob
        return causal_windows.given_frames(self.causal, share, rng.generator(f"{stream}-given"))

    def _simulation(self, rng: StepRng, stream: str) -> causal_windows.Simulate:
        """From noise to time 0. What is drawn holds for every process, and for every chunk of a video."""
        settings, generator = self.settings, rng.generator(stream)
        if settings.simulation == "flow-map":
            steps, k = simulation.draw_segment(settings.step_budgets, generator)
            return lambda model, noise, _: simulation.flow_map_rollout(model, noise, steps, k, self.shift)
        exit_step = int(torch.randint(settings.consistency_steps, (), generator=generator))
        grid = times.grid(settings.consistency_steps, self.shift)

        def consistency(model: Velocity, noise: Tensor, chunk: int) -> Tensor:
            streams = rng.generators(f"{stream}-noise-{chunk}")  # fresh ones: a chunk may be made again
            return simulation.consistency_rollout(model, noise, grid, exit_step, streams)

        return consistency


@dataclass(frozen=True)
class WithProbability:
    """A term that a share of the steps have, drawn for all processes; nothing in the others."""

    term: LossTerm
    share: float
    stream: str

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """The term's loss, from draws of its own, or zero."""
        own = self._own_rng(rng)
        return (batch.latents.new_zeros(()), {}) if own is None else self.term(batch, own)

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """The term's calls in the steps that have it, else none."""
        own = self._own_rng(rng)
        return [] if own is None else self.term.network_calls(latent, own)

    def _own_rng(self, rng: StepRng) -> StepRng | None:
        if float(torch.rand((), generator=rng.generator(self.stream))) >= self.share:
            return None
        return replace(rng, seed=stream_seed(rng.seed, self.stream))


@dataclass(frozen=True)
class TouchUnused:
    """A term whose gradient reaches the compressed patch embedding even where no chunk is compressed.

    Zero then: every process must have a gradient for every weight, and an optimizer must not tell apart a
    step in which one process alone had none.
    """

    term: LossTerm
    backbone: Backbone

    def __call__(self, batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        """The same loss."""
        loss, report = self.term(batch, rng)
        embedding = self.backbone.network_of("student").far_patch_embedding
        return loss + 0 * sum(local_tensor(weight).sum() for weight in embedding.parameters()), report

    def network_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """The term's own."""
        return self.term.network_calls(latent, rng)


def weighted(term: LossTerm, weight: float, prefix: str) -> LossTerm:
    """The same loss times ``weight``; what it reports keeps its scale and gets a prefix."""

    def scaled(batch: Batch, rng: StepRng) -> tuple[Tensor, Sums]:
        loss, report = term(batch, rng)
        return weight * loss, {prefix + name: value for name, value in report.items()}

    return FunctionTerm(scaled, term.network_calls)


def drop_text(batch: Batch, negative: Tensor, share: float, rng: StepRng) -> tuple[Batch, Tensor]:
    """Replace the text of a ``share`` of the samples by the negative prompt's; which (B,) were replaced."""
    dropped = dropped_text(share, rng).to(batch.text.device)
    text = torch.where(dropped[:, None, None], negative.to(batch.text), batch.text)
    return replace(batch, text=text), dropped


def dropped_text(share: float, rng: StepRng) -> Tensor:
    """Which samples (B,) of a micro batch lose their text."""
    return rng.local(torch.rand(rng.count, generator=rng.generator("text-dropout"))) < share


def sums(values: Tensor, of: Tensor | int) -> Tensor:
    """(sum, count): of values (B,) where a mask (B,) holds, or of a mean () that stands for so many."""
    values = values.detach().double()
    if isinstance(of, int):
        return torch.stack([values * of, torch.full_like(values, of)])
    return torch.stack([values[of].sum(), of.sum().double()])


def _vigour(name: str, x: Tensor) -> Sums:
    """Power and motion (from frame to frame) of videos x (B, F, C, H, W); what the alarms compare."""
    power, motion = x.detach().square().mean(), x.detach().diff(dim=1).square().sum() / x.numel()
    return {f"{name}_power": sums(power, len(x)), f"{name}_motion": sums(motion, len(x))}


def _null(backbone: Backbone, role: Role, negative: Tensor, batch: Batch) -> Conditioned:
    """The role's network under the negative prompt."""
    return backbone.velocity(role, negative.to(batch.text).expand_as(batch.text))


def micro_batch(batch: Batch, start: int, stop: int) -> Batch:
    """A micro batch of a process's share."""
    part = slice(start, stop)
    return Batch(batch.latents[part], batch.text[part], batch.captions[part], batch.seeds[part])
