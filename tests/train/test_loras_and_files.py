"""LoRA files and single files of other layouts as what synthesis and training start from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_cli.cli.app import main
from anyflow_cli.data.dataset import LatentData
from anyflow_cli.model.lora_formats import LoraMerged, LoraRequest
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.compare import dump
from anyflow_cli.runs.lineage import read_lineage
from anyflow_cli.runs.open import open_model
from tests.model.layouts import written
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, make_data, make_recipe

Capture = pytest.CaptureFixture[str]
LAYER = "blocks.0.attn1.to_q"
HEAD_DIM = 128  # as of every published Wan, so that sizes follow from tensors alone


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its transformer in one file, a LoRA for it, and the same with the LoRA merged."""
    home = tmp_path_factory.mktemp("home")
    sizes = {"num_attention_heads": 1, "attention_head_dim": HEAD_DIM, "ffn_dim": 64, "num_layers": 1}
    make_wan_folder(home / "wan", **sizes)
    network = load_network(home / "wan")
    draw = torch.Generator().manual_seed(5)
    a, b = (0.2 * torch.randn(*shape, generator=draw) for shape in ((2, HEAD_DIM), (HEAD_DIM, 2)))
    key = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, home / "style.safetensors")
    merged = LoraMerged.of(network, [LoraRequest(home / "style.safetensors", 0.5)])
    save_pipeline(home / "merged", merged, home / "wan", {})
    save_file(written.as_original(dict(network.state_dict())), home / "original.safetensors")
    torch.save(written.self_forcing(dict(network.state_dict())), home / "forcing.pt")
    torch.save(written.rcm(dict(network.state_dict())), home / "rcm.pt")
    comfy = written.prefixed(written.as_original(dict(network.state_dict())), "model.diffusion_model.")
    save_file(comfy, home / "comfy.safetensors")
    save_file(written.fp8_scaled(written.as_original(dict(network.state_dict()))), home / "fp8.safetensors")
    make_data(home / "data")
    return home


def write_recipe(home: Path, directory: Path, teacher: object = None, **sections: Any) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    recipe = make_recipe(Path(str(teacher or home / "wan")), home / "data", **sections)
    (directory / "test.yaml").write_text(dump(recipe))
    return directory / "test.yaml"


def run(verb: str, recipe: Path, *more: str) -> Path:
    """Run a verb; the directory of the runs of its recipe."""
    assert main([verb, "-r", str(recipe), "--runs", str(recipe.parent / "runs"), *more]) == 0
    return recipe.parent / "runs" / "test"


def weights(model: Path) -> dict[str, torch.Tensor]:
    (file,) = (model / "transformer").glob("*.safetensors")
    return load_file(file)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapter"])
def test_training_with_a_lora_file_equals_that_on_the_merged_model(
    home: Path, tmp_path: Path, lora: Any
) -> None:
    model = {"lora": lora}
    first = write_recipe(home, tmp_path / "a", model=model)
    given = run("train-flowmap", first, "--lora", f"{home}/style.safetensors:0.5")
    merged = run("train-flowmap", write_recipe(home, tmp_path / "b", home / "merged", model=model))
    plain = run("train-flowmap", write_recipe(home, tmp_path / "c", model=model))
    results = [weights(place / "train-flowmap" / "model") for place in (given, merged, plain)]
    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    recorded = read_lineage(given / "train-flowmap")
    assert recorded.base == f"{home}/wan+{home}/style.safetensors:0.5"


