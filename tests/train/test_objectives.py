"""Each objective teaches what it should, to the role it should, and cuts its batch without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.errors import UsageError
from anyflow_cli.flow import matching
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import batch_noise
from anyflow_cli.flow.simulation import BUDGETS, draw_segment
from anyflow_cli.flow.times import grid, shift
from anyflow_cli.recipe import schema
from anyflow_cli.train.loss_terms import FunctionTerm, drop_text, sums, weighted
from anyflow_cli.train.objectives import FlowMapTerm
from anyflow_cli.train.rng import StepRng
from tests.train import small
from tests.train.small import Kind, RandomData, trainer

KINDS: tuple[Kind, ...] = get_args(Kind)


def batch(count: int = 4) -> Batch:
    return next(RandomData(count).stream(0))


def gradients(run: Any, phase: int, of: str) -> list[Tensor | None]:
    run.step, role = 1, run.optimizers[phase]
    with patch.object(run, "optimizers", [role]), patch.object(role, "update", lambda step, norm: None):
        run.train_step(batch(run.settings.global_batch))
    return [parameter.grad for parameter in run.backbone.parameters_of(of)]


def reported_sums(run: Any, samples: Batch) -> dict[str, tuple[float, float]]:
    """Sum and count of what the first role reports of a step."""
    run.step = 1
    with patch.object(run, "_reduce", wraps=run._reduce) as reduce:
        values = run.train_step(samples)
    names = [name for name in values if not name.endswith("_gradient")]
    numbers = reduce.call_args.args[0].tolist()
    return {name: (numbers[2 * i], numbers[2 * i + 1]) for i, name in enumerate(names)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "on-policy" not in kind])
def test_the_loss_falls(tmp_path: Path, kind: Kind, lora: bool) -> None:
    """One video to learn, so that any objective can."""
    source = RandomData(
        4, torch.randn(1, *small.LATENT, generator=torch.manual_seed(0)).expand(8, -1, -1, -1, -1)
    )
    losses: list[float] = []
    run = trainer(
        tmp_path, kind, lora=lora, source=source, steps=60, checkpoint_every=60,
        hooks={"on_step": lambda step, values: losses.append(values.get("boundary", values["loss"]))},
    )  # fmt: skip
    run.run()
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("simulation", ["flow-map", "consistency"])
@pytest.mark.parametrize("kind", ["on-policy", "causal-on-policy"])
def test_gradients_reach_the_role_of_the_phase_alone(
    tmp_path: Path, kind: Kind, lora: bool, simulation: str
) -> None:
    run = trainer(tmp_path, kind, lora=lora, changes={"simulation": simulation})
    frozen = [p for p in run.backbone.parameters() if not p.requires_grad]
    student = gradients(run, 0, "student")
    assert all(gradient is not None for gradient in student)
    assert all(parameter.grad is None for parameter in run.backbone.parameters_of("fake"))
    run.optimizers[0].optimizer.zero_grad()
    fake = gradients(run, 1, "fake")
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in fake)
    assert all(parameter.grad is None for parameter in run.backbone.parameters_of("student"))
    assert all(parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_fake_score_is_trained_and_the_real_score_is_frozen(tmp_path: Path, lora: bool) -> None:
    run = trainer(tmp_path, "on-policy", lora=lora, steps=3)
    z, t = torch.randn(2, *small.LATENT, generator=torch.manual_seed(1)), torch.tensor([0.3, 0.8])

    def predictions() -> dict[str, Tensor]:
        text = batch(2).condition.text
        with torch.no_grad():
            return {
                role: run.backbone.velocity(role, Condition(text))(z, t, t)
                for role in ("student", "real", "fake")
            }

    before = predictions()
    torch.testing.assert_close(before["fake"], before["real"])
    run.run()
    after = predictions()
    assert torch.equal(before["real"], after["real"])
    assert not torch.allclose(before["fake"], after["fake"], atol=1e-4)
    assert not torch.allclose(before["student"], after["student"], atol=1e-4)


def test_the_matching_loss_is_zero_while_the_scores_agree_without_guidance(tmp_path: Path) -> None:
    run = trainer(tmp_path, "on-policy", changes={"joint": False, "real_guidance": 1.0})
    loss, _ = run.optimizers[0].terms[0](batch(), StepRng(0, 1, 4, (0, 1, 2, 3)))
    assert loss.item() == pytest.approx(0, abs=1e-10)


def test_the_joint_loss_is_alg_1_on_the_data_times_its_weight(tmp_path: Path) -> None:
    run = trainer(tmp_path, "on-policy", changes={"joint_weight": 0.25})
    rng = StepRng(0, 1, 4, (0, 1, 2, 3))
    alone = FlowMapTerm(run.backbone, small.NEGATIVE, schema.FlowMapSection(), 5.0)
    joint, report = run.optimizers[0].terms[1](batch(), rng)
    fresh = replace(rng, global_mean=type(rng.global_mean)(lambda values: values))
    loss, _ = alone(batch(), fresh)
    assert joint.item() == pytest.approx(0.25 * loss.item(), rel=1e-6)
    assert report["flow_map_loss"][0] / 4 == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("reuse", [False, True])
def test_the_fake_score_learns_from_fresh_samples_or_those_of_the_step(tmp_path: Path, reuse: bool) -> None:
    run = trainer(tmp_path, "on-policy", changes={"reuse_rollout": reuse, "joint": False})
    calls: list[int] = []
    student = run.backbone.network_of("student")
    student.register_forward_hook(lambda *_: calls.append(1))
    rng = StepRng(0, 1, 4, (0, 1, 2, 3))
    run.optimizers[0].terms[0](batch(), rng)
    of_student = len(calls)
    assert 1 <= of_student <= 3
    run.optimizers[1].terms[0](batch(), rng)
    assert (len(calls) == of_student) is reuse


@pytest.mark.parametrize("reuse", [False, True])
def test_more_fake_updates_use_the_same_samples_at_other_times(tmp_path: Path, reuse: bool) -> None:
    changes = {"reuse_rollout": reuse, "joint": False, "fake_updates": 3}
    run = trainer(tmp_path, "on-policy", changes=changes, micro_batch=2)
    with (
        patch.object(matching, "fake_score_loss", wraps=matching.fake_score_loss) as on_fake,
        patch.object(run.optimizers[1], "update", wraps=run.optimizers[1].update) as update,
    ):
        run.step = 1
        values = run.train_step(batch())
    calls = [call.args for call in on_fake.call_args_list]
    assert [len(x) for _, x, _, _ in calls] == [2] * 6  # all micro-batches of an update, then the next one
    for first, later in zip(calls[:2] * 2, calls[2:], strict=True):
        assert torch.equal(first[1], later[1])
        assert not torch.equal(first[2], later[2])
        assert not torch.equal(first[3], later[3])
    assert update.call_count == 3
    assert values["fake"] > 0


def test_without_matching_the_student_alone_trains_on_the_joint_loss(tmp_path: Path) -> None:
    run = trainer(tmp_path, "on-policy", changes={"matching": "none"})
    run.step = 1
    values = run.train_step(batch())
    assert run.backbone.roles == ("student",)
    assert {"flow_map_loss", "student_gradient"} <= values.keys()
    assert not {"fake", "matching"} & values.keys()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_without_a_fake_score_the_student_matches_with_its_own_jumps(tmp_path: Path, lora: bool) -> None:
    changes = {"matching": "fake-free", "reuse_rollout": True}
    run = trainer(tmp_path, "on-policy", lora=lora, changes=changes)
    run.step = 1
    values = run.train_step(batch())
    assert run.backbone.roles == ("student", "real")
    assert values["matching"] > 0
    assert "fake" not in values


def test_without_a_fake_score_jumps_that_are_no_flow_map_have_a_loss_from_the_start(tmp_path: Path) -> None:
    """The student then predicts the teacher's velocity at every t, whatever r is."""
    changes = {"matching": "fake-free", "joint": False, "real_guidance": 1.0}
    run = trainer(tmp_path, "on-policy", changes=changes)
    loss, _ = run.optimizers[0].terms[0](batch(), StepRng(0, 1, 4, (0, 1, 2, 3)))
    assert loss.item() > 1e-8


