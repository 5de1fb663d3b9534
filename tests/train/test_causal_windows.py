"""Causal training: what a step sees and noises, and that its losses and gradients are what they should be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import UsageError
from anyflow_cli.flow import simulation
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.losses import interpolate
from anyflow_cli.flow.times import TimeRatios, loss_weight, sample_times
from anyflow_cli.flow.velocity import Velocity, batch_time, flow_map
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.causal import (
    Replayed,
    TeacherForced,
    causal_from,
    partition_for,
    remembered_for,
    split_after,
)
from anyflow_cli.model.chunk_sampling import sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import (
    TeacherForcing,
    TrainingWindow,
    Window,
    draw_conditioning_frames,
    replay_rollout,
    roll_out,
)
from anyflow_cli.train.objectives import FlowMapTerm
from anyflow_cli.train.on_policy import OnPolicyTerms
from anyflow_cli.train.rng import StepRng
from tests.train import small
from tests.train.small import CONFIG, NEGATIVE, trainer

CAUSAL = schema.CausalSection(partition=(1, 2, 1, 2), full_chunks=2)
SHAPE = (6, 4, 4, 4)  # F, C, H, W
PAPER = schema.CausalSection()
SHIFT = 5.0


def roles(*names: Any, lora: bool = False) -> Backbone:
    """A causal student with no weight at zero, so that every part has an effect."""
    network = causal_from(small.network(), CausalConfig.from_recipe(CAUSAL))
    draw = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    return Backbone(network, names or ("student",), lora=LoraSize(4, 4) if lora else None)


def videos(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def rng_of(step: int = 1, count: int = 2, **options: Any) -> StepRng:
    return StepRng(0, step, count, tuple(range(count)), **options)


def batch(count: int = 2, seed: int = 0) -> Batch:
    text = torch.randn(count, *NEGATIVE.shape, generator=torch.Generator().manual_seed(5))
    return Batch(videos(count, seed), Condition(text), [""] * count, list(range(count)))


# --- windows


def test_half_of_the_steps_have_only_full_chunks_and_half_any_number() -> None:
    view = TeacherForcing(PAPER)
    windows = Counter(view.window(rng_of(step)) for step in range(3000))
    assert {(len(partition), noisy) for partition, noisy in windows} == {(n, 3) for n in range(3, 9)}
    assert all(partition == PAPER.partition[: len(partition)] for partition, _ in windows)
    shares = {len(partition): count / 3000 for (partition, _), count in windows.items()}
    assert shares[3] == pytest.approx(0.5 + 0.5 / 6, abs=0.03)
    assert all(shares[n] == pytest.approx(0.5 / 6, abs=0.02) for n in range(4, 9))


def test_a_step_has_one_window_on_every_process() -> None:
    view = TeacherForcing(PAPER, conditioning_prob=0.5)
    for step in range(20):
        here, there = StepRng(0, step, 4, (0, 2)), StepRng(0, step, 4, (1, 3))
        assert view.window(here) == view.window(there)


def test_conditioning_frames_are_clean_and_the_rest_is_noised() -> None:
    view = TeacherForcing(PAPER, conditioning_prob=1.0)
    images = 0
    for step in range(500):
        known = draw_conditioning_frames(PAPER, 1.0, rng_of(step).generator("given"))
        partition, noisy = view.window(rng_of(step))
        assert partition == split_after(PAPER.partition, known)[: len(partition)]
        assert 1 <= noisy <= 3
        assert sum(partition[:-noisy]) >= known
        images += known == 1
    assert images / 500 == pytest.approx(0.5 + 0.5 / 20, abs=0.07)


def test_a_video_shorter_than_the_window_is_noised_entirely() -> None:
    short = schema.CausalSection(partition=(1, 2), full_chunks=3)
    assert TeacherForcing(short).window(rng_of()) == Window((1, 2), 2)
    assert draw_conditioning_frames(schema.CausalSection(partition=(3,)), 1.0, torch.Generator()) == 0


def test_each_chunk_has_its_own_times() -> None:
    view = TeacherForcing(CAUSAL)(videos(), rng_of())
    assert view.times_per_sample == 2
    assert view.chunks is not None
    times = view.by_frame(torch.rand(2, 2))
    assert times.shape == view.x.shape[:2]
    parts = torch.split(times, list(view.chunks), dim=1)
    assert all((part == part[:, :1]).all() for part in parts)
    assert not torch.equal(parts[0][:, 0], parts[1][:, 0])


def test_times_of_a_sample_are_all_of_the_same_kind() -> None:
    t, r = sample_times(16, SHIFT, TimeRatios(), torch.Generator().manual_seed(0), each=3)
    assert t.shape == r.shape == (16, 3)
    assert (set((t == r).sum(1).tolist()), set((r == 0).sum(1).tolist())) == ({0, 3}, {0, 3})
    assert (int((t == r).all(1).sum()), int((r == 0).all(1).sum())) == (8, 4)
    assert all(len(set(row.tolist())) == 3 for row in t)


# --- stage 1


def direct_loss(backbone: Backbone, x: Tensor, text: Tensor, step: StepRng, g: float, d: float) -> Tensor:
    """Alg. 1 under teacher forcing, sample by sample and call by call."""
    settings = schema.FlowMapSection()
    partition, noisy = TeacherForcing(CAUSAL).window(step)
    t, r = sample_times(
        step.count, SHIFT, TimeRatios(settings.boundary, settings.to_zero), step.generator("times"), noisy
    )
    order = (t != r).any(1).to(torch.uint8).argsort(stable=True)
    lengths = torch.tensor(partition[-noisy:])
    t, r = (time[order].repeat_interleave(lengths, dim=1) for time in (t, r))
    start, stop = sum(partition[:-noisy]), sum(partition)
    eps = step.noise("noise", (stop - start, *SHAPE[1:]))
    weight, errors = loss_weight("beta", SHIFT), []
    for i in range(len(x)):
        video, at, to = x[i : i + 1, :stop], t[i : i + 1], r[i : i + 1]
        clean, noise = video[:, start:], eps[i : i + 1]
        v, z = noise - clean, interpolate(clean, noise, at)

        def evaluate(condition: Tensor, z: Tensor, at: Tensor, to: Tensor, video: Tensor = video) -> Tensor:
            return TeacherForced(backbone.velocity("student", Condition(condition)), video, partition, noisy)(
                z, at, to
            )

        with torch.no_grad():
            null = evaluate(NEGATIVE[None], z, at, to)
            up, down = (at + d).clamp(max=1), torch.maximum(at - d, to)
            column = (..., None, None, None)
            plus = evaluate(text[i : i + 1], z + (up - at)[column] * v, up, to)
            minus = evaluate(text[i : i + 1], z - (at - down)[column] * v, down, to)
            du = (plus - minus) / ((up - down)[column] * g)
            du = torch.where((at > to)[column], du, 0)
        u = (evaluate(text[i : i + 1], z, at, to) - (1 - g) * null) / g
        errors.append((u - v + (at - to)[column] * du).square().mean((2, 3, 4)))
    error = torch.cat(errors)
    boundary = t == r
    level = torch.where(boundary, 1, error[boundary].mean().detach() / (error.detach() + 1e-5))
    return (weight(t) * level * error).mean()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_the_loss_is_alg_1_under_teacher_forcing(step: int) -> None:
    backbone, data = roles(), batch(4)
    settings = schema.FlowMapSection(text_dropout=0.0)
    term = FlowMapTerm(backbone, NEGATIVE, settings, SHIFT, TeacherForcing(CAUSAL))
    loss, report = term(data, rng_of(step, 4))
    expected = direct_loss(backbone, data.latents, data.condition.text, rng_of(step, 4), 3.0, 0.005)
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-6)
    parameters = backbone.parameters_of("student")
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    window = TeacherForcing(CAUSAL).window(rng_of(step))
    frames = sum(window.partition[-window.noisy :])
    assert report["boundary"][1] + report["non_boundary"][1] == 4 * frames


def test_some_of_those_steps_have_compressed_context_and_some_none() -> None:
    lengths = {len(TeacherForcing(CAUSAL).window(rng_of(step, 4)).partition) for step in (1, 2, 3, 4, 5)}
    assert 2 in lengths
    assert len(lengths) > 1


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_a_later_chunk_never_changes_an_earlier_chunks_loss(
    monkeypatch: pytest.MonkeyPatch, given: float
) -> None:
    """Nor frames after the window any loss at all."""
    import anyflow_cli.flow.losses as flow_objective

    found: list[Tensor] = []
    original = flow_objective.flow_map_loss

    def noting(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        found.append(result.errors)
        return result

    monkeypatch.setattr(flow_objective, "flow_map_loss", noting)
    backbone, view = roles(), TeacherForcing(CAUSAL, given)
    term = FlowMapTerm(backbone, NEGATIVE, schema.FlowMapSection(text_dropout=0.0), SHIFT, view)
    for step in range(1, 5):
        seen = view(videos(), rng_of(step))
        for changed in range(SHAPE[0]):
            data = batch()
            term(data, rng_of(step))
            data.latents[:, changed] += 1
            term(data, rng_of(step))
            before, after = found[-2:]
            last = _untouched(seen, changed)
            torch.testing.assert_close(after[:, :last], before[:, :last], rtol=0, atol=0)
            if changed < seen.frames.stop:
                assert not torch.equal(after[:, last:], before[:, last:])


def _untouched(view: TrainingWindow, changed: int) -> int:
    """How many noised frames belong to chunks before the one that frame ``changed`` of the video is in."""
    assert view.chunks is not None
    ends = [sum(view.chunks[: i + 1]) for i in range(len(view.chunks))]
    return max((end for end in ends if view.frames.start + end <= changed), default=0)


def test_a_share_of_the_steps_is_bidirectional(tmp_path: Path) -> None:
    seen: list[bool] = []
    run = trainer(
        tmp_path, "causal-flow-map", steps=40, checkpoint_every=40,
        hooks={"on_step": lambda step, values: seen.append("bidirectional_loss" in values)},
    )  # fmt: skip
    run.run()
    assert 8 <= sum(seen) <= 24  # a share of 0.4


# --- stage 2


def policy(backbone: Backbone, **changes: Any) -> OnPolicyTerms:
    return OnPolicyTerms(backbone, NEGATIVE, schema.DistillSection(**changes), SHIFT, CAUSAL)


def test_every_chunk_is_sampled_by_three_jumps_over_the_clean_past() -> None:
    """Without a cache: each jump in one teacher-forcing pass over the chunks before it, all kept in full."""
    causal = schema.CausalSection(partition=(1, 2, 1, 2), full_chunks=4)
    network = causal_from(small.network(), CausalConfig.from_recipe(causal))
    backbone, data = Backbone(network), batch()
    terms = OnPolicyTerms(backbone, NEGATIVE, schema.DistillSection(), SHIFT, causal)
    for step in range(1, 4):
        x = terms._rollout(data, rng_of(step), "rollout")
        steps, k = simulation.draw_segment(
            schema.DistillSection().step_budgets, rng_of(step).generator("rollout")
        )
        noise, made = rng_of(step).noise("rollout-start", SHAPE), torch.zeros(2, 0, *SHAPE[1:])
        for i, frames in enumerate(causal.partition):
            start = sum(causal.partition[:i])
            z = noise[:, start : start + frames]
            seen = torch.cat((made, z), dim=1)  # the last chunk's own clean copy is seen by none
            model = TeacherForced(
                backbone.velocity("student", data.condition), seen, causal.partition[: i + 1], noisy=1
            )
            made = torch.cat((made, simulation.flow_map_rollout(model, z, steps, k, SHIFT)), dim=1)
        torch.testing.assert_close(x, made, rtol=1e-4, atol=1e-5)


class Jumps:
    """A velocity that keeps its outputs, to check later which of them received a gradient."""

    def __init__(self, made: list[Tensor]) -> None:
        self.made = made

    def over(self, model: Velocity) -> Any:
        def velocity(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            u = model(z, t, r)
            if u.requires_grad:
                u.retain_grad()
            self.made.append(u)
            return u

        return velocity


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_reaches_every_chunks_three_jumps_and_no_other_chunk(lora: bool) -> None:
    backbone = roles(lora=lora)
    made: list[Tensor] = []
    jumps = Jumps(made)

    def simulate(model: Velocity, noise: Tensor, _: int) -> Tensor:
        return simulation.flow_map_rollout(jumps.over(model), noise, 4, 1, SHIFT)

    noise = videos()
    model = backbone.velocity("student", batch().condition)
    x = roll_out(model, noise, CAUSAL.partition, simulate, given=noise[:, :0])
    assert len(made) == 3 * len(CAUSAL.partition)
    last = x[:, -CAUSAL.partition[-1] :].square().sum()
    torch.autograd.backward(last, retain_graph=True)
    reached = [u.grad is not None and bool(u.grad.abs().sum() > 0) for u in made]
    assert reached == [False] * 9 + [True] * 3  # the cache carries none to the chunks before
    torch.autograd.backward(x.square().sum())
    assert all(u.grad is not None and u.grad.abs().sum() > 0 for u in made)


def test_cached_keys_carry_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow_cli.model.kv_cache import KeyCache

    backbone, caches = roles(), []
    append = KeyCache.append

    def noting(self: KeyCache, *arguments: Any) -> None:
        append(self, *arguments)
        caches.append(self._memory)

    monkeypatch.setattr(KeyCache, "append", noting)
    x = policy(backbone)._rollout(batch(), rng_of(), "rollout")
    assert x.requires_grad
    assert len(caches) == 3
    assert not any(part.requires_grad for memory in caches for layer in memory.layers for part in layer)


def matching_gradients(backbone: Backbone, **changes: Any) -> list[Tensor]:
    loss, _ = policy(backbone, **changes).matching(batch(), rng_of(3))
    parameters = backbone.parameters_of("student")
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(1) if gradient is None else gradient for gradient in found]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("simulated", ["flow-map", "consistency"])
def test_recomputing_jumps_gives_the_same_gradient(lora: bool, simulated: str, checkpointing: bool) -> None:
    backbone = roles("student", "real", "fake", lora=lora)
    for parameter in backbone.parameters_of("student"):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    kept = matching_gradients(backbone, simulation=simulated)
    backbone.network_of("student").gradient_checkpointing = checkpointing
    again = matching_gradients(backbone, simulation=simulated, recompute_rollout=True)
    assert any(gradient.abs().sum() > 0 for gradient in kept)
    for a, b in zip(again, kept, strict=True):  # keys of the past are made in one pass, not one by one
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_block_checkpointing_recomputes_over_the_same_cache() -> None:
    backbone = roles("student", "real", "fake")
    kept = matching_gradients(backbone)
    backbone.network_of("student").gradient_checkpointing = True
    for a, b in zip(matching_gradients(backbone), kept, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_recomputed_rollouts_keep_the_graph_of_one_chunk() -> None:
    """Bytes kept between forward and backward: of each chunk its latents, instead of its graph."""
    held = {}
    for recomputes in (False, True):
        for partition in ((1, 1, 1, 1), (1,) * 8):
            causal = schema.CausalSection(partition=partition, full_chunks=2)
            network = causal_from(small.network(), CausalConfig.from_recipe(causal)).requires_grad_(True)
            settings = schema.DistillSection(recompute_rollout=recomputes)
            terms = OnPolicyTerms(Backbone(network), NEGATIVE, settings, SHIFT, causal)
            latents = torch.zeros(2, len(partition), 4, 8, 8)
            with saved_bytes() as saved:
                terms._rollout(replace(batch(), latents=latents), rng_of(), "rollout")
            held[recomputes, len(partition)] = saved[0]
    assert held[False, 8] > 1.9 * held[False, 4]
    assert held[True, 8] < 0.05 * held[False, 8]


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes that autograd's graphs keep; what a checkpoint keeps itself are its inputs, latents."""
    saved = [0]

    def keep(tensor: Tensor) -> Tensor:
        saved[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def test_a_rollout_continues_its_conditioning_frames() -> None:
    backbone, data = roles(), batch()
    terms = policy(backbone, flow_map={"conditioning_prob": 1.0})
    for step in range(1, 4):
        known = draw_conditioning_frames(CAUSAL, 1.0, rng_of(step).generator("rollout-given"))
        x = terms._rollout(data, rng_of(step), "rollout")
        torch.testing.assert_close(x[:, :known], data.latents[:, :known], rtol=0, atol=0)
        assert x[:, known:].grad_fn is not None
        other = batch()
        other.latents[:, known:] += 1  # what is not given is not seen
        torch.testing.assert_close(terms._rollout(other, rng_of(step), "rollout"), x, rtol=0, atol=0)
        other.latents[:, 0] += 1
        assert not torch.allclose(terms._rollout(other, rng_of(step), "rollout")[:, known:], x[:, known:])


def test_consistency_simulation_ends_every_chunk_at_one_step() -> None:
    """Self-Forcing's way: the prediction at the exit step is the chunk, and the past of those after it."""
    backbone, data = roles(), batch()
    terms = policy(backbone, simulation="consistency", consistency_steps=1)
    x = terms._rollout(data, rng_of(), "rollout")
    model, noise = backbone.velocity("student", data.condition), rng_of().noise("rollout-start", SHAPE)
    expected = roll_out(
        model, noise, CAUSAL.partition,
        lambda model, z, _: flow_map(model, z, batch_time(1.0, z), batch_time(0.0, z)),
        given=noise[:, :0],
    )  # fmt: skip
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-6)


