"""Training under given pictures: a given first frame stays clean everywhere, channels reach the network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_cli.data.dataset import Batch
from anyflow_cli.flow import losses, matching
from anyflow_cli.flow.condition import Condition
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.recipe import schema
from anyflow_cli.train.causal_windows import WholeVideo
from anyflow_cli.train.objectives import FlowMapTerm, FlowMatchingTerm
from anyflow_cli.train.on_policy import OnPolicyTerms
from anyflow_cli.train.rng import StepRng
from tests.train.small import CONFIG, NEGATIVE

SHIFT = 3.0
SHAPE = (3, CONFIG.out_channels, 4, 4)
RNG = StepRng(0, 1, 2, (0, 1))


def backbone(**changes: Any) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FlowMapTransformer(replace(CONFIG, two_time=False, **changes))
        return Backbone(two_time_from(network).requires_grad_(True), ("student", "real", "fake"))


def batch(**parts: Tensor) -> Batch:
    draw = torch.Generator().manual_seed(3)
    text = torch.randn(2, *NEGATIVE.shape, generator=draw)
    return Batch(torch.randn(2, *SHAPE, generator=draw), Condition(text, **parts), [""] * 2, [0, 1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Arguments of every loss."""
    found: list[tuple[Any, ...]] = []
    for module, name in (
        (losses, "flow_map_loss"), (losses, "flow_matching_loss"), (matching, "distribution_matching_loss"),
        (matching, "fake_score_loss"),
    ):  # fmt: skip
        original = getattr(module, name)

        def noting(*arguments: Any, original: Any = original, **options: Any) -> Any:
            found.append(arguments)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, noting)
    return found


@pytest.mark.parametrize("kind", ["flow-map", "flow-matching"])
def test_a_conditioning_first_frame_is_neither_noised_nor_trained_on(
    seen: list[tuple[Any, ...]], kind: str
) -> None:
    roles, data = backbone(), batch()
    settings = schema.FlowMapSection(conditioning_prob=1.0, text_dropout=0.0)
    if kind == "flow-map":
        term: Any = FlowMapTerm(roles, NEGATIVE, settings, SHIFT, WholeVideo(1.0))
        loss, _ = term(data, RNG)
        model, null, x, eps = seen[0][:4]
        assert torch.equal(null.condition.frames, data.latents[:, :1])
    else:
        loss, _ = FlowMatchingTerm(roles, NEGATIVE, 0.0, SHIFT, WholeVideo(1.0))(data, RNG)
        model, x, eps = seen[0][:3]
    assert torch.equal(model.condition.frames, data.latents[:, :1])
    assert torch.equal(eps[:, :1], x[:, :1])
    assert (eps[:, 1:] - x[:, 1:]).abs().min() > 0
    torch.autograd.backward(loss)
    assert loss.isfinite()


@pytest.mark.parametrize("simulation", ["flow-map", "consistency"])
def test_student_and_scores_share_the_conditioning_frame(
    seen: list[tuple[Any, ...]], simulation: Any
) -> None:
    roles, data = backbone(), batch()
    flow_map = schema.FlowMapSection(conditioning_prob=1.0)
    settings = schema.DistillSection(simulation=simulation, flow_map=flow_map, step_budgets=(2, 4))
    terms = OnPolicyTerms(roles, NEGATIVE, settings, SHIFT)
    loss, _ = terms.matching(data, RNG)
    x, fake, real, null, _, eps = seen[0][:6]
    for model in (fake, real, null):
        assert torch.equal(model.condition.frames, data.latents[:, :1])
    for tensor in (x, eps):
        assert torch.equal(tensor[:, :1], data.latents[:, :1])
    torch.autograd.backward(loss)
    assert terms.fake_score(data, RNG)[0].isfinite()
    fake, x, eps = seen[1][:3]
    assert torch.equal(fake.condition.frames, data.latents[:, :1])
    assert torch.equal(x[:, :1], data.latents[:, :1])


def test_a_share_of_the_steps_conditions_on_the_first_frame() -> None:
    window, video = WholeVideo(0.5), batch().latents
    given = [window(video, StepRng(0, step, 2, (0, 1))).given for step in range(200)]
    assert 70 < sum(given) < 130
    assert not any(WholeVideo()(video, StepRng(0, step, 2, (0, 1))).given for step in range(20))


def test_a_batch_with_channels_trains_the_weights_that_read_them(seen: list[tuple[Any, ...]]) -> None:
    channels = CONFIG.out_channels + 4
    roles = backbone(in_channels=CONFIG.in_channels + channels)
    draw = torch.Generator().manual_seed(5)
    given = torch.randn(2, SHAPE[0], channels, *SHAPE[2:], generator=draw)
    data = batch(channels=given)
    settings = schema.FlowMapSection(text_dropout=0.5)
    loss, _ = FlowMapTerm(roles, NEGATIVE, settings, SHIFT)(data, RNG)
    torch.autograd.backward(loss)
    gradient = roles.network_of("student").patch_embedding.weight.grad
    assert gradient is not None
    assert gradient[:, CONFIG.in_channels :].abs().amax((0, 2, 3, 4)).min() > 0
    for model in seen[0][:2]:  # the negative prompt keeps them
        assert torch.equal(model.condition.channels, given)