@pytest.mark.parametrize("simulation", ["flow-map", "consistency"])
def test_guidance_times_of_their_own_end_where_the_drawn_jump_starts(tmp_path: Path, simulation: str) -> None:
    changes = {"guidance_times": "own", "simulation": simulation, "real_guidance_until": 0.9}
    run = trainer(tmp_path, "on-policy", changes=changes)
    starts = set()
    for step in range(1, 12):
        rng = StepRng(0, step, 4, (0, 1, 2, 3))
        with patch.object(
            matching, "distribution_matching_loss", wraps=matching.distribution_matching_loss
        ) as on_x:
            run.optimizers[0].terms[0](batch(), rng)
        elsewhere = on_x.call_args.kwargs["guidance_at"]
        if simulation == "flow-map":
            steps, k = draw_segment(BUDGETS, rng.generator("rollout"))
        else:
            steps, k = 4, int(torch.randint(4, (), generator=rng.generator("rollout")))
        start = float(grid(steps, 5.0)[k])
        assert elsewhere.t.max() <= min(start, 0.9) + 1e-6
        assert not torch.equal(elsewhere.eps, on_x.call_args.args[5])
        starts.add(start)
    assert len(starts) > 2


@pytest.mark.parametrize("objective", ["quotient", "composition"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_against_its_frozen_teacher_a_student_starts_without_a_boundary_loss(
    tmp_path: Path, lora: bool, objective: str
) -> None:
    """With guidance 1 it starts as the teacher; the teacher stays as it is while the student learns."""
    own = {"target": "teacher", "adaptive": "off", "guidance": 1.0, "objective": objective}
    run = trainer(tmp_path, "flow-map", lora=lora, changes=own)
    before = [weight.clone() for weight in run.backbone.network_of("real").parameters()]
    reports = []
    for run.step in (1, 2, 3):
        reports.append(run.train_step(batch()))
    assert reports[0]["boundary"] == pytest.approx(0, abs=1e-10)
    assert reports[0]["non_boundary"] > 1e-6
    assert reports[-1]["boundary"] > 1e-12
    if not lora:  # with adapters the student shares these weights, and does not train them
        assert run.backbone.network_of("real") is not run.backbone.network_of("student")
    for weight, first in zip(run.backbone.network_of("real").parameters(), before, strict=False):
        assert lora or torch.equal(weight, first)


def test_states_of_the_networks_own_do_not_depend_on_the_data(tmp_path: Path) -> None:
    """Of the data only the shape counts; the loss is that at jumps from the step's noise."""
    own = {"target": "teacher", "adaptive": "off", "states": "own"}
    run, data = trainer(tmp_path, "flow-map", changes=own), batch()
    term, rng = run.optimizers[0].terms[0], StepRng(0, 1, 4, (0, 1, 2, 3))
    found, other = (
        term(replace(data, latents=latents), rng)[0] for latents in (data.latents, 0 * data.latents)
    )
    assert found.item() > 1e-6
    assert torch.equal(found, other)
    plain = trainer(tmp_path / "data", "flow-map", changes={**own, "states": "data"}).optimizers[0].terms[0]
    assert plain(data, rng)[0].item() != pytest.approx(found.item(), rel=1e-3)


def test_states_of_the_networks_own_are_made_on_the_device_of_the_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Times are drawn on the CPU."""
    seen: list[str] = []

    def student(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        seen.extend(tensor.device.type for tensor in (z, t, r))
        raise StopIteration

    own: dict[str, Any] = {"target": "teacher", "adaptive": "off", "states": "own"}
    roles = small.backbone("flow-map", **own)
    monkeypatch.setattr(type(roles), "velocity", lambda *_: student)
    elsewhere = replace(batch(4), latents=batch(4).latents.to("meta"))
    with pytest.raises(StopIteration):
        small.objective("flow-map", roles, **own).phases[0].terms[0](
            elsewhere, StepRng(0, 1, 4, (0, 1, 2, 3))
        )
    assert seen == ["meta"] * 3


def test_the_scores_have_their_own_shift(tmp_path: Path) -> None:
    """The same rng, unshifted; t_max holds a few of the matching times."""

    def of_scores(name: str, score_shift: float | None) -> tuple[Tensor, Tensor]:
        run = trainer(tmp_path / name, "on-policy", changes={"score_shift": score_shift})
        with (
            patch.object(
                matching, "distribution_matching_loss", wraps=matching.distribution_matching_loss
            ) as on_x,
            patch.object(matching, "fake_score_loss", wraps=matching.fake_score_loss) as on_fake,
        ):
            for phase in run.optimizers:
                phase.terms[0](batch(), StepRng(0, 1, 4, (0, 1, 2, 3)))
        return on_x.call_args.args[4], on_fake.call_args.args[3]

    shifted, plain = of_scores("model's", None), of_scores("own", 1.0)
    assert [len(times) for times in plain] == [4, 4]
    assert torch.cat(plain).mean() < torch.cat(shifted).mean() - 0.1
    torch.testing.assert_close(shift(plain[0], 5.0).clamp(0.02, 0.98), shifted[0])
    torch.testing.assert_close(shift(plain[1], 5.0), shifted[1])


def test_recomputed_jumps_give_the_same_gradient(tmp_path: Path) -> None:
    kept, again = (
        gradients(
            trainer(tmp_path / str(recomputes), "on-policy", changes={"recompute_rollout": recomputes}),
            0, "student",
        )
        for recomputes in (False, True)
    )  # fmt: skip
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_budgets_of_the_recipe_are_those_of_the_paper() -> None:
    assert schema.DistillSection().step_budgets == BUDGETS


VARIANTS: list[tuple[Kind, dict[str, Any]]] = [
    ("on-policy", {"matching": "fake-free"}),
    ("on-policy", {"guidance_times": "own", "matching_gradient": "orthogonal"}),
    ("causal-on-policy", {"replay_rollout": True}),
    ("causal-on-policy", {"first_chunk_budgets": (1, 8)}),
    ("flow-map", {"target": "teacher", "adaptive": "off", "states": "own"}),
]


def check_micro_batches(directory: Path, kind: Kind, micro: int, **settings: Any) -> None:
    """Equal up to the order of fp32 sums: the means over the global batch are exact, Eq. 7's too."""
    both = [trainer(directory / str(m), kind, global_batch=6, micro_batch=m, **settings) for m in (micro, 6)]
    for phase in range(len(both[0].optimizers)):
        cut, whole = (gradients(run, phase, run.optimizers[phase].name) for run in both)
        scale = max(float(gradient.abs().max()) for gradient in whole if gradient is not None)
        for a, b in zip(cut, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * scale)
        for run in both:
            run.optimizers[phase].optimizer.zero_grad()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_give_the_gradient_of_the_whole(
    tmp_path: Path, kind: Kind, lora: bool, micro: int
) -> None:
    check_micro_batches(tmp_path, kind, micro, lora=lora)


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_micro_batches_of_each_variant_do_too(tmp_path: Path, kind: Kind, changes: dict[str, Any]) -> None:
    check_micro_batches(tmp_path, kind, 2, changes=changes)


def test_reports_do_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    reports = []
    for micro in (1, 4):
        run = trainer(tmp_path / str(micro), "flow-map", micro_batch=micro)
        reports.append(reported_sums(run, batch()))
    one, four = reports
    assert one["boundary"][1] == four["boundary"][1] == 2
    for name in ("loss", "boundary", "non_boundary"):
        assert one[name] == pytest.approx(four[name], rel=1e-4)


def test_shares_of_times_hold_for_the_global_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, "flow-map", global_batch=8, micro_batch=2)
    report = reported_sums(run, batch(8))
    assert (report["boundary"][1], report["non_boundary"][1]) == (4, 4)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 4)])
