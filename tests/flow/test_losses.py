"""Alg. 1 on Gaussian data: the loss of the exact student is zero, that of each wrong algorithm is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow import losses
from anyflow_cli.flow.losses import (
    FlowMapLoss,
    adaptive_weights,
    consistency_loss,
    difference_quotient,
    flow_map_loss,
    flow_matching_loss,
    fuse_guidance,
    interpolate,
    local_mean,
)
from anyflow_cli.flow.times import TimeRatios, loss_weight, sample_times, shift
from anyflow_cli.flow.velocity import Velocity, flow_map, per_frame
from tests.flow.gaussian import SHAPE, Bent, Chords, Fused, Gaussian, GuidedFlow, Watched, normal

B = 8
DATA = Gaussian(normal(0, B, *SHAPE))
Z = normal(2, B, *SHAPE)
DRIFT = normal(1, 1, *SHAPE)
INSIDE = torch.tensor([0.95, 0.9, 0.8, 0.6, 0.55, 0.4, 0.3, 0.7]).double()
BELOW = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.0, 0.1, 0.1, 0.7]).double()  # the last one is a boundary sample


def exact(guidance: float) -> tuple[Fused, Fused]:
    """The student that minimizes Alg. 1, and its null branch."""
    no, yes = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    return Fused(DATA, no, guidance, DRIFT), Fused(DATA, yes, guidance, DRIFT)


@dataclass(frozen=True)
class Step:
    """One call of Alg. 1 whose v has no variance, by default on the exact student."""

    t: Tensor = field(default_factory=INSIDE.clone)
    r: Tensor = field(default_factory=BELOW.clone)

    def loss(self, *models: Velocity, guidance: float = 3.0, **options: Any) -> FlowMapLoss:
        model, null = models or exact(guidance)
        x, eps = DATA.pair(Z, self.t)
        return flow_map_loss(model, null, x, eps, self.t, self.r, guidance=guidance, **options)


def check_falls(errors: list[Tensor], factor: float) -> None:
    """Each halving of d divides all errors by the factor."""
    for coarse, fine in pairwise(errors):
        torch.testing.assert_close(coarse / fine, torch.full_like(fine, factor), rtol=0.1, atol=0)


# The exact student


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_exact_student_has_no_loss_up_to_delta_squared(guidance: float) -> None:
    """The residual is O(d^2): halving d divides its square by 16. On the boundary it is zero."""
    errors = [Step().loss(guidance=guidance, delta=d).errors for d in (0.02, 0.01, 0.005)]
    assert errors[-1].max() < 1e-6
    assert errors[0][-1] < 1e-28
    check_falls([error[:-1] for error in errors], 16)


@pytest.mark.parametrize("paired", [True, False])
def test_videos_and_the_noise_they_were_made_from_have_the_flow_map_of_their_chords(paired: bool) -> None:
    """A chord keeps its velocity, so all its jumps are exact; videos with other noise have other ones."""
    chords = Chords(DATA.mean)
    x = DATA.flow(Z, torch.ones(B), torch.zeros(B))
    eps = Z if paired else Z.flip(0)
    loss = flow_map_loss(chords, chords, x, eps, INSIDE, BELOW, guidance=1.0, adaptive="off")
    assert (loss.errors.max() < 1e-9) == paired


def test_near_noise_the_quotient_is_one_sided_and_first_order_in_delta() -> None:
    t, r = torch.ones(B).double(), BELOW.clamp(max=0.5)
    errors = [Step(t, r).loss(delta=d).errors for d in (0.02, 0.01, 0.005)]
    assert errors[-1].max() < 1e-3
    check_falls(errors, 4)


def test_short_jumps_are_second_order_in_delta() -> None:
    """With t - r = d / 2 the quotient is first order in d, and the target multiplies it by t - r."""
    errors = [Step(INSIDE, INSIDE - d / 2).loss(delta=d).errors for d in (0.008, 0.004, 0.002)]
    assert errors[-1].max() < 1e-6
    check_falls(errors, 16)


def test_times_that_differ_by_a_rounding_give_finite_losses() -> None:
    t = torch.tensor([1.0, 1.0, 0.9999999, 0.5, 1e-6, 1e-7, 0.0, 1.0]).double()
    r = torch.tensor([0.9999999, 0.0, 0.9999998, 0.4999999, 0.0, 0.0, 0.0, 1.0]).double()
    assert Step(t, r).loss().errors.max() < 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_all_evaluations_stay_within_the_trained_times(guidance: float) -> None:
    calls: list[Any] = []
    student, null = (Watched(model, calls) for model in exact(guidance))
    t = torch.tensor([1.0, 0.999, 0.004, 0.5, 0.003, 1.0, 0.0, 0.6]).double()
    r = torch.tensor([0.0, 0.998, 0.0, 0.5, 0.003, 1.0, 0.0, 0.1]).double()
    Step(t, r).loss(student, null, guidance=guidance)
    assert len(calls) == 2
    for _, at, to, _ in calls:
        assert ((to >= 0) & (to <= at) & (at <= 1)).all()


def test_guidance_is_that_of_the_teacher_on_the_boundary() -> None:
    """At t = r the student predicts v_null + g (v_c - v_null); here both branches are of Gaussian data."""
    null = Gaussian(normal(3, B, *SHAPE), 0.9)
    teacher = null(Z, INSIDE, INSIDE) + 3 * (DATA(Z, INSIDE, INSIDE) - null(Z, INSIDE, INSIDE))
    fused = fuse_guidance(teacher, null(Z, INSIDE, INSIDE), 3.0)
    torch.testing.assert_close(fused, DATA(Z, INSIDE, INSIDE))


def test_the_gradient_of_random_pairs_vanishes_at_the_exact_student(monkeypatch: pytest.MonkeyPatch) -> None:
    """With independent x and eps, v varies around v(z, t), but the mean gradient vanishes.

    A du/dt of the wrong sign moves it many deviations off.
    """
    count = 20000
    t, r = (
        time.double() for time in sample_times(count, 5.0, TimeRatios(), torch.Generator().manual_seed(0))
    )
    data = Gaussian(torch.full((1, 1, 1, 1, 1), 0.7, dtype=torch.float64))
    x, eps = data.mean + data.std * normal(4, count, 1, 1, 1, 1), normal(5, count, 1, 1, 1, 1)

    def pull() -> float:
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        model = Bent(data, lambda u, z, t, r: u(z, t, r) + slope * z)
        loss = flow_map_loss(model, model, x, eps, t, r, guidance=1.0, adaptive="off").loss
        return torch.autograd.grad(loss, slope)[0].abs().item()

    assert pull() < 0.04
    monkeypatch.setattr(losses, "difference_quotient", lambda *a: -difference_quotient(*a))
    assert pull() > 0.2


# Guidance along the guided path


def guided_flow(guidance: float) -> tuple[GuidedFlow, GuidedFlow]:
    """The flow map of the guided ODE, and its null branch."""
    null = Gaussian(normal(4, 1, *SHAPE), 1.1)
    no, yes = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    return GuidedFlow(DATA, null, no, guidance), GuidedFlow(DATA, null, yes, guidance)


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_the_flow_map_of_the_guided_ode_has_no_loss_on_the_guided_path(guidance: float) -> None:
    """On the data's path, as Alg. 1 has it, that flow map has a loss wherever t > r."""
    fine, finer, as_published = (
        Step().loss(*guided_flow(guidance), guidance=guidance, delta=delta, guidance_path=path).errors
        for delta, path in ((0.01, "guided"), (0.005, "guided"), (0.005, "data"))
    )
    assert finer.max() < 1e-3 * as_published[:-1].max()
    check_falls([fine[:-1], finer[:-1]], 16)
    assert as_published[:-1].min() > 10 * finer.max()


