"""Variants of Alg. 1's target on Gaussian data: what has no loss, what has no noise, and what it costs.

With random pairs of data and noise v varies around v(z, t); closed forms then say which targets vary too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.flow.losses import FlowMapLoss, adaptive_weights, flow_map_loss, local_mean
from anyflow_cli.flow.velocity import Velocity, flow_map, from_function, in_fp32, per_frame
from tests.flow.gaussian import SHAPE, Bent, Gaussian, GuidedFlow, Watched, normal

B = 8
T = torch.tensor([0.95, 0.9, 0.8, 0.6, 0.55, 0.4, 0.3, 0.7]).double()
R = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.0, 0.1, 0.1, 0.7]).double()  # the last one is a boundary sample
S = R + torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7, 0.0, 1.0, 0.5]).double() * (T - R)
X, EPS = normal(6, B, *SHAPE), normal(7, B, *SHAPE)  # independent: v has its full variance
DATA = Gaussian(normal(0, B, *SHAPE))
WIDE = Gaussian(normal(4, 1, *SHAPE), 1.1)
OPTIONS = (
    {"teacher": DATA},
    {"teacher": DATA, "s": S},
)


def loss(model: Velocity, null: Velocity | None = None, **options: Any) -> FlowMapLoss:
    settings = {"guidance": 1.0, "adaptive": "off", **options}
    return flow_map_loss(model, null or model, X, EPS, T, R, **settings)


def guided_flow(guidance: float) -> tuple[GuidedFlow, GuidedFlow]:
    """The flow map of the guided ODE, and its null branch."""
    no, yes = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
    return GuidedFlow(DATA, WIDE, no, guidance), GuidedFlow(DATA, WIDE, yes, guidance)


# The teacher's velocity


def test_with_the_teachers_velocity_the_exact_student_has_no_loss_for_any_data_and_noise() -> None:
    """O(d^4); with eps - x it has the variance of v, and with v in one of the two places too."""
    coarse, fine = (loss(DATA, teacher=DATA, delta=delta).errors for delta in (0.01, 0.005))
    assert fine.max() < 1e-6
    torch.testing.assert_close(coarse[:-1] / fine[:-1], torch.full((B - 1,), 16.0).double(), rtol=0.1, atol=0)
    assert loss(DATA).errors.min() > 1e-2


def test_the_teachers_guidance_is_learned_without_fusing_any() -> None:
    """The student predicts the guided flow itself, whatever its own null branch does."""
    exact, _ = guided_flow(3.0)
    broken = from_function(lambda z, t, r: torch.full_like(z, torch.nan))
    teacher = from_function(lambda z, t, r: exact.velocity(z, t))
    found = loss(exact, broken, teacher=teacher, guidance=3.0)
    assert found.errors.max() < 1e-3 * loss(DATA, teacher=teacher).errors.min()


@pytest.mark.parametrize("options", OPTIONS, ids=["quotient", "composition"])
def test_a_student_of_another_flow_than_the_teachers_has_a_loss(options: dict[str, Any]) -> None:
    other = Gaussian(DATA.mean, 0.9)
    errors = loss(other, **options).errors
    assert errors[-1] > 1e-3
    if "s" not in options:
        assert errors.min() > 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=["quotient", "composition"])
def test_the_gradient_pulls_back_to_the_teachers_flow(options: dict[str, Any]) -> None:
    def slope(size: float) -> float:
        a = torch.tensor(size, dtype=torch.float64, requires_grad=True)
        student = Bent(DATA, lambda u, z, t, r: u(z, t, r) + a * per_frame(t - r, z) * z)
        return torch.autograd.grad(loss(student, **options).loss, a)[0].item()

    assert slope(0.1) > 1e-3
    assert slope(-0.1) < -1e-3
    assert abs(slope(0.0)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"s": S}], ids=["quotient", "composition"])
def test_states_between_equal_ends_need_no_data(options: dict[str, Any]) -> None:
    """Jumps of the network's own from noise: the exact student has no loss there, and another one has."""
    for student, bound in ((DATA, 1e-6), (Gaussian(DATA.mean, 0.9), None)):
        z = student.flow(EPS, torch.ones(B).double(), T)
        result = flow_map_loss(
            student, student, z, z, T, R, guidance=1.0, adaptive="off", teacher=DATA, **options
        )
        assert bound is None or result.errors.max() < bound
        assert bound is not None or result.errors[-1] > 1e-3


# Composition


@pytest.mark.parametrize("data", [DATA, WIDE])
def test_composition_has_no_loss_on_any_flow_map_and_so_needs_the_boundary(data: Gaussian) -> None:
    """Zero to rounding, for every s between r and t, both ends included."""
    errors = loss(data, s=S).errors
    assert errors[:-1].max() < 1e-25
    assert errors[-1] > 1e-2  # the variance of eps - x


def test_composition_sees_jumps_that_do_not_compose() -> None:
    instantaneous = Bent(DATA, lambda u, z, t, r: u(z, t, t))
    inside = slice(2, 5)  # s is away from r and t
    assert loss(instantaneous, s=S).errors[inside].min() > 1e-3


