"""The shipped large recipes: the paper's numbers, every line with its source, as docs/recipes.md has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from anyflow_cli.cli.app import main
from anyflow_cli.plan.estimate import advise_stage, plan_stage, target_of
from anyflow_cli.plan.hardware import parse_hardware
from anyflow_cli.recipe.compare import differing_keys, flat
from anyflow_cli.recipe.load import find_recipe, load_recipe

LARGE = ("bidirectional1b", "bidirectional14b")
CAUSAL = ("causal1b", "causal14b")
DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
SOURCES = ("sec.", "Table", "Fig.", "Eq.", "Alg.", "release", "Wan", "ours", "AdamW")

PAPER = {  # sec. 5.1: key, 1.3B, 14B
    "model.teacher": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    "model.lora.rank": (256, 256),
    "model.frames": (81, 81),
    "model.height": (480, 480),
    "model.width": (832, 832),
    "synthesize.count": (256_000, 256_000),
    "train_flowmap.optimizer.lr": (5e-5, 5e-5),
    "train_flowmap.global_batch": (32, 16),
    "train_flowmap.steps": (6000, 4000),
    "distill.optimizer.lr": (2e-6, 2e-6),
    "distill.steps": (800, 800),
    "distill.joint": (True, True),
}


CAUSAL_HEAD = "## The causal models"


def documented() -> list[tuple[str, str, str]]:
    """Key and both values of every row of the tables of recipes."""
    told = DOCS.read_text("utf-8").partition(CAUSAL_HEAD)[0]
    rows = re.findall(r"^\| `([a-z_.]+)` \|[^|]*\| `([^|]*)` \| `([^|]*)` \|", told, re.M)
    assert len(rows) > 50
    return [(key, *values) for key, *values in rows]


@pytest.mark.parametrize("number", [0, 1])
def test_the_papers_numbers(number: int) -> None:
    recipe = flat(load_recipe(LARGE[number]))
    assert {key: recipe[key] for key in PAPER} == {key: values[number] for key, values in PAPER.items()}


def test_both_are_made_by_the_14b_teacher() -> None:
    made = [load_recipe(name) for name in LARGE]
    assert {recipe.synthesize.teacher or recipe.model.teacher for recipe in made} == {
        "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    }


@pytest.mark.parametrize("number", [0, 1])
def test_the_documented_values_are_the_recipes(number: int) -> None:
    recipe = flat(load_recipe(LARGE[number]))
    for key, *values in documented():
        told = values[number]
        value = recipe[key]
        if key == "model.negative_prompt":
            assert value.startswith("色调艳丽，过曝")
            assert value.endswith("背景人很多，倒着走")
        elif isinstance(value, str):
            assert told == value
        else:
            assert json.loads(told) == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("number", [0, 1])
def test_a_causal_recipe_is_its_sibling_but_for_what_is_documented(number: int) -> None:
    told = DOCS.read_text("utf-8").partition(CAUSAL_HEAD)[2]
    rows = re.findall(r"^\| `([a-z_.]+)` \|[^|]*\| `([^|]*)` \|", told, re.M)
    recipe, sibling = load_recipe(CAUSAL[number]), load_recipe(LARGE[number])
    different = [key for key in differing_keys(recipe, sibling) if key not in ("name", "description")]
    assert {key for key, _ in rows} | {"model.causal"} == set(different)
    for key, value in rows:
        found = flat(recipe)[key]
        if key == "model.pretrained_any_step":
            assert found.startswith(value.removesuffix("..."))
            continue
        assert json.loads(value) == (list(found) if isinstance(found, tuple) else found)


@pytest.mark.parametrize("verb", ["synthesize", "train-flowmap", "distill"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_dry_run_says_what_is_needed_where_nothing_is(
    name: str, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat")
    assert main([verb, "-r", name, "--dry-run", "--json"]) == 0
    told = str(json.loads(capsys.readouterr().out))
    size = name.removeprefix("causal").replace("1b", "1.3B").replace("14b", "14B")
    teacher = "14B" if verb == "synthesize" else size
    assert f"Wan-AI/Wan2.1-T2V-{teacher}-Diffusers" in told
    assert verb == "synthesize" or f"anyflow synthesize -r {name}" in told


@pytest.mark.parametrize("name", [*LARGE, *CAUSAL])
def test_every_line_names_its_source(name: str) -> None:
    """Aligned, and one of the known kinds; sections, text that goes on and what a line above covers aside."""
    path, _ = find_recipe(name)
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    marked = [line for line in lines if " # " in line]
    bare = [line for line in lines if ":" in line and " # " not in line]
    assert all(line.index(" # ") == max(51, len(line.partition(" #")[0].rstrip())) for line in marked)
    assert all(any(source in line.split(" # ")[1] for source in SOURCES) for line in marked)
    sections = r"^( *)(\w+:( &flow_map)?|flow_map: \*flow_map|(extends|description): .*)$"
    assert [line for line in bare if not re.match(sections, line)] == []


@pytest.mark.parametrize("name", LARGE)
def test_synthesis_resolves_where_nothing_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    assert main(["synthesize", "-r", name, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["videos"], found["shards"]) == (256_000, 1000)
    assert found["teacher"] == "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gpus", "fits"),
    [
        ("bidirectional1b", "8x80GB", {"synthesize", "tune", "train-flowmap", "distill", "sample"}),
        ("bidirectional14b", "8x80GB", {"synthesize", "tune", "train-flowmap", "distill", "sample"}),
        ("causal1b", "8x80GB", {"synthesize", "tune", "train-flowmap", "distill", "sample"}),
        ("causal14b", "8x80GB", {"synthesize", "tune", "train-flowmap", "distill", "sample"}),
    ],
)
def test_they_fit_where_the_docs_say_so(name: str, gpus: str, fits: set[str]) -> None:
    target = target_of(load_recipe(name), parse_hardware(gpus))
    every = ("synthesize", "tune", "train-flowmap", "distill", "sample")
    found = {stage: plan_stage(target, stage) for stage in every}
    assert {stage for stage in every if found[stage].peak.total <= target.hardware.usable} == fits
    assert all(advise_stage(target, stage).fits for stage in set(every) - fits)