def test_a_run_continues_only_with_the_same_lora_file(home: Path, tmp_path: Path, capsys: Capture) -> None:
    style = tmp_path / "style.safetensors"
    shutil.copyfile(home / "style.safetensors", style)
    recipe = write_recipe(home, tmp_path / "a")
    place = run("train-flowmap", recipe, "--lora", str(style))
    checkpoint = place / "train-flowmap" / "checkpoints" / "step-000002"
    opened = open_model(str(checkpoint), make_recipe(home / "wan", home / "data")).network
    finished = load_network(place / "train-flowmap" / "model")
    assert same(dict(opened.state_dict()), dict(finished.state_dict()))
    run("train-flowmap", recipe, "--lora", str(style), "--steps", "3")
    capsys.readouterr()
    command = ["train-flowmap", "-r", str(recipe), "--runs", str(recipe.parent / "runs")]
    assert main([*command, "--lora", f"{style}:2"]) == 2
    assert "holds a run with another model.teacher" in capsys.readouterr().err
    changed = load_file(style)
    save_file({name: 2 * value for name, value in changed.items()}, style)
    assert main([*command, "--lora", str(style), "--steps", "4"]) == 2
    assert "holds a run from another teacher" in " ".join(capsys.readouterr().err.split())


def test_stage_2_has_the_merged_teacher_as_base_and_score(home: Path, tmp_path: Path) -> None:
    style = f"{home}/style.safetensors:0.5"
    recipe = write_recipe(home, tmp_path / "a", model={"lora": LORA})
    run("train-flowmap", recipe, "--lora", style)
    place = run("distill", recipe, "--lora", style)
    assert read_lineage(place / "distill").base == f"{home}/wan+{style}"
    other = write_recipe(home, tmp_path / "b", model={"lora": LORA})  # without the file, the base is another
    plain = run("distill", other, "--model", f"{place}/train-flowmap/model")
    assert read_lineage(plain / "distill").base == f"{place}/train-flowmap/model"


def test_fine_tuning_merges_into_the_model_it_starts_from(home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home, tmp_path / "a")
    start = run("train-flowmap", recipe) / "train-flowmap" / "model"
    style = f"{home}/style.safetensors:0.5"
    place = run("finetune", recipe, "--model", str(start), "--lora", style, "--data", str(home / "data"))
    recorded = read_lineage(place / "finetune")
    assert recorded.base == f"{start}+{style}"
    merged = LoraMerged.of(load_network(start), [LoraRequest(home / "style.safetensors", 0.5)])
    save_pipeline(tmp_path / "merged", merged, start, {})
    other = write_recipe(home, tmp_path / "b")
    again = run("finetune", other, "--model", str(tmp_path / "merged"), "--data", str(home / "data"))
    assert same(weights(place / "finetune" / "model"), weights(again / "finetune" / "model"))


def test_synthesis_samples_the_merged_teacher(home: Path, tmp_path: Path, capsys: Capture) -> None:
    section = {"count": 2, "steps": 2, "shard_size": 2}
    style = tmp_path / "style.safetensors"
    shutil.copyfile(home / "style.safetensors", style)
    given = write_recipe(home, tmp_path / "a", synthesize=section)
    merged = write_recipe(home, tmp_path / "b", home / "merged", synthesize=section)
    sets = [run("synthesize", given, "--lora", f"{style}:0.5"), run("synthesize", merged)]
    one, other = (LatentData(place / "data", 8).batch([0, 1]).latents for place in sets)
    assert torch.equal(one, other)
    (sets[0] / "data" / "manifest.json").unlink()
    save_file({name: -value for name, value in load_file(style).items()}, style)
    capsys.readouterr()
    command = ["synthesize", "-r", str(given), "--runs", str(given.parent / "runs"), "--lora", f"{style}:0.5"]
    assert main(command) == 2
    assert "transformer_files" in capsys.readouterr().err


