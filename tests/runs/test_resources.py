"""What each command starts from: found where it is, named with its source where it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anyflow_cli.data.shards import Manifest
from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import (
    DataSection,
    DistillSection,
    FinetuneSection,
    ModelSection,
    Recipe,
    SynthesizeSection,
)
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.runs.resources import Given, find_model, inputs, is_ready, require_inputs
from tests.tiny_pipeline import make_ti2v_folder, make_wan_folder

SAME_FAMILY = "use the text-to-video model of the same family"
MANIFEST = """{
  "version": 1, "shards": [], "latent_shape": [2, 16, 4, 4], "count": 0, "samples": 0
}"""


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return RunPaths(tmp_path / "runs", "t")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("models") / "wan")


def put(folder: Path, place: Path) -> Path:
    """Put a usable model at the place where a command would leave it."""
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    return place


def states(recipe: Recipe, paths: RunPaths, command: str, given: Given = Given()) -> dict[str, str]:  # noqa: B008
    return {one.name: one.state for one in inputs(recipe, paths, command, given)}


def test_stage_1_needs_a_data_set_and_names_the_command_that_makes_it(paths: RunPaths) -> None:
    recipe = Recipe(name="t")
    assert states(recipe, paths, "train-flowmap") == {"data set": "missing", "teacher": "ready"}
    data = inputs(recipe, paths, "train-flowmap")[0]
    assert str(data) == f"{paths.data}: missing; run `anyflow synthesize -r t`"
    with pytest.raises(UsageError, match=f"^There is no data set at {paths.data}\\.$") as error:
        require_inputs([data])
    assert error.value.hint == "Run `anyflow synthesize -r t`."


def test_a_data_set_that_was_interrupted_is_still_missing(paths: RunPaths) -> None:
    paths.data.mkdir(parents=True)
    (paths.data / "provenance.json").write_text("{}")
    data = inputs(Recipe(name="t"), paths, "train-flowmap")[0]
    assert (data.state, data.how_to_get_it) == ("missing", "run `anyflow synthesize -r t` to complete it")


def test_a_damaged_manifest_is_unusable(paths: RunPaths) -> None:
    paths.data.mkdir(parents=True)
    (paths.data / "manifest.json").write_text("{")
    data = inputs(Recipe(name="t"), paths, "train-flowmap")[0]
    assert data.state == "unusable"
    assert "manifest.json is damaged" in data.problem


@pytest.mark.parametrize("kind", ["teacher", "videos"])
def test_clips_have_no_noise_to_train_pairs_on(
    paths: RunPaths, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 needs it only where its joint loss does."""
    paths.data.mkdir(parents=True)
    (paths.data / "manifest.json").touch()
    manifest = Manifest(1, (), (21, 16, 60, 104), 4096, {"kind": kind})
    monkeypatch.setattr("anyflow_cli.runs.resources.read_manifest", lambda address: manifest)
    pairs, plain = ({"flow_map": {"noise": noise}} for noise in ("paired", "fresh"))
    wanted = "ready" if kind == "teacher" else "unusable"
    for stage, other, command in (
        (pairs, plain, "train-flowmap"), ({"objective": "consistency-ode"}, plain, "train-flowmap"),
        (plain, pairs, "distill"),
    ):  # fmt: skip
        recipe = Recipe.model_validate({"name": "t", "train_flowmap": stage, "distill": other})
        assert inputs(recipe, paths, command)[0].state == wanted
    recipe = Recipe.model_validate({"name": "t", "train_flowmap": pairs, "distill": plain})
    assert inputs(recipe, paths, "distill")[0].state == "ready"


def test_stage_2_names_everything_that_is_missing_at_once(paths: RunPaths, folder: Path) -> None:
    recipe = Recipe(name="t")
    found = inputs(recipe, paths, "distill")
    assert states(recipe, paths, "distill")["stage-1 model"] == "missing"
    with pytest.raises(UsageError) as error:
        require_inputs(found)
    assert error.value.message.count("There is no") == 2
    assert error.value.hint == "Run `anyflow synthesize -r t`, then run `anyflow train-flowmap -r t`."
    put(folder, paths.stage_1() / "model")
    assert states(recipe, paths, "distill")["stage-1 model"] == "ready"


def test_the_tuned_teacher_is_optional(paths: RunPaths, folder: Path) -> None:
    recipe = Recipe(name="t")
    assert states(recipe, paths, "distill")["tuned teacher"] == "optional"
    put(folder, paths.stage_1("flow-matching") / "model")
    assert states(recipe, paths, "distill")["tuned teacher"] == "ready"