def test_only_the_guided_path_leads_to_jumps_that_compose() -> None:
    middle = (INSIDE + BELOW) / 2
    (guided, _), (fused, _) = guided_flow(2.0), exact(2.0)

    def gap(model: Velocity) -> float:
        halfway = flow_map(model, Z, INSIDE, middle)
        two = flow_map(model, halfway, middle, BELOW)
        return (two - flow_map(model, Z, INSIDE, BELOW)).abs().max().item()

    assert gap(guided) < 1e-6
    assert gap(fused) > 0.05


def test_both_paths_agree_without_guidance_and_on_the_boundary() -> None:
    data, guided = (Step().loss(guidance=1.0, guidance_path=path).errors for path in ("data", "guided"))
    torch.testing.assert_close(data, guided, rtol=0, atol=0)
    data, guided = (
        Step(INSIDE, INSIDE).loss(*guided_flow(3.0), guidance=3.0, guidance_path=path).errors
        for path in ("data", "guided")
    )
    torch.testing.assert_close(data, guided)


def test_the_guided_path_takes_one_more_call_of_the_same_samples() -> None:
    calls: list[Any] = []
    models = (Watched(model, calls) for model in exact(3.0))
    Step().loss(*models, guidance_path="guided", null_mask=torch.arange(B) < 3)
    assert [(batch, gradient) for batch, _, _, gradient in calls] == [(5, False), (2 * 7, False), (8, True)]
    calls.clear()  # a rank without a sample for a call makes it with one: sharded ranks wait for one another
    models = (Watched(model, calls) for model in exact(3.0))
    Step(INSIDE, INSIDE).loss(*models, guidance_path="guided", null_mask=torch.ones(B, dtype=torch.bool))
    assert [(batch, gradient) for batch, _, _, gradient in calls] == [(1, False), (1, False), (8, True)]