def test_dropped_text_is_replaced_by_the_negative_prompt(share: float, dropped: int) -> None:
    negative = torch.full_like(small.NEGATIVE, 3.0)
    result, mask = drop_text(batch(), negative, share, StepRng(0, 1, 4, (0, 1, 2, 3)))
    assert int(mask.sum()) == dropped
    own = batch().condition.text
    assert torch.equal(result.condition.text, negative.expand_as(own) if dropped else own)


def test_text_is_dropped_by_position() -> None:
    whole = drop_text(batch(), small.NEGATIVE, 0.5, StepRng(0, 2, 4, (0, 1, 2, 3)))[1]
    part = drop_text(batch(), small.NEGATIVE, 0.5, StepRng(0, 2, 4, (3, 1, 0, 2)))[1]
    assert 0 < int(whole.sum()) < 4
    assert torch.equal(part, whole[[3, 1, 0, 2]])


def test_sums_add_up_over_micro_batches() -> None:
    values, mask = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True])
    assert (sums(values[:2], mask[:2]) + sums(values[2:], mask[2:])).tolist() == [7.0, 2.0]
    assert sums(torch.tensor(0.5), 4).tolist() == [2.0, 4.0]


def test_a_weight_scales_the_loss_and_not_the_report() -> None:
    two = FunctionTerm(
        lambda batch, rng: (torch.tensor(2.0), {"loss": torch.tensor([2.0, 1.0])}), lambda latent, rng: []
    )
    loss, report = weighted(two, 0.5, "x_")(batch(), StepRng(0, 1, 4, (0,)))
    assert loss.item() == 1.0
    assert report["x_loss"].tolist() == [2.0, 1.0]


