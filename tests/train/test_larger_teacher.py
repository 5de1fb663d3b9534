"""Stage 2 towards a real score that is wider and deeper than the student, with adapters and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.errors import UsageError
from anyflow_cli.model.network import FlowMapTransformer
from anyflow_cli.model.pipeline_io import load_network
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs import checkpoint
from anyflow_cli.runs.lineage import RunInputs
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.train import objectives
from anyflow_cli.train.prepare import load_backbone
from anyflow_cli.train.rng import StepRng
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, inputs_of, make_data, make_recipe, paths, train

LARGER = {"num_attention_heads": 3, "num_layers": 3, "ffn_dim": 96}


class Case(NamedTuple):
    recipe: Recipe
    inputs: RunInputs
    large: Path

    @property
    def lora(self) -> bool:
        return self.recipe.model.lora is not None


def with_real_score(recipe: Recipe, place: RunPaths, real: Path) -> tuple[Recipe, RunInputs]:
    settings = recipe.distill.model_copy(update={"real_score": str(real)})
    changed = recipe.model_copy(update={"distill": settings})
    return changed, inputs_of("distill", changed, place)


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("larger")
    teacher, data = make_wan_folder(directory / "small"), make_data(directory / "data")
    large = make_wan_folder(directory / "large", 1, **LARGER)
    place = paths(directory)
    recipe = make_recipe(teacher, data, model={"lora": LORA if request.param else None})
    train(recipe, inputs_of("train-flowmap", recipe, place))
    return Case(*with_real_score(recipe, place, large), large)


def test_the_scores_are_the_larger_network_at_the_start(case: Case) -> None:
    backbone = load_backbone(case.recipe, case.inputs, "fp32")
    assert [len(backbone.network_of(role).blocks) for role in backbone.roles] == [2, 3, 3]
    batch = LatentData(case.inputs.data, 8).batch([0, 1])
    t = torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = load_network(case.large)(batch.latents, t, t, batch.condition.text)
        for role in ("real", "fake"):
            found = backbone.velocity(role, batch.condition)(batch.latents, t, t)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_real_score_is_frozen_and_each_phase_trains_its_own_role(case: Case) -> None:
    backbone = load_backbone(case.recipe, case.inputs, "fp32")
    data = LatentData(case.inputs.data, 8)
    objective = objectives.on_policy(backbone, data.negative, case.recipe.distill, case.recipe.model.shift)
    for phase in objective.phases:
        for term in phase.terms:
            loss, _ = term(data.batch([0, 1]), StepRng(0, 1, 2, (0, 1)))
            torch.autograd.backward(loss)
        given = {parameter for parameter in backbone.parameters() if parameter.grad is not None}
        assert given <= set(backbone.parameters_of(phase.role)), phase.role
        assert any(parameter.grad.any() for parameter in given if parameter.grad is not None)
        for parameter in given:
            parameter.grad = None
    assert not backbone.parameters_of("real")


def test_the_run_leaves_a_model_of_the_students_size(case: Case) -> None:
    done = train(case.recipe, case.inputs)
    start, end = (load_network(path) for path in (case.inputs.parents["start"], done.model))
    assert start.config == end.config
    assert moved(start, end)
    newest = checkpoint.newest(case.inputs.directory / "checkpoints")
    assert newest is not None
    fake = checkpoint.load(newest).tensors["fake"]
    assert {name.split(".")[1] for name in fake if name.startswith("blocks.")} == {"0", "1", "2"}
    if case.lora:
        assert all(".lora_" in name for name in fake)


def moved(start: FlowMapTransformer, end: FlowMapTransformer) -> bool:
    others: dict[str, Tensor] = end.state_dict()
    return any(not torch.equal(value, others[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_dim": 16}, "text of width 32; the real score takes 16"),
        ({"in_channels": 4, "out_channels": 4}, "latents of 8 channels; the real score takes 4"),
    ],
)
def test_a_teacher_of_another_encoder_is_refused(
    case: Case, tmp_path: Path, changes: dict[str, int], words: str
) -> None:
    other = make_wan_folder(tmp_path / "other", **changes)
    home = RunPaths(case.inputs.directory.parents[1], "test")
    recipe, inputs = with_real_score(case.recipe, home, other)
    with pytest.raises(UsageError, match=words) as error:
        train(recipe, replace(inputs, directory=tmp_path / "distill"))
    assert "distill.real_score" in str(error.value.hint)