# The wrong algorithms and the wrong students

WRONG_ALGORITHMS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "sign of du/dt": ("difference_quotient", lambda *a: -difference_quotient(*a)),
    "no 1/g in du/dt": ("difference_quotient", lambda p, m, span, g: difference_quotient(p, m, span, 1.0)),
    "d for 2 d": ("difference_quotient", lambda p, m, span, g: difference_quotient(p, m, span / 2, g)),
    "no 1/g in Eq. 6": ("fuse_guidance", lambda u, n, g: u - (1 - g) * n),
    "sign of u_null": ("fuse_guidance", lambda u, n, g: (u + (1 - g) * n) / g),
    "the other way": ("fuse_guidance", lambda u, n, g: n + g * (u - n)),
    "data for noise": ("interpolate", lambda x, eps, t: interpolate(eps, x, t)),
}


@pytest.mark.parametrize("wrong", WRONG_ALGORITHMS)
def test_a_wrong_algorithm_has_a_loss(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, *WRONG_ALGORITHMS[wrong])
    assert Step().loss().errors[:-1].min() > 1e-3


WRONG_STUDENTS: dict[str, Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]] = {
    "sign of u": lambda u, z, t, r: -u(z, t, r),
    "v for u": lambda u, z, t, r: u(z, t, t),
    "without the shift": lambda u, z, t, r: u(z, shift(t, 1 / 5), shift(r, 1 / 5)),
    "frames for channels": lambda u, z, t, r: u(z.transpose(1, 2), t, r).transpose(1, 2),
    "another sample's condition": lambda u, z, t, r: u.select(torch.arange(len(z)).roll(1))(z, t, r),
}


@pytest.mark.parametrize("wrong", WRONG_STUDENTS)
def test_a_wrong_student_has_a_loss(wrong: str) -> None:
    student = Bent(DATA, WRONG_STUDENTS[wrong])
    assert Step().loss(student, student, guidance=1.0).errors[:-1].min() > 1e-3


# What it costs, and where gradient goes


def test_one_call_without_gradient_and_one_with_it() -> None:
    """The gradient-free call has the null branch of all samples and both sides of the seven with t > r."""
    calls: list[Any] = []
    Step().loss(*(Watched(model, calls) for model in exact(3.0)))
    assert [(batch, gradient) for batch, _, _, gradient in calls] == [(8 + 2 * 7, False), (8, True)]


def test_a_slice_of_boundary_samples_makes_the_same_two_calls() -> None:
    calls: list[Any] = []
    Step(INSIDE, INSIDE).loss(*(Watched(model, calls) for model in exact(3.0)))
    assert [batch for batch, *_ in calls] == [8, 8]


def test_without_guidance_there_is_no_null_branch() -> None:
    calls: list[Any] = []
    Step().loss(*(Watched(model, calls) for model in exact(1.0)), guidance=1.0)
    assert [batch for batch, *_ in calls] == [2 * 7, 8]
    calls.clear()
    Step(INSIDE, INSIDE).loss(*(Watched(model, calls) for model in exact(1.0)), guidance=1.0)
    assert [batch for batch, *_ in calls] == [8]


def test_samples_under_the_null_prompt_skip_the_null_branch() -> None:
    """Where g = 1 the null branch has no effect."""
    calls: list[Any] = []
    dropped = torch.arange(B) < 3
    Step().loss(*(Watched(model, calls) for model in exact(3.0)), null_mask=dropped)
    assert [(batch, gradient) for batch, _, _, gradient in calls] == [(5 + 2 * 7, False), (8, True)]