def test_a_lora_file_that_does_not_fit_is_refused_by_a_dry_run(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    wrong = {"transformer.blocks.7.attn1.to_q.lora_A.weight": torch.zeros(2, HEAD_DIM)}
    wrong |= {"transformer.blocks.7.attn1.to_q.lora_B.weight": torch.zeros(HEAD_DIM, 2)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    recipe = write_recipe(home, tmp_path / "a", synthesize={"count": 1})
    for verb in ("train-flowmap", "distill", "synthesize"):
        given = [verb, "-r", str(recipe), "--runs", str(tmp_path / "r"), "--dry-run"]
        assert main([*given, "--lora", str(tmp_path / "wrong.safetensors")]) == 2
        assert "blocks.7.attn1.to_q.lora_A.weight" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["original.safetensors", "forcing.pt"])
def test_a_single_file_is_a_teacher(home: Path, tmp_path: Path, file: str) -> None:
    """Synthesis, both stages and the finished model equal those of the pipeline folder."""
    sections = {"synthesize": {"count": 2, "steps": 2, "shard_size": 2}}
    whole = write_recipe(home, tmp_path / "whole", **sections)
    parts = {"components": str(home / "wan")}
    single = write_recipe(home, tmp_path / "single", home / file, model=parts, **sections)
    places = [whole.parent / "runs" / "test", single.parent / "runs" / "test"]
    for recipe in (whole, single):
        run("synthesize", recipe)
        for verb in ("train-flowmap", "distill"):
            run(verb, recipe)
    data = [LatentData(place / "data", 8).batch([0, 1]) for place in places]
    assert torch.equal(data[0].latents, data[1].latents)
    for stage in ("train-flowmap", "distill"):
        assert same(*(weights(place / stage / "model") for place in places))
        assert (places[1] / stage / "model" / "text_encoder").is_dir()
    checkpoint = places[1] / "train-flowmap" / "checkpoints" / "step-000002"
    opened = open_model(str(checkpoint), make_recipe(home / file, home / "data"))
    assert opened.pipeline == home / "wan"
    assert main(["export", "--model", str(checkpoint), "--out", str(tmp_path / "exported")]) == 0
    assert same(weights(tmp_path / "exported"), weights(places[0] / "train-flowmap" / "model"))


@pytest.mark.parametrize("place", ["rcm.pt", "comfy.safetensors", "fp8.safetensors", "wan/transformer"])
def test_training_starts_from_every_layout(home: Path, tmp_path: Path, place: str) -> None:
    """Exact layouts as the pipeline folder does; quantized ones near it."""
    plain = run("train-flowmap", write_recipe(home, tmp_path / "whole"))
    parts = {"components": str(home / "wan")}
    single = run("train-flowmap", write_recipe(home, tmp_path / "single", home / place, model=parts))
    expected, found = (weights(runs / "train-flowmap" / "model") for runs in (plain, single))
    assert same(expected, found) is ("fp8" not in place)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.1, atol=0.1)


def test_a_single_file_without_its_parts_is_refused_with_the_key(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    recipe = write_recipe(home, tmp_path / "a", home / "original.safetensors")
    command = ["train-flowmap", "-r", str(recipe), "--runs", str(tmp_path / "r"), "--dry-run"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "has a transformer but no VAE, text encoder and tokenizer" in said
    assert "model.components" in said
    assert main([*command, "--set", f"model.components={home}/nowhere"]) == 2
    assert main([*command, "--set", f"model.components={home}/wan"]) == 0
    assert f"those of {home}/wan" in " ".join(capsys.readouterr().out.split())


def test_a_start_in_one_file_has_the_encoders_of_the_teacher(home: Path, tmp_path: Path) -> None:
    recipe = write_recipe(home, tmp_path / "a")
    model = run("train-flowmap", recipe) / "train-flowmap" / "model"
    file = tmp_path / "any-step.safetensors"
    assert main(["export", "--model", str(model), "--format", "merged", "--out", str(file)]) == 0
    given = ["--model", str(file), "--data", str(home / "data")]
    place = run("finetune", recipe, *given)
    recorded = json.loads((place / "finetune" / "lineage.json").read_text())
    assert (recorded["base"], recorded["components"]) == (str(file), str(home / "wan"))
    assert (place / "finetune" / "model" / "vae").is_dir()