@pytest.mark.parametrize("guidance", [1.5, 3.0])
def test_under_guidance_composition_learns_the_guided_flow(guidance: float) -> None:
    exact, null = guided_flow(guidance)
    x, eps = DATA.pair(z := normal(2, B, *SHAPE), T)  # v without variance, for the boundary
    errors = flow_map_loss(exact, null, x, eps, T, R, guidance=guidance, adaptive="off", s=S).errors
    assert errors.max() < 1e-10
    assert flow_map(exact, z, T, S).isfinite().all()


def test_a_sample_without_text_composes_its_own_branch() -> None:
    """For it g is 1, so its error is not divided by g."""
    dropped = torch.arange(B) < 4
    wrong = Bent(DATA, lambda u, z, t, r: u(z, t, t))
    masked, plain = (loss(wrong, guidance=2.0, s=S, null_mask=mask).errors for mask in (dropped, None))
    torch.testing.assert_close(masked[:4], 4 * plain[:4])
    torch.testing.assert_close(masked[4:], plain[4:])


def test_times_of_each_frame_compose_frame_by_frame() -> None:
    """A sample of three frames with their own times equals three samples of one frame."""
    t, r, s = (time[:, None] * torch.tensor([1.0, 0.7, 0.4]).double() for time in (T, R, S))
    wrong = Bent(DATA, lambda u, z, t, r: u(z, t, t))
    together = flow_map_loss(wrong, wrong, X, EPS, t, r, guidance=1.0, adaptive="off", s=s).errors
    for frame in range(3):
        part = (slice(None), slice(frame, frame + 1))
        alone = Bent(Gaussian(DATA.mean[part]), wrong.bend)
        own = [time[:, frame] for time in (t, r, s)]
        errors = flow_map_loss(
            alone, alone, X[part], EPS[part], *own[:2], guidance=1.0, adaptive="off", s=own[2]
        ).errors
        torch.testing.assert_close(together[:, frame], errors)


# Calls


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"teacher": DATA}, [(2 * 7, False), (8, True)]),
        ({"teacher": DATA, "s": S}, [(7, False), (7, False), (8, True)]),
        ({"s": S}, [(7, False), (7, False), (8, True)]),
        ({"s": S, "guidance": 3.0}, [(1, False), (7, False), (7, False), (8, True)]),
    ],
)
def test_calls_of_the_student(options: dict[str, Any], expected: list[tuple[int, bool]]) -> None:
    calls: list[Any] = []
    student = Watched(DATA, calls)
    loss(student, student, **options)
    assert [(batch, gradient) for batch, _, _, gradient in calls] == expected
    for _, at, to, _ in calls:
        assert ((to >= 0) & (to <= at) & (at <= 1)).all()


@pytest.mark.parametrize(("options", "samples"), [({}, 8), ({"s": S}, 1)])
def test_the_teacher_is_evaluated_at_its_own_times_and_for_a_composition_on_the_boundary_alone(
    options: dict[str, Any], samples: int
) -> None:
    calls: list[Any] = []
    loss(DATA, teacher=Watched(DATA, calls), **options)
    ((batch, t, r, gradient),) = calls
    assert (batch, gradient) == (samples, False)
    assert torch.equal(t, r)


@pytest.mark.parametrize("options", [{"teacher": DATA}, {"teacher": DATA, "s": T}, {"s": T, "guidance": 3.0}])
def test_a_slice_of_boundary_samples_makes_the_same_calls(options: dict[str, Any]) -> None:
    calls: list[Any] = []
    student = Watched(DATA, calls)
    found = flow_map_loss(student, student, X, EPS, T, T, **{"guidance": 1.0, "adaptive": "off", **options})
    assert found.errors.isfinite().all()
    assert [gradient for *_, gradient in calls] == [False] * (len(calls) - 1) + [True]
    assert len(calls) == {1: 2, 2: 3 if "teacher" in options else 4}[len(options)]


# Eq. 7 and precision


def test_one_factor_for_all_keeps_the_ratios_of_losses() -> None:
    values = torch.tensor([0.2, 0.4, 5.0, 0.03, 80.0])
    boundary = torch.tensor([True, True, False, False, False])
    weights = adaptive_weights(values, boundary, local_mean, "group")
    assert weights[:2].tolist() == [1, 1]
    assert len(set(weights[2:].tolist())) == 1
    assert (weights * values)[2:].mean().item() == pytest.approx(0.3, rel=1e-3)
    assert adaptive_weights(values, boundary, local_mean, "off").tolist() == [1] * 5


def test_eq_7_against_a_teacher_never_starts() -> None:
    """A student that starts as the teacher has no loss on the boundary, and so no weight off it."""
    start = Bent(DATA, lambda u, z, t, r: u(z, t, t))
    adapted, plain = (loss(start, teacher=DATA, adaptive=how) for how in ("sample", "off"))
    assert adapted.loss < 1e-9
    assert plain.loss > 1e-2


def test_only_the_target_is_evaluated_in_fp32() -> None:
    seen: list[tuple[bool, bool]] = []

    def note(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return z

    model = from_function(note)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model, model, guidance=3.0, fp32_target=True)
    assert seen == [(False, False), (True, True)]
    first, second = (in_fp32(model).select(torch.arange(2)) for _ in range(2))
    assert first.concat(second)(X, T, R) is X