def test_a_slice_that_needs_no_gradient_free_call_still_makes_it() -> None:
    """Sharded processes must make equally many calls."""
    calls: list[Any] = []
    models = (Watched(model, calls) for model in exact(3.0))
    Step(INSIDE, INSIDE).loss(*models, null_mask=torch.ones(B, dtype=torch.bool))
    assert [batch for batch, *_ in calls] == [1, 8]


def test_gradient_is_that_of_the_conditional_branch_alone() -> None:
    """A constant a in both branches adds a to u and 0 to u_tgt: the loss is a^2, its gradient 2 a / g."""
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    student, null = (Bent(model, lambda u, z, t, r: u(z, t, r) + a) for model in exact(3.0))
    loss = Step().loss(student, null, delta=0.001).loss
    assert loss.item() == pytest.approx(0.3**2, rel=1e-3)
    assert torch.autograd.grad(loss, a)[0].item() == pytest.approx(2 * 0.3 / 3, rel=1e-3)


def test_samples_under_the_null_prompt_learn_a_flow_map_when_masked() -> None:
    """Their branches are equal: Eq. 6 changes nothing, but 1/g in the quotient would."""
    named = torch.ones(B, dtype=torch.bool)
    assert Step().loss(DATA, DATA, null_mask=named).errors.max() < 1e-6
    assert Step().loss(DATA, DATA).errors[:-1].min() > 1e-4


def test_the_null_mask_is_per_sample() -> None:
    half = torch.arange(B) % 2 == 0
    student, null = exact(3.0)
    dropped = Bent(student, lambda u, z, t, r: u(z, t, r))
    masked, plain = (Step().loss(dropped, Bent(null, dropped.bend), null_mask=m).errors for m in (half, None))
    torch.testing.assert_close(masked[~half], plain[~half])
    assert (masked[half][:-1] > 1e-3).all()  # these have text: g = 1 is wrong for them
    assert plain.max() < 1e-6


# Weights and averages


def test_adaptive_weights_scale_all_losses_to_the_boundary() -> None:
    loss = torch.tensor([0.2, 0.4, 5.0, 0.03, 80.0], requires_grad=True)
    boundary = torch.tensor([True, True, False, False, False])
    weights = adaptive_weights(loss, boundary, local_mean)
    assert weights[:2].tolist() == [1, 1]
    torch.testing.assert_close((weights * loss)[2:], torch.full((3,), 0.3), rtol=1e-3, atol=0)
    assert not weights.requires_grad


def test_adaptive_weights_are_bounded_and_need_a_boundary() -> None:
    perfect = adaptive_weights(torch.tensor([0.3, 0.0]), torch.tensor([True, False]), local_mean)
    assert perfect[1].item() == pytest.approx(0.3 / 1e-5)
    none = adaptive_weights(torch.tensor([2.0, 3.0]), torch.tensor([False, False]), local_mean)
    assert none.tolist() == [1, 1]


def test_the_loss_is_weighted_and_its_errors_are_raw() -> None:
    """Without adaptation: mean of w(t) times the raw errors; with it, of w(t) times the boundary's."""
    weight = loss_weight("beta", 5.0)
    off = torch.ones((), dtype=torch.float64, requires_grad=True)
    student, null = (
        Bent(model, lambda u, z, t, r: u(z, t, r) + (0.5 + per_frame(r, z)) * off) for model in exact(3.0)
    )
    plain = Step().loss(student, null, weight=weight, adaptive="off")
    raw = plain.errors
    torch.testing.assert_close(plain.loss.detach(), (weight(INSIDE) * raw).mean())
    assert not raw.requires_grad
    level = Step().loss(student, null, weight=weight).loss.detach()
    torch.testing.assert_close(level, (weight(INSIDE) * raw[-1]).mean(), rtol=1e-3, atol=0)


def test_the_weighted_scale_is_that_of_the_published_code() -> None:
    """Its loss is mean(s w e), s = mean_boundary(w e) / (w e + 1e-5) for t > r, so that w(t) cancels."""
    weight = loss_weight("beta", 5.0)
    models = [Bent(model, lambda u, z, t, r: u(z, t, r) + 0.3 * z) for model in exact(3.0)]
    raw, weighted = (Step().loss(*models, weight=weight, loss_scale=scale) for scale in ("raw", "weighted"))
    w, e, boundary = weight(INSIDE), weighted.errors, INSIDE == BELOW
    s = torch.where(boundary, 1, (w * e)[boundary].mean() / (w * e + 1e-5))
    assert weighted.loss.item() == pytest.approx((s * w * e).mean().item(), rel=1e-9)
    assert weighted.loss.item() == pytest.approx((w * e)[boundary].mean().item(), rel=1e-3)
    assert raw.loss.item() != pytest.approx(weighted.loss.item(), rel=1e-2)