def test_consistency_distillation_starts_from_its_own_stage_1(paths: RunPaths, folder: Path) -> None:
    recipe = Recipe(name="t", distill=DistillSection(simulation="consistency"))
    places = {one.name: one.place for one in inputs(recipe, paths, "distill")}
    assert places["stage-1 model"] == str(paths.stage_1() / "model")
    ode = put(folder, paths.stage_1("consistency-ode") / "model")
    places = {one.name: one.place for one in inputs(recipe, paths, "distill")}
    assert places["stage-1 model"] == str(ode)


def test_a_named_model_that_does_not_exist_is_unusable_even_for_a_dry_run(paths: RunPaths) -> None:
    recipe = Recipe(name="t", distill=DistillSection(init_from="./nowhere", real_score="some/model"))
    found = states(recipe, paths, "distill")
    assert (found["stage-1 model"], found["tuned teacher"]) == ("unusable", "to download")


def test_synthesis_needs_prompts_and_its_own_teacher(paths: RunPaths, tmp_path: Path) -> None:
    recipe = Recipe(name="t", data=DataSection(prompts="p.txt"), synthesize=SynthesizeSection(teacher="a/b"))
    assert states(recipe, paths, "synthesize") == {"prompt file": "missing", "teacher": "to download"}
    (tmp_path / "p.txt").touch()
    assert states(recipe, paths, "synthesize")["prompt file"] == "ready"
    assert states(Recipe(name="t"), paths, "synthesize") == {"teacher": "ready"}


def test_encoding_videos_needs_their_directory(paths: RunPaths, tmp_path: Path) -> None:
    given = Given(data=tmp_path / "clips")
    assert states(Recipe(name="t"), paths, "synthesize", given)["videos"] == "unusable"
    (tmp_path / "clips").mkdir()
    assert states(Recipe(name="t"), paths, "synthesize", given)["videos"] == "ready"


def test_finetune_needs_videos_or_a_world(paths: RunPaths) -> None:
    model = ModelSection(pretrained_any_step="tiny-anyflow")
    found = inputs(Recipe(name="t", model=model), paths, "finetune")
    assert [one.state for one in found] == ["ready", "missing", "ready"]
    with pytest.raises(UsageError, match=r"^finetune needs videos\.$"):
        require_inputs(found)
    world = Recipe(name="t", model=model, finetune=FinetuneSection(world="shapes-shifted"))
    assert is_ready(inputs(world, paths, "finetune"))


@pytest.mark.parametrize(
    ("objective", "simulation", "stage_1"),
    [("flow-map", "flow-map", "train-flowmap"), ("flow-matching", "flow-map", "train-flowmap"),
     ("consistency-ode", "consistency", "consistency-ode")],
)  # fmt: skip
def test_the_given_model_comes_before_a_trained_one_before_the_pretrained_one(
    paths: RunPaths, folder: Path, objective: str, simulation: str, stage_1: str
) -> None:
    recipe = Recipe.model_validate({
        "name": "t", "model": {"teacher": str(folder), "pretrained_any_step": "tiny-anyflow"},
        "train_flowmap": {"objective": objective}, "distill": {"simulation": simulation},
    })  # fmt: skip
    assert find_model(recipe, paths, None).address == "tiny-anyflow"
    for run in (paths.home / stage_1, paths.stage_2(simulation)):
        assert find_model(recipe, paths, None).address != str(run / "model")
        put(folder, run / "model")
        assert find_model(recipe, paths, None).address == str(run / "model")
    assert find_model(recipe, paths, "mine").address == "mine"
    assert find_model(recipe, paths, None, teacher=True).address == str(folder)


def test_without_any_model_the_way_to_one_is_named(paths: RunPaths) -> None:
    with pytest.raises(
        UsageError, match=f"^There is no any-step model at {paths.stage_1() / 'model'}"
    ) as error:
        require_inputs(inputs(Recipe(name="t"), paths, "sample"))
    assert error.value.hint == "Run `anyflow train-flowmap -r t`, or name a model with --model."


@pytest.mark.parametrize("command", ["sample", "evaluate", "finetune", "export"])
@pytest.mark.parametrize(
    ("recipe", "address", "size"),
    [
        ("bidirectional1b", "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", 26),
        ("bidirectional14b", "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", 52),
        ("causal1b", "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", 26),
        ("causal14b", "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers", 52),
    ],
)
def test_large_recipes_use_the_published_models_and_say_their_terms(
    command: str, recipe: str, address: str, size: int, paths: RunPaths
) -> None:
    model = inputs(load_recipe(recipe), paths, command)[0]
    assert (model.place, model.state) == (address, "to download")
    for words in (f"{size} GB", "non-commercial", f"hf download {address}"):
        assert words in model.how_to_get_it
    assert "non-commercial" in find_model(load_recipe(recipe), paths, None).why


