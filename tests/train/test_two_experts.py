"""Training the two experts of a model: each on its own times, the other one untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.times import (
    WHOLE,
    TimeInterval,
    TimeRatios,
    sample_logit_normal,
    sample_times,
    sample_uniform,
    shift,
)
from anyflow_cli.model.experts import ExpertPair
from anyflow_cli.model.pipeline_io import load_adapter, load_network
from anyflow_cli.runs.open import describe, open_model
from anyflow_cli.train.prepare import prepare_training
from anyflow_cli.train.rng import StepRng
from anyflow_cli.train.trained_expert import TrainedExpert, expert_times
from tests.tiny_pipeline import make_expert_folder, make_wan_folder
from tests.train.stage import LORA, inputs_of, make_data, make_recipe, paths, train

B, K = 0.875, 12.0


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("name", ["high", "low"])
def test_all_times_of_a_step_belong_to_its_expert(name: Any) -> None:
    interval = expert_times(B, name)
    t, r = sample_times(4000, K, TimeRatios(), generator(), interval=interval)
    single = torch.cat((
        sample_uniform(4000, K, generator(), 0.02, 0.98, interval),
        sample_logit_normal(4000, K, generator(), interval),
    ))  # fmt: skip
    for times in (t, r, single):
        assert bool(((times >= B) if name == "high" else (times < B)).all())
    assert bool((t >= r).all())
    assert (t == r).float().mean() == 0.5
    assert (r == interval.low).float().mean() == 0.25


def test_times_of_an_expert_are_distributed_as_those_of_the_whole_within_its_interval() -> None:
    high = expert_times(B, "high")
    whole = shift(torch.rand(200_000, generator=generator()), K)
    inside = whole[whole >= B]
    own = sample_uniform(200_000, K, generator(), interval=high)
    assert float(own.mean()) == pytest.approx(float(inside.mean()), abs=1e-3)
    assert float(own.std()) == pytest.approx(float(inside.std()), abs=1e-3)


def test_one_network_draws_the_same_times_as_before() -> None:
    whole = sample_uniform(64, K, generator())
    assert torch.equal(whole, shift(torch.rand(64, generator=generator()), K))
    assert TimeInterval() == WHOLE


def test_each_step_trains_one_expert_and_both_are_drawn() -> None:
    experts = TrainedExpert(B)
    names = [experts.of_step(StepRng(0, step, 4, (0,))).name for step in range(200)]
    assert 70 < names.count("high") < 130
    assert names[7] == experts.of_step(StepRng(0, 7, 4, (3, 1))).name, "processes must agree"


# --- whole stages


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_expert_folder(tmp_path_factory.mktemp("teacher") / "a14b")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "latents")


def changed(model: Path, teacher: Path, name: str) -> bool:
    """Whether any weight of an expert differs from the teacher's."""
    trained, start = load_network(model), load_network(teacher)
    assert isinstance(trained, ExpertPair)
    assert isinstance(start, ExpertPair)
    own = dict(trained.expert(name).named_parameters())  # type: ignore[arg-type]
    return any(
        not torch.equal(own[key], weight)
        for key, weight in start.expert(name).named_parameters()  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("expert", "lora"),
    [
        ("high", True), ("both", False),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("high", False), ("low", True), ("low", False), ("both", True))),
    ],
)  # fmt: skip
def test_stages_train_the_chosen_expert_and_save_a_model_of_two(
    expert: str, lora: bool, teacher: Path, data: Path, tmp_path: Path
) -> None:
    model = {"expert": expert, "lora": LORA if lora else None, "shift": K}
    sections = {stage: {"steps": 4, "checkpoint_every": 4} for stage in ("train_flowmap", "distill")}
    recipe, place = make_recipe(teacher, data, model=model, **sections), paths(tmp_path)
    for verb in ("train-flowmap", "distill"):
        result = train(recipe, inputs_of(verb, recipe, place))
        for name in ("high", "low"):
            assert changed(result.model, teacher, name) == (expert in (name, "both")), (verb, name)
        if lora:
            assert result.adapter is not None
            found = {name.partition(".")[0] for name in load_adapter(result.adapter).weights}
            assert found == ({"high", "low"} if expert == "both" else {expert})
    opened = open_model(str(result.model), recipe)
    assert opened.network.config.boundary == B
    assert opened.network.config.two_time
    checkpoint = str(result.model.parent / "checkpoints" / "step-000004")
    info = describe(checkpoint, recipe)
    assert info.two_time
    pair = open_model(checkpoint, recipe).network
    for one, two in zip(pair.parameters(), opened.network.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_run_that_stopped_continues_bit_for_bit(teacher: Path, data: Path, tmp_path: Path) -> None:
    recipe = make_recipe(teacher, data, model={"lora": LORA, "shift": K}, train_flowmap={"steps": 4})
    whole, halved = (paths(tmp_path / name) for name in ("whole", "halved"))
    wanted = train(recipe, inputs_of("train-flowmap", recipe, whole)).model
    first = recipe.model_copy(update={"train_flowmap": recipe.train_flowmap.model_copy(update={"steps": 2})})
    prepare_training(first, inputs_of("train-flowmap", first, halved)).trainer.run()
    found = train(recipe, inputs_of("train-flowmap", recipe, halved)).model
    for one, two in zip(load_network(found).parameters(), load_network(wanted).parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_causal_student_of_two_experts_is_refused(teacher: Path, data: Path, tmp_path: Path) -> None:
    causal = {"partition": (1, 1, 1), "full_chunks": 2}
    recipe = make_recipe(teacher, data, model={"causal": causal})
    with pytest.raises(UsageError, match="two experts"):
        prepare_training(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))


def test_guidance_per_expert_needs_two_experts(data: Path, tmp_path: Path) -> None:
    plain = make_wan_folder(tmp_path / "wan")
    guidance = {"flow_map": {"guidance": {"high": 4.0, "low": 3.0}}}
    recipe = make_recipe(plain, data, train_flowmap=guidance)
    said = r"flow_map.guidance has a scale for each of two experts \(4 and 3\), .* is one network"
    with pytest.raises(UsageError, match=said):
        prepare_training(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