def test_a_batch_without_boundary_is_not_adapted() -> None:
    step = Step(INSIDE, BELOW.clamp(max=0.1))
    wrong = Bent(DATA, WRONG_STUDENTS["v for u"])
    result = step.loss(wrong, wrong)
    torch.testing.assert_close(result.loss, result.errors.mean())


def test_the_null_branch_gets_no_gradient() -> None:
    u_c, u_null = (torch.ones(1, requires_grad=True) for _ in range(2))
    u = fuse_guidance(u_c, u_null, 3.0)
    assert torch.autograd.grad(u, u_c, retain_graph=True)[0].item() == pytest.approx(1 / 3)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(u, u_null)


# The path and the baselines


def test_the_path_from_data_to_noise_has_the_velocity_of_its_ends() -> None:
    x, eps = normal(6, B, *SHAPE), normal(7, B, *SHAPE)
    assert torch.equal(interpolate(x, eps, torch.zeros(B)), x)
    assert torch.equal(interpolate(x, eps, torch.ones(B)), eps)
    step = interpolate(x, eps, INSIDE) - interpolate(x, eps, BELOW)
    torch.testing.assert_close(step, per_frame(INSIDE - BELOW, x) * (eps - x))


def test_flow_matching_is_minimal_at_the_velocity_only() -> None:
    x, eps = DATA.pair(Z, INSIDE)
    assert flow_matching_loss(DATA, x, eps, INSIDE) < 1e-28
    assert flow_matching_loss(Bent(DATA, WRONG_STUDENTS["sign of u"]), x, eps, INSIDE) > 0.1


def test_flow_matching_is_the_boundary_of_alg_1() -> None:
    """At t = r without guidance the two losses are equal, weights included."""
    x, eps = normal(6, B, *SHAPE), normal(7, B, *SHAPE)
    weight = loss_weight("beta", 5.0)
    whole = flow_map_loss(DATA, DATA, x, eps, INSIDE, INSIDE, guidance=1.0, weight=weight)
    torch.testing.assert_close(flow_matching_loss(DATA, x, eps, INSIDE, weight), whole.loss)


def test_flow_matching_takes_a_time_for_each_frame() -> None:
    """Error and weight of a frame follow its own time; here there are as many frames as channels."""
    x, eps = normal(6, B, *SHAPE), normal(7, B, *SHAPE)
    t = INSIDE[:, None] * torch.tensor([1.0, 0.5, 0.1]).double()  # (B, F)
    weight = loss_weight("beta", 5.0)
    alone = [
        flow_matching_loss(
            Gaussian(DATA.mean[:, f : f + 1]), x[:, f : f + 1], eps[:, f : f + 1], t[:, f], weight
        )
        for f in range(SHAPE[0])
    ]
    torch.testing.assert_close(flow_matching_loss(DATA, x, eps, t, weight), torch.stack(alone).mean())


def test_consistency_is_zero_at_the_flow_map_on_the_teachers_path() -> None:
    x = flow_map(DATA, Z, INSIDE, torch.zeros(B).double())
    assert consistency_loss(DATA, Z, INSIDE, x) < 1e-28
    assert consistency_loss(Bent(DATA, WRONG_STUDENTS["v for u"]), Z, INSIDE, x) > 1e-2


def test_consistency_on_the_chord_is_exact_at_noise() -> None:
    eps = normal(7, B, *SHAPE)
    t = torch.ones(B).double()
    x = flow_map(DATA, eps, t, 0 * t)
    assert consistency_loss(DATA, interpolate(x, eps, t), t, x) < 1e-28


def test_consistency_is_weighted_by_time() -> None:
    x = flow_map(DATA, Z, INSIDE, torch.zeros(B).double()) + 1
    weight = loss_weight("normal", 5.0)
    torch.testing.assert_close(consistency_loss(DATA, Z, INSIDE, x, weight), weight(INSIDE).mean())