def test_with_the_hub_off_an_uncached_model_is_missing(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert states(Recipe(name="t", model=ModelSection(teacher="a/b")), paths, "train-flowmap")["teacher"] == (
        "missing"
    )


def test_other_commands_start_from_nothing(paths: RunPaths) -> None:
    assert inputs(Recipe(name="t"), paths, "doctor") == []


@pytest.mark.parametrize(
    ("part", "content"), [("text_encoder", b"version https://git-lfs.github.com/spec/v1"), ("vae", b"")]
)
def test_a_folder_with_a_cut_or_stand_in_file_is_unusable(
    paths: RunPaths, folder: Path, tmp_path: Path, part: str, content: bytes
) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    weights = next((broken / part).glob("*.safetensors"))
    weights.unlink()
    weights.write_bytes(content)
    teacher = inputs(Recipe(name="t", model=ModelSection(teacher=str(broken))), paths, "synthesize")[0]
    assert teacher.state == "unusable"
    assert weights.name in teacher.problem


def test_an_adapter_is_not_a_model(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    model = inputs(Recipe(name="t"), paths, "sample", Given(str(tmp_path / "adapter")))[0]
    assert model.state == "unusable"
    assert "is a LoRA adapter, not a model" in model.problem
    assert "name the model beside it" in model.how_to_get_it


@pytest.mark.parametrize(
    ("name", "content", "problem", "instead"),
    [
        ("a.gguf", b"GGUF", "is a GGUF file", "use the same model as safetensors"),
        ("vace.safetensors", ["vace_blocks.0.before_proj.weight"], "is a Wan VACE model", SAME_FAMILY),
        ("b.safetensors", ["blocks.0.self_attn.q.lora_down.weight"], "pass it with --lora", "name a file of"),
        ("config.json", b'{"_class_name": "WanVACETransformer3DModel"}', "a Wan VACE model", SAME_FAMILY),
        ("config.json", b'{"_class_name": "WanAnimateTransformer3DModel"}', "Wan Animate", SAME_FAMILY),
    ],
)
def test_another_model_is_refused_with_what_to_use_instead(
    paths: RunPaths, tmp_path: Path, name: str, content: bytes | list[str], problem: str, instead: str
) -> None:
    place = tmp_path / name
    if isinstance(content, bytes):
        place.write_bytes(content)
        save_file({}, tmp_path / "diffusion_pytorch_model.safetensors")
    else:
        save_file({key: torch.zeros(1) for key in content}, place)
    address = tmp_path if name == "config.json" else place
    model = inputs(Recipe(name="t"), paths, "sample", Given(str(address)))[0]
    assert model.state == "unusable"
    assert problem in model.problem
    assert instead in model.how_to_get_it


def test_a_vae_of_other_latents_is_refused_before_anything_loads(paths: RunPaths, tmp_path: Path) -> None:
    ti2v = make_ti2v_folder(tmp_path / "ti2v", in_channels=12, out_channels=12)
    recipe = Recipe(name="t", model=ModelSection(vae_scale=16))
    model = inputs(recipe, paths, "sample", Given(str(ti2v / "transformer")))[0]
    assert (model.state, model.problem) == (
        "unusable",
        "The model makes latents of 12 channels; the VAE has 8.",
    )
    make_ti2v_folder(tmp_path / "whole")
    other = inputs(Recipe(name="t"), paths, "sample", Given(str(tmp_path / "whole")))[0]
    assert (other.state, other.how_to_get_it.split(",")[0]) == ("unusable", "set model.vae_scale to 16")
    assert states(recipe, paths, "sample", Given(str(tmp_path / "whole")))["any-step model"] == "ready"


def test_a_lora_for_one_of_two_experts_is_refused_for_one_network(paths: RunPaths, tmp_path: Path) -> None:
    save_file({"diffusion_model.blocks.0.self_attn.q.diff_b": torch.zeros(256)}, tmp_path / "a.safetensors")
    address = f"tiny+high={tmp_path / 'a.safetensors'}"
    model = inputs(Recipe(name="t"), paths, "sample", Given(address))[0]
    assert "is given for the high-noise expert, and the model is one network" in model.problem


@pytest.mark.parametrize("command", ["synthesize", "finetune", "sample", "evaluate"])
def test_a_broken_ffmpeg_stops_every_command_that_needs_it_before_a_model_is_opened(
    paths: RunPaths, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe("tiny", ["synthesize.previews=true"])
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    with pytest.raises(UsageError, match="ffmpeg does not work") as error:
        require_inputs(inputs(recipe, paths, command))
    assert "IMAGEIO_FFMPEG_EXE" in str(error.value.hint)
    assert "ffmpeg" not in states(recipe, paths, "train-flowmap")
