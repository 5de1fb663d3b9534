"""Stage 2 on the student's own samples (Alg. 2): matching with the teacher, and the fake score's training.

Legend: N global batch, B micro-batch, F latent frames, C channels, H W latent height and width, L text
tokens, D text width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import UsageError
from anyflow_cli.flow import matching, simulation, times
from anyflow_cli.flow.matching import Renoising
from anyflow_cli.flow.velocity import Velocity, checkpointed, in_fp32
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import partition_for
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.recipe import schema
from anyflow_cli.train import causal_windows
from anyflow_cli.train.causal_windows import NetworkCall
from anyflow_cli.train.loss_terms import LatentShape, Sums, power_and_motion, sums, uncond_velocity
from anyflow_cli.train.rng import StepRng
from anyflow_cli.train.trained_expert import ONE_NETWORK, TrainedExpert


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
        """Evaluate the matching loss (Eq. 5) on a rollout with gradient."""
        settings = self.settings
        batch = self._conditioned(batch, rng, "rollout")
        x = self._rollout(batch, rng, "rollout")
        if settings.reuse_rollout and settings.matching == "distribution":
            self._rollouts[rng.positions] = x.detach()
        t = self._matching_times(rng, "matching-times", self.experts.of_step(rng).interval).to(x)
        eps = batch.condition.put_back(rng.noise("matching-noise", x.shape[1:]).to(x))
        loss = self._match(batch, rng, x, Renoising(t, eps))
        return loss, {
            "matching": sums(loss, len(x)),
            **power_and_motion("sample", x),
            **power_and_motion("data", batch.latents),
        }

    def matching_calls(self, latent: LatentShape, rng: StepRng) -> list[NetworkCall]:
        """A rollout with gradient, then the scores without: the real one guided, 2B samples.

        Where guidance has times of its own, it is 3B. Without a fake score the student follows, 3B.
        """
        settings, samples = self.settings, len(rng.positions)
        call = NetworkCall("real", samples, gradient=False, joined=True)
        if settings.matching == "fake-free":
            scores = [call._replace(samples=2 * samples), call._replace(role="student", samples=3 * samples)]
        else:
            guided = 2 if settings.guidance_times == "shared" else 3
            scores = [call._replace(role="fake", joined=False), call._replace(samples=guided * samples)]
        return [*self._rollout_calls(latent, rng, "rollout", gradient=True), *scores]

    def _match(self, batch: Batch, rng: StepRng, x: Tensor, at: Renoising) -> Tensor:
        """Evaluate the recipe's matching loss () of samples x, noised again."""
        settings, expert = self.settings, self.experts.of_step(rng)
        real = self.backbone.velocity("real", batch.condition)
        null = uncond_velocity(self.backbone, "real", self.negative, batch)
        scale = expert.scale(settings.real_guidance)
        orthogonal = settings.matching_gradient == "orthogonal"
        guidance = matching.guidance_until(settings.real_guidance_until, scale)
        if settings.matching == "fake-free":
            student = self.backbone.velocity("student", batch.condition)
            precise = settings.flow_map.derivative_precision == "fp32"
            return matching.fake_free_matching_loss(
                x, in_fp32(student) if precise else student, real, null, at.t, at.eps, guidance,
                r=torch.full_like(at.t, expert.interval.low), delta=settings.flow_map.delta,
                t_max=expert.interval.high, orthogonal=orthogonal,
            )  # fmt: skip
        fake, elsewhere = self.backbone.velocity("fake", batch.condition), None
        if settings.guidance_times == "own":
            until = min(settings.real_guidance_until, self._jump_start(rng, "rollout"))
            interval = expert.interval
            interval = interval._replace(high=max(interval.low, min(interval.high, until)))
            eps = batch.condition.put_back(rng.noise("guidance-noise", x.shape[1:]).to(x))
            t = self._matching_times(rng, "guidance-times", interval).to(x)
            elsewhere, guidance = Renoising(t, eps), scale
        return matching.distribution_matching_loss(
            x, fake, real, null, at.t, at.eps, guidance, guidance_at=elsewhere, orthogonal=orthogonal
        )

    def _matching_times(self, rng: StepRng, stream: str, interval: times.TimeInterval) -> Tensor:
        """Draw the times (B,) at which scores are evaluated on samples."""
        own = self.settings
        t = times.sample_uniform(
            rng.count, self.score_shift, rng.generator(stream), own.t_min, own.t_max, interval
        )
        return rng.local(t)

    def _jump_start(self, rng: StepRng, stream: str) -> float:
        """Time at which the drawn segment of Alg. 2 starts, or a baseline's jump with gradient."""
        if self.settings.simulation == "flow-map":
            steps, k = self._segment(rng, stream)
            return float(times.grid(steps, self.shift)[k])
        exit_step, grid = self._exit_step(rng.generator(stream), gradient=True)
        return float(grid[exit_step])

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
        partition = self._rollout_partition(frames, skipped)
        if self.settings.replay_rollout and torch.is_grad_enabled():
            return causal_windows.replay_rollout(
                model, noise, partition, simulate, given=given, recomputes=recomputes
            )
        return causal_windows.roll_out(
            model, noise, partition, simulate, given=given, recomputes=recomputes, skipped=skipped
        )

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
        if self.causal is None:
            return self._jump_calls(rng, stream, gradient=gradient)
        skipped, settings = self._skipped_frames(rng, stream), self.settings
        network, partition = self.backbone.network_of("student"), self._rollout_partition(latent[0], skipped)
        known = self._conditioning_frames(rng, stream, latent[0])
        if settings.replay_rollout and gradient:
            jumps = self._jump_calls(rng, stream, gradient=True)
            return causal_windows.replay_calls(jumps, network, partition, latent, known)
        return causal_windows.rollout_calls(
            lambda chunk: self._jump_calls(rng, stream, gradient=gradient, chunk=chunk),
            network, partition, (latent[0] + skipped, *latent[1:]),
            known=known, recomputes=settings.recompute_rollout and gradient, skipped=skipped,
        )  # fmt: skip

    def _jump_calls(self, rng: StepRng, stream: str, *, gradient: bool, chunk: int = 1) -> list[NetworkCall]:
        """List the calls that roll a video, or a chunk of this number, out."""
        settings = self.settings
        if settings.simulation == "flow-map":
            segment = self._segment(rng, stream, chunk)
            jumps = [(t, r, gradient) for t, r in simulation.rollout_jumps(*segment, self.shift)]
        else:
            exit_step, grid = self._exit_step(rng.generator(stream), gradient=gradient)
            starts = grid.tolist()[: exit_step + 1]
            ends = grid.tolist()[1:] if settings.simulation == "fixed-steps" else [0.0] * len(starts)
            jumps = [
                (t, r, gradient and n == exit_step)
                for n, (t, r) in enumerate(zip(starts, ends, strict=False))
            ]
        recomputes = settings.recompute_rollout and gradient
        return [
            NetworkCall("student", len(rng.positions), carries, group=n if recomputes and carries else None)
            for n, (t, r, carries) in enumerate(jumps)
            for _ in range(self.experts.evaluations(t, r))
        ]

    def _segment(self, rng: StepRng, stream: str, chunk: int = 1) -> simulation.SimulationSegment:
        """Draw N and k of Alg. 2; the first chunk may have its own."""
        first = self.settings.first_chunk_budgets if chunk == 0 else None
        if first is not None:
            return simulation.draw_segment(first, rng.generator(f"{stream}-first-chunk"))
        return simulation.draw_segment(self.settings.step_budgets, rng.generator(stream))

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
        """Draw how the student jumps from noise to time 0, alike on every process.

        Chunks share the drawn steps, but for the first one where it has budgets of its own.
        """
        settings = self.settings
        if settings.simulation == "flow-map":
            return lambda model, noise, chunk: simulation.flow_map_rollout(
                model, noise, *self._segment(rng, stream, chunk), self.shift
            )
        exit_step, grid = self._exit_step(rng.generator(stream), gradient=torch.is_grad_enabled())
        if settings.simulation == "fixed-steps":
            return lambda model, noise, _: simulation.fixed_steps_rollout(model, noise, grid, exit_step)

        def consistency(model: Velocity, noise: Tensor, chunk: int) -> Tensor:
            streams = rng.generators(f"{stream}-noise-{chunk}")  # new ones: a chunk may be recomputed
            return simulation.consistency_rollout(model, noise, grid, exit_step, streams)

        return consistency
