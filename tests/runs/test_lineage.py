"""Whose directory a run is: the same command goes on, anything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_cli.errors import UsageError
from anyflow_cli.runs.lineage import RunInputs, begin_run, check_run, model_fingerprint
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import make_data, make_recipe


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


@pytest.fixture
def inputs(tmp_path: Path, wan: Path) -> RunInputs:
    return RunInputs(tmp_path / "run", "train_flowmap", make_data(tmp_path / "data"), {"teacher": wan}, wan)


def test_the_same_run_goes_on_with_the_lineage_it_began_with(inputs: RunInputs) -> None:
    recipe = make_recipe(inputs.base, inputs.data)
    first = begin_run(recipe, inputs, "fp32", 1)
    assert begin_run(recipe, inputs, "bf16", 2) == first
    assert first.inputs["teacher"].sha256 == model_fingerprint(inputs.base)
    assert first.base == str(inputs.base)
    assert {"anyflow", "torch", "diffusers"} <= first.versions.keys()
    assert json.loads((inputs.directory / "lineage.json").read_text()) == first.as_dict()


@pytest.mark.parametrize(
    ("section", "change", "key"),
    [
        ("train_flowmap", {"global_batch": 4}, r"train_flowmap\.global_batch \(2 there, 4 now\)"),
        ("train_flowmap", {"flow_map": {"guidance": 2.0}}, r"train_flowmap\.flow_map\.guidance"),
        ("train_flowmap", {"seed": 5}, r"train_flowmap\.seed"),
        ("model", {"gate": 0.5}, r"model\.gate"),
    ],
)
def test_other_settings_are_refused_with_their_keys(
    inputs: RunInputs, section: str, change: dict[str, Any], key: str
) -> None:
    begin_run(make_recipe(inputs.base, inputs.data), inputs, "fp32", 1)
    before = sorted(path.name for path in inputs.directory.iterdir())
    with pytest.raises(UsageError, match=key) as error:
        check_run(make_recipe(inputs.base, inputs.data, **{section: change}), inputs)
    assert str(inputs.directory) in str(error.value)
    assert sorted(path.name for path in inputs.directory.iterdir()) == before


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("train_flowmap", {"steps": 9}),
        ("train_flowmap", {"micro_batch": 1}),
        ("train_flowmap", {"checkpoint_every": 7, "log_every": 3, "preview_every": 2, "tensorboard": True}),
        ("model", {"gradient_checkpointing": True}),
        ("distill", {"global_batch": 4}),  # of another stage
        ("data", {"workers": 2}),
    ],
)
def test_what_does_not_bear_on_the_weights_may_change(
    inputs: RunInputs, section: str, change: dict[str, Any]
) -> None:
    begin_run(make_recipe(inputs.base, inputs.data), inputs, "fp32", 1)
    check_run(make_recipe(inputs.base, inputs.data, **{section: change}), inputs)


def test_other_data_are_refused(inputs: RunInputs, tmp_path: Path) -> None:
    recipe = make_recipe(inputs.base, inputs.data)
    begin_run(recipe, inputs, "fp32", 1)
    other = make_data(tmp_path / "other", seed=1)
    changed = RunInputs(inputs.directory, inputs.section, other, inputs.parents, inputs.base)
    with pytest.raises(UsageError, match="another data"):
        check_run(recipe, changed)


def test_another_parent_is_refused(inputs: RunInputs, tmp_path: Path) -> None:
    recipe = make_recipe(inputs.base, inputs.data)
    begin_run(recipe, inputs, "fp32", 1)
    other = make_wan_folder(tmp_path / "other", seed=1)
    changed = RunInputs(inputs.directory, inputs.section, inputs.data, {"teacher": other}, other)
    with pytest.raises(UsageError, match="another teacher"):
        check_run(recipe, changed)


def test_a_directory_of_other_things_is_left_alone(inputs: RunInputs) -> None:
    inputs.directory.mkdir()
    (inputs.directory / "letter.txt").write_text("keep me")
    with pytest.raises(UsageError, match="is not a training run"):
        begin_run(make_recipe(inputs.base, inputs.data), inputs, "fp32", 1)
    assert [path.name for path in inputs.directory.iterdir()] == ["letter.txt"]


def test_killed_as_it_began_it_begins_again(inputs: RunInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(*_: Any) -> None:
        raise Killed

    recipe = make_recipe(inputs.base, inputs.data)
    with monkeypatch.context() as patch:
        patch.setattr("anyflow_cli.runs.lineage.write_json", die)
        with pytest.raises(Killed):
            begin_run(recipe, inputs, "fp32", 1)
    assert begin_run(recipe, inputs, "fp32", 1).precision == "fp32"


def test_checkpoints_of_unknown_origin_are_refused_and_kept(inputs: RunInputs) -> None:
    recipe = make_recipe(inputs.base, inputs.data)
    begin_run(recipe, inputs, "fp32", 1)
    (inputs.directory / "checkpoints" / "step-000001").mkdir(parents=True)
    lineage, recorded = (inputs.directory / name for name in ("lineage.json", "recipe.yaml"))
    lineage.unlink()
    before = recorded.stat().st_mtime_ns
    with pytest.raises(UsageError, match=r"has checkpoints but no lineage\.json"):
        begin_run(recipe, inputs, "fp32", 1)
    assert not lineage.exists()
    assert recorded.stat().st_mtime_ns == before


def test_a_fingerprint_tells_weights_apart_and_ignores_the_rest(wan: Path, tmp_path: Path) -> None:
    other = make_wan_folder(tmp_path / "other", seed=1)
    assert model_fingerprint(other) != model_fingerprint(wan)
    before = model_fingerprint(other)
    (other / "lineage.json").write_text("{}")
    assert model_fingerprint(other) == before


def test_a_checkpoint_has_a_fingerprint_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / name / "ema.safetensors")
        (tmp_path / name / "state.json").write_text("{}")
    assert model_fingerprint(tmp_path / "a") != model_fingerprint(tmp_path / "b")


@pytest.mark.parametrize(
    ("key", "value"),
    [("base", None), ("base", 3), ("inputs", []), ("inputs", {"data": "x"}), ("versions", {"anyflow": 1}),
     ("precision", "fp8"), ("command", "anyflow"), ("processes", "2")],
)  # fmt: skip
def test_a_lineage_with_a_wrong_field_names_file_and_field(inputs: RunInputs, key: str, value: Any) -> None:
    recipe = make_recipe(inputs.base, inputs.data)
    begin_run(recipe, inputs, "fp32", 1)
    path = inputs.directory / "lineage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UsageError, match=rf"{path} is damaged: {key}"):
        check_run(recipe, inputs)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(UsageError, match=rf"{path} is damaged: {key}: Field required"):
        check_run(recipe, inputs)


@pytest.mark.parametrize("section", ["train_flowmap", "distill", "finetune"])
def test_a_refusal_says_how_to_continue_from_the_weights(inputs: RunInputs, section: str) -> None:
    own = replace(inputs, section=section)
    begin_run(make_recipe(inputs.base, inputs.data), own, "fp32", 1)
    other = make_recipe(inputs.base, inputs.data, **{section: {"optimizer": {"lr": 5e-4, "warmup_steps": 0}}})
    with pytest.raises(UsageError, match=rf"{section}\.optimizer\.lr \(0\.001 there, 0\.0005 now\)") as error:
        check_run(other, own)
    key = "model.teacher" if section == "train_flowmap" else f"{section}.init_from"
    assert f"add --set {key}={inputs.directory}/model" in (error.value.hint or "")