def test_the_scores_evaluate_the_whole_video_bidirectionally(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = roles("student", "real", "fake", lora=True)
    network, layouts = backbone.network_of("real"), []
    forward = type(network).forward

    def noting(
        self: Any, z: Tensor, t: Tensor, r: Tensor, text: Any, layout: Any = None, *rest: Any, **more: Any
    ) -> Any:
        layouts.append((layout, z.shape[1]))
        return forward(self, z, t, r, text, layout, *rest, **more)

    monkeypatch.setattr(type(network), "forward", noting)
    policy(backbone).matching(batch(), rng_of())
    assert layouts[-2:] == [(None, SHAPE[0])] * 2  # fake; then real, guided in one batch
    assert sum(layout is None for layout, _ in layouts) == 2
    assert CONFIG.causal is None


# --- self gradient forcing: the rollout again, all chunks at once

FIVE = (1, 2, 1, 1, 1)  # with 2 full chunks some are compressed, and a clean chunk has copies


def replayed(known: int = 0, sink: int = 0, lora: bool = False) -> tuple[Backbone, Tensor, Tensor]:
    """A backbone, and videos by ``roll_out`` and by ``replay_rollout`` with gradient."""
    backbone = roles(lora=lora)
    network = backbone.network_of("student")
    causal = replace(CausalConfig.from_recipe(CAUSAL), partition=FIVE, sink_chunks=sink)
    network.config = replace(network.config, causal=causal)
    model, noise = backbone.velocity("student", batch().condition), videos()

    def simulate(model: Velocity, noise: Tensor, _: int) -> Tensor:
        return simulation.flow_map_rollout(model, noise, 4, 1, SHIFT)

    given = videos(seed=4)[:, :known]
    x, again = (rolled(model, noise, FIVE, simulate, given=given) for rolled in (roll_out, replay_rollout))
    return backbone, x, again


@pytest.mark.parametrize(("known", "sink"), [(0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (3, 1)])
def test_a_replayed_rollout_is_the_one_over_the_cache(known: int, sink: int) -> None:
    """Whatever is compressed, given, or kept as a sink: the layout has what the cache held."""
    _, x, again = replayed(known, sink)
    torch.testing.assert_close(again, x, rtol=1e-4, atol=1e-5)
    assert again[:, known:].requires_grad


def test_a_replayed_chunk_has_gradient_through_the_keys_of_those_before_it() -> None:
    """The keys of a chunk's past depend on its latents; the cache's carry no gradient."""
    backbone, x, _ = replayed()
    model = backbone.velocity("student", batch().condition)
    clean = x.detach().requires_grad_()
    velocity = Replayed(model, clean, FIVE)
    t = torch.full((2,), 0.7)
    u = velocity(videos(seed=9), t, torch.zeros(2))
    ends = [sum(FIVE[: i + 1]) for i in range(len(FIVE))]
    for number, (frames, end) in enumerate(zip(FIVE, ends, strict=True)):
        part = u[:, end - frames : end].square().sum()
        (gradient,) = torch.autograd.grad(part, clean, retain_graph=True)
        reached = gradient.abs().flatten(2).sum((0, 2)) > 0
        assert reached.tolist() == [frame < end - frames for frame in range(sum(FIVE))], number


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_gradient_of_a_replay_is_that_of_each_chunk_over_its_past(lora: bool) -> None:
    """All weights of each chunk's pass count, those that encode its clean past included."""
    backbone, x, again = replayed(lora=lora)
    parameters = backbone.parameters_of("student")
    target, model = videos(seed=5), backbone.velocity("student", batch().condition)
    ours = torch.autograd.grad((again - target).square().sum(), parameters, allow_unused=True)
    chunks, done = [], 0
    for number, frames in enumerate(FIVE):
        past, part = x.detach()[:, :done], slice(done, done + frames)
        seen = torch.cat((past, torch.zeros_like(x[:, part])), dim=1)
        # over the whole of its past: a replay of the chunks so far whose others are given
        velocity = Replayed(model, seen, FIVE[: number + 1], done)
        chunks.append(simulation.flow_map_rollout(velocity, videos()[:, part], 4, 1, SHIFT))
        done += frames
    alone = (torch.cat(chunks, dim=1) - target).square().sum()
    theirs = torch.autograd.grad(alone, parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def test_a_replayed_rollout_trains_what_the_cache_hides() -> None:
    """Its loss is the plain rollout's, its gradient is not; recomputed jumps give the same one."""
    backbone = roles("student", "real", "fake")
    losses, found = [], []
    for changes in ({}, {"replay_rollout": True}, {"replay_rollout": True, "recompute_rollout": True}):
        loss, _ = policy(backbone, **changes).matching(batch(), rng_of(3))
        parameters = backbone.parameters_of("student")
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(loss.item())
        found.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-4)
    assert found[0].shape != found[1].shape or (found[0] - found[1]).norm() > 1e-2 * found[0].norm()
    torch.testing.assert_close(found[2], found[1], rtol=1e-4, atol=1e-5)


# --- budgets of the first chunk


def test_the_first_chunk_has_budgets_of_its_own() -> None:
    terms, plain = policy(roles(), first_chunk_budgets=(50,)), policy(roles())
    for step in range(1, 5):
        first, *others = (terms._segment(rng_of(step), "rollout", chunk) for chunk in range(4))
        assert first.steps == 50
        assert others == [plain._segment(rng_of(step), "rollout")] * 3
        x, same = (each._rollout(batch(), rng_of(step), "rollout") for each in (terms, plain))
        assert not torch.equal(x[:, : CAUSAL.partition[0]], same[:, : CAUSAL.partition[0]])
    one = policy(roles(), first_chunk_budgets=(4,), step_budgets=(4,))
    assert {one._segment(rng_of(step), "rollout", 0) for step in range(1, 40)} == {
        simulation.SimulationSegment(4, k) for k in range(4)
    }


LONG = 4 * (sum(CAUSAL.partition) + 2 * max(CAUSAL.partition)) - 3  # pixel frames: two chunks more


def lengths(backbone: Backbone, terms: Any, steps: int = 12) -> dict[int, int]:
    """Frames that precede the matched ones, by step."""
    return {step: terms._skipped_frames(rng_of(step), "rollout") for step in range(1, steps + 1)}


def test_rollouts_of_the_models_own_length_are_unchanged() -> None:
    frames = 4 * sum(CAUSAL.partition) - 3
    plain, same = (policy(roles(), **changes) for changes in ({}, {"rollout_frames": frames}))
    x = plain._rollout(batch(), rng_of(), "rollout")
    torch.testing.assert_close(same._rollout(batch(), rng_of(), "rollout"), x, rtol=0, atol=0)


def test_longer_rollouts_are_drawn_by_the_chunk() -> None:
    terms = policy(roles(), rollout_frames=LONG)
    size = max(CAUSAL.partition)
    assert set(lengths(roles(), terms).values()) == {0, size, 2 * size}


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_end_of_a_longer_rollout_is_what_sampling_gives(recomputes: bool) -> None:
    """All frames come from one rollout over the cache of sampling; only the last ones are returned."""
    backbone = roles()
    terms = policy(backbone, rollout_frames=LONG, recompute_rollout=recomputes)
    step, skipped = next((step, n) for step, n in lengths(backbone, terms).items() if n)
    x = terms._rollout(batch(), rng_of(step), "rollout")
    assert x.shape[1:] == SHAPE
    frames = SHAPE[0] + skipped
    noise = rng_of(step).noise("rollout-start", (frames, *SHAPE[1:]))
    causal = CausalConfig.from_recipe(CAUSAL)
    steps, k = simulation.draw_segment(terms.settings.step_budgets, rng_of(step).generator("rollout"))

    def sampler(model: Velocity, z: Tensor, grid: Tensor, generator: object) -> Tensor:
        return simulation.flow_map_rollout(model, z, steps, k, SHIFT)

    chunks = sample_chunks(
        Conditioned(backbone.network_of("student"), batch().condition), noise,
        partition_for(causal, frames), cast("Any", sampler), [torch.zeros(2)],
        remember=remembered_for(causal, frames),
    )  # fmt: skip
    expected = torch.cat(list(chunks), dim=1)[:, skipped:]
    torch.testing.assert_close(x.detach(), expected, rtol=1e-5, atol=1e-6)


def test_only_chunks_that_are_matched_have_a_gradient() -> None:
    backbone = roles()
    made: list[Tensor] = []
    jumps, size = Jumps(made), max(CAUSAL.partition)
    partition = (*CAUSAL.partition[:1], *[size] * (len(CAUSAL.partition) + 1))
    noise = torch.randn(len(videos()), sum(partition), *SHAPE[1:])

    def simulate(model: Velocity, z: Tensor, _: int) -> Tensor:
        return simulation.flow_map_rollout(jumps.over(model), z, 4, 1, SHIFT)

    model = backbone.velocity("student", batch().condition)
    skipped = sum(partition[:3])
    x = roll_out(model, noise, partition, simulate, given=noise[:, :0], skipped=skipped)
    assert x.shape[1] == sum(partition[3:])
    assert [u.requires_grad for u in made] == [False] * 9 + [True] * 3 * (len(partition) - 3)


def test_longer_rollouts_do_not_start_with_pictures() -> None:
    backbone = roles()
    terms = policy(backbone, rollout_frames=LONG)
    step = next(step for step, n in lengths(backbone, terms).items() if n)
    given = replace(batch(), condition=replace(batch().condition, frames=batch().latents[:, :1]))
    with pytest.raises(UsageError, match="longer than the videos"):
        terms._rollout(given, rng_of(step), "rollout")


def test_keys_of_a_longer_rollout_do_not_grow_with_it() -> None:
    causal = CausalConfig.from_recipe(CAUSAL)
    network, size = roles().network_of("student"), max(CAUSAL.partition)

    def held(extra: int) -> int:
        frames = sum(CAUSAL.partition) + extra * size
        cache = KeyCache(
            network, partition_for(causal, frames), SHAPE[-2:], 1, remember=remembered_for(causal, frames)
        )
        return cache.bytes

    assert held(4) == held(16)


def test_a_rollout_of_a_shorter_video_has_the_first_chunks_of_the_partition() -> None:
    """As stage 1 has; chunks of the largest size would be others."""
    causal = schema.CausalSection(partition=(1, 1, 1, 3), full_chunks=2)
    terms = OnPolicyTerms(roles(), NEGATIVE, schema.DistillSection(), SHIFT, causal)
    assert [terms._rollout_partition(frames, 0) for frames in (3, 6)] == [(1, 1, 1), (1, 1, 1, 3)]
    assert terms._rollout_partition(6, 3) == (1, 3, 3, 2)
