"""Whole stages on a small pipeline: what each leaves, what the next takes up, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyflow_cli.data.dataset import LatentData
from anyflow_cli.errors import UsageError
from anyflow_cli.model.pipeline_io import load_adapter, load_network
from anyflow_cli.recipe.schema import Recipe
from anyflow_cli.runs import checkpoint
from anyflow_cli.runs.open import open_model
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.train.prepare import load_backbone, prepare_training
from anyflow_cli.train.validation import TrainingPart, flow_map_error
from anyflow_cli.utils.contact_sheet import SheetRow, contact_sheet
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, inputs_of, make_data, make_recipe, paths, train


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "data")


class Chain:
    """All stages of a recipe, run once: for whole weights, and for adapters."""

    def __init__(self, wan: Path, data: Path, directory: Path, lora: bool) -> None:
        self.paths = paths(directory)
        model = {"lora": LORA if lora else None}
        self.tuning = make_recipe(wan, data, model=model, train_flowmap={"objective": "flow-matching"})
        self.recipe = make_recipe(wan, data, model=model)
        self.teacher = train(self.tuning, inputs_of("train-flowmap", self.tuning, self.paths))
        self.first = train(self.recipe, inputs_of("train-flowmap", self.recipe, self.paths))
        self.second = train(self.recipe, inputs_of("distill", self.recipe, self.paths))
        self.third = train(self.recipe, inputs_of("finetune", self.recipe, self.paths, data))


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def chain(
    request: pytest.FixtureRequest, wan: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Chain:
    return Chain(wan, data, tmp_path_factory.mktemp("chain"), request.param)


def test_each_stage_saves_its_model_where_the_next_one_looks(chain: Chain) -> None:
    home = chain.paths.home
    assert chain.teacher.model == home / "teacher" / "model"
    assert chain.first.model == home / "train-flowmap" / "model"
    assert chain.second.model == home / "distill" / "model"
    assert chain.third.model == home / "finetune" / "model"
    inputs = inputs_of("distill", chain.recipe, chain.paths)
    assert inputs.parents["start"] == chain.first.model
    assert inputs.parents["real score"] == chain.teacher.model


def test_a_tuned_teacher_is_a_wan_folder_and_a_student_an_anyflow_folder(chain: Chain) -> None:
    classes = [
        json.loads((stage.model / "model_index.json").read_text())["_class_name"]
        for stage in (chain.teacher, chain.first, chain.second, chain.third)
    ]
    assert classes == ["WanPipeline", "AnyFlowPipeline", "AnyFlowPipeline", "AnyFlowPipeline"]


def test_the_finished_model_is_the_average(chain: Chain) -> None:
    """As ``--model`` opens the last checkpoint, from the run's lineage, so is the finished model."""
    newest = checkpoint.newest(chain.second.model.parent / "checkpoints")
    opened = open_model(str(newest), chain.recipe).network
    finished = load_network(chain.second.model)
    for name, value in opened.state_dict().items():
        torch.testing.assert_close(finished.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_stage_trains_the_model_it_started_from(chain: Chain) -> None:
    start, end = (load_network(stage.model).state_dict() for stage in (chain.first, chain.second))
    assert any(not torch.allclose(start[name], end[name], atol=1e-5) for name in start)


def test_stage_2_shares_one_base_among_adapters(chain: Chain) -> None:
    inputs = inputs_of("distill", chain.recipe, chain.paths)
    backbone = load_backbone(chain.recipe, inputs, "fp32")
    one = backbone.network_of("student") is backbone.network_of("fake") is backbone.network_of("real")
    assert one is (chain.recipe.model.lora is not None)
    assert (inputs.base == Path(chain.recipe.model.teacher)) is one


@torch.no_grad()
def test_stage_2_starts_from_the_student_and_the_tuned_teacher(chain: Chain) -> None:
    inputs = inputs_of("distill", chain.recipe, chain.paths)
    backbone = load_backbone(chain.recipe, inputs, "fp32")
    batch = LatentData(inputs.data, 8).batch([0, 1])
    t, r = torch.tensor([0.3, 0.9]), torch.tensor([0.1, 0.9])
    student, tuned = (load_network(stage.model) for stage in (chain.first, chain.teacher))
    expected = student(batch.latents, t, r, batch.condition.text)
    torch.testing.assert_close(
        backbone.velocity("student", batch.condition)(batch.latents, t, r), expected, rtol=1e-4, atol=1e-4
    )
    expected = tuned(batch.latents, t, t, batch.condition.text)
    for role in ("real", "fake"):
        found = backbone.velocity(role, batch.condition)(batch.latents, t, t)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_beside_the_model(chain: Chain) -> None:
    lora = chain.recipe.model.lora is not None
    assert (chain.first.adapter is not None) is lora
    if chain.first.adapter is not None:
        adapter = load_adapter(chain.first.adapter)
        assert adapter.size.rank == LORA["rank"]
        assert adapter.base == chain.recipe.model.teacher


def test_restarting_a_finished_stage_changes_nothing(chain: Chain) -> None:
    before = load_network(chain.first.model).state_dict()
    again = train(chain.recipe, inputs_of("train-flowmap", chain.recipe, chain.paths))
    after = load_network(again.model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_retraining_an_earlier_stage_is_noticed(chain: Chain, tmp_path: Path) -> None:
    """A run must not continue from a start that has changed."""
    other = paths(tmp_path)
    recipe = chain.recipe
    train(recipe, inputs_of("train-flowmap", recipe, other))
    train(recipe, inputs_of("distill", recipe, other))
    longer = recipe.model_copy(update={"train_flowmap": recipe.train_flowmap.model_copy(update={"steps": 3})})
    train(longer, inputs_of("train-flowmap", longer, other))
    with pytest.raises(UsageError, match="another start"):
        train(longer, inputs_of("distill", longer, other))


def test_finetuning_continues_from_a_checkpoint(chain: Chain, tmp_path: Path) -> None:
    newest = checkpoint.newest(chain.second.model.parent / "checkpoints")
    data = Path(chain.recipe.data.path or "")
    finetune = chain.recipe.finetune.model_copy(update={"init_from": str(newest)})
    recipe = chain.recipe.model_copy(update={"finetune": finetune})
    if chain.recipe.model.lora is not None:
        with pytest.raises(UsageError, match="Adapters cannot be trained on the checkpoint"):
            inputs_of("finetune", recipe, paths(tmp_path), data)
        return
    inputs = inputs_of("finetune", recipe, paths(tmp_path), data)
    network = load_backbone(recipe, inputs, "fp32").network_of("student")
    finished = load_network(chain.second.model).state_dict()
    assert all(torch.equal(value, finished[name]) for name, value in network.state_dict().items())


def test_the_last_preview_shows_the_videos_of_the_finished_model(
    wan: Path, data: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(wan, data, train_flowmap={"preview_every": 2, "preview_prompts": 2})
    inputs = inputs_of("train-flowmap", recipe, paths(tmp_path))
    finished = train(recipe, inputs)
    batch = LatentData(data, recipe.model.max_text_tokens).batch([0, 1])
    sampler = VideoSampler.load(str(finished.model), recipe)
    rows = [SheetRow(caption, list(videos)) for caption, videos in zip(
        batch.captions,
        zip(*(sampler.videos(batch.condition, [0, 1], nfe, 2) for nfe in recipe.sample.nfe), strict=True),
        strict=True,
    )]  # fmt: skip
    sheet = contact_sheet(rows, [f"{nfe} step{'s' * (nfe > 1)}" for nfe in recipe.sample.nfe], title="step 2")
    (preview,) = (inputs.directory / "previews").iterdir()
    assert preview.name == "step-000002.png"
    assert np.array_equal(np.asarray(Image.open(preview)), np.asarray(sheet))


@pytest.mark.parametrize("simulation", ["flow-map", "consistency"])
def test_without_stage_1_the_command_that_makes_it_is_named(
    wan: Path, data: Path, tmp_path: Path, simulation: str
) -> None:
    recipe = make_recipe(wan, data, distill={"simulation": simulation})
    with pytest.raises(UsageError, match="no stage-1 model") as error:
        inputs_of("distill", recipe, paths(tmp_path))
    assert "anyflow train-flowmap -r test" in str(error.value.hint)


def test_without_data_the_command_that_makes_it_is_named(wan: Path, tmp_path: Path) -> None:
    recipe = make_recipe(wan, tmp_path / "absent")
    with pytest.raises(UsageError, match="no data set at") as error:
        inputs_of("train-flowmap", recipe, paths(tmp_path))
    assert "anyflow synthesize -r test" in str(error.value.hint)


def test_consistency_simulation_prefers_its_own_start(wan: Path, data: Path, tmp_path: Path) -> None:
    recipe, there = make_recipe(wan, data, distill={"simulation": "consistency"}), paths(tmp_path)
    (there.stage_1() / "model").parent.mkdir(parents=True)
    (there.stage_1() / "model").symlink_to(wan)
    assert inputs_of("distill", recipe, there).parents["start"] == there.stage_1() / "model"
    (there.stage_1("consistency-ode")).mkdir(parents=True)
    (there.stage_1("consistency-ode") / "model").symlink_to(wan)
    assert inputs_of("distill", recipe, there).parents["start"] == there.stage_1("consistency-ode") / "model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"section": "finetune"}, "is a teacher, not an any-step model"), ({}, "")],
)
def test_a_start_of_the_wrong_kind_is_refused(
    wan: Path, data: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    recipe = make_recipe(wan, data, finetune={"init_from": str(wan)})
    if changes:
        inputs = inputs_of("finetune", recipe, paths(tmp_path), data)
        with pytest.raises(UsageError, match=words):
            train(recipe, inputs)
    else:
        recipe = make_recipe(wan, data, distill={"init_from": str(wan)})
        with pytest.raises(UsageError, match="is a teacher, not an any-step model"):
            train(recipe, inputs_of("distill", recipe, paths(tmp_path)))


def test_data_for_another_model_is_refused(wan: Path, tmp_path: Path) -> None:
    recipe = make_recipe(wan, make_data(tmp_path / "data", channels=4))
    with pytest.raises(UsageError, match="latents of 4 channels; the model takes 8"):
        train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))


def test_a_tenth_is_held_out(tmp_path: Path) -> None:
    part = TrainingPart(make_data(tmp_path / "data", count=25), 8)
    assert len(part) == 23
    assert part.batch([22]).captions == ["clip 22"]
    assert len(TrainingPart(make_data(tmp_path / "few", count=5), 8)) == 5


def test_the_error_on_held_out_clips_is_deterministic_and_names_its_clips(chain: Chain) -> None:
    recipe, data = chain.recipe, Path(chain.recipe.data.path or "")
    network = load_network(chain.first.model)
    first, second = (flow_map_error(network, recipe, LatentData(data, 8)) for _ in range(2))
    assert first == second
    assert (first.clips, first.unseen) == (1, True)
    assert first.error > 0


def test_runs_of_several_recipes_are_in_separate_directories(tmp_path: Path) -> None:
    assert RunPaths(tmp_path, "a").finetune != RunPaths(tmp_path, "b").finetune


def test_precision_is_kept(wan: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run started in one precision does not silently continue in another."""
    recipe = make_recipe(wan, data)
    train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
    auto = _with_precision(recipe, "auto")
    monkeypatch.setattr("anyflow_cli.train.prepare.resolve_precision", lambda *_: "bf16")
    with pytest.raises(UsageError, match="began in fp32"):
        train(auto, inputs_of("train-flowmap", auto, paths(tmp_path)))


def _with_precision(recipe: Recipe, precision: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"precision": precision})})


def test_a_run_that_is_complete_but_for_its_model_saves_it_on_the_next_start(
    wan: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after running out of memory or disk while the finished model was saved."""
    recipe, place = make_recipe(wan, data, model={"lora": LORA}), paths(tmp_path)
    expected = train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path / "undisturbed")))

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("anyflow_cli.train.prepare.save_pipeline", fail)
        with pytest.raises(MemoryError):
            train(recipe, inputs_of("train-flowmap", recipe, place))
    rows = (place.stage_1() / "metrics.jsonl").read_text()
    assert not (place.stage_1() / "model").exists()
    found = train(recipe, inputs_of("train-flowmap", recipe, place))
    assert (place.stage_1() / "metrics.jsonl").read_text() == rows
    weights = [load_network(result.model).state_dict() for result in (expected, found)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_adapters_share_the_teacher_under_a_relative_address_too(
    wan: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wan.parent)
    recipe, place = make_recipe(Path(wan.name), data, model={"lora": LORA}), paths(tmp_path)
    train(recipe, inputs_of("train-flowmap", recipe, place))
    inputs = inputs_of("distill", recipe, place)
    assert inputs.base == Path(wan.name)
    backbone = load_backbone(recipe, inputs, "fp32")
    assert backbone.network_of("student") is backbone.network_of("real")


def test_a_run_that_did_not_share_the_teacher_continues_unshared(
    wan: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1 began it under a relative address: its checkpoints hold adapters on the start."""
    recipe, place = make_recipe(wan, data, model={"lora": LORA}), paths(tmp_path)
    start = train(recipe, inputs_of("train-flowmap", recipe, place)).model
    with monkeypatch.context() as patch:
        patch.setattr("anyflow_cli.train.stages.adapter_on_teacher", lambda *_: None)
        before = inputs_of("distill", recipe, place)
        prepare_training(recipe, before).trainer.run()
    assert inputs_of("distill", recipe, place).base == before.base == start