def test_ode_init_starts_from_the_noise_that_each_video_was_sampled_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise the target of a state is the mean of many videos, and the baseline is a denoiser."""
    seen: list[Tensor] = []

    def loss(model: Any, z: Tensor, t: Tensor, x: Tensor, weight: Any) -> Tensor:
        start = (z - (1 - t)[:, None, None, None, None] * x) / t[:, None, None, None, None]
        seen.append(start)
        return z.sum() * 0

    monkeypatch.setattr("anyflow_cli.flow.losses.consistency_loss", loss)
    term = small.objective("consistency-ode", small.backbone("consistency-ode")).phases[0].terms[0]
    term(batch(4), StepRng(0, 1, 4, (0, 1, 2, 3)))
    torch.testing.assert_close(seen[0], batch_noise([0, 1, 2, 3], small.LATENT), rtol=1e-3, atol=1e-3)


def test_paired_noise_is_the_one_that_each_video_was_sampled_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def loss(model: Any, null: Any, x: Tensor, eps: Tensor, *_: Any, **__: Any) -> Any:
        seen.append(eps)
        raise StopIteration

    monkeypatch.setattr("anyflow_cli.flow.losses.flow_map_loss", loss)
    for changes in ({"noise": "paired"}, {}):
        objective = small.objective("flow-map", small.backbone("flow-map"), **changes)
        with pytest.raises(StopIteration):
            objective.phases[0].terms[0](batch(4), StepRng(0, 1, 4, (0, 1, 2, 3)))
    paired = batch_noise([0, 1, 2, 3], small.LATENT)
    torch.testing.assert_close(seen[0], paired)
    assert (seen[1] - paired).abs().mean() > 0.5


@pytest.mark.parametrize(
    ("kind", "changes"), [("consistency-ode", {}), ("flow-map", {"noise": "paired"})], ids=["ode", "paired"]
)
def test_real_clips_have_no_noise_behind_them(kind: Kind, changes: dict[str, Any]) -> None:
    term = small.objective(kind, small.backbone(kind), **changes).phases[0].terms[0]
    with pytest.raises(UsageError, match="the noise behind each video"):
        term(replace(batch(2), seeds=[3, None]), StepRng(0, 1, 2, (0, 1)))
