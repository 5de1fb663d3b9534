"""Every export format gives back the exported model, read by the library that the format is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from anyflow_cli.errors import UsageError
from anyflow_cli.export import (
    COMFYUI_LORA,
    COMFYUI_PREFIX,
    DIFFUSERS_LORA,
    Extraction,
    export_model,
    transplant_of,
    write_comfyui,
    write_merged,
)
from anyflow_cli.model.backbone import Backbone
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.layouts.names import TRANSFORMER_NAMES
from anyflow_cli.model.lora import LoraSize, MergedNetwork
from anyflow_cli.model.lora_formats import LoraMerged, LoraRequest
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.pipeline_io import load_adapter, load_network, save_pipeline
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.schema import LoraSection, ModelSection, Recipe
from anyflow_cli.runs import checkpoint
from anyflow_cli.runs.open import open_model
from tests.tiny_pipeline import make_wan_folder
from tests.train.stage import LORA, inputs_of, make_data, make_recipe, paths, train

SMALL = NetworkConfig(
    heads=2, head_dim=12, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
    two_time=True,
)  # fmt: skip


@pytest.fixture
def network() -> FlowMapTransformer:
    torch.manual_seed(0)
    return FlowMapTransformer(SMALL)


def test_the_converter_of_diffusers_reverses_the_original_names(network: FlowMapTransformer) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [name for name in network.state_dict() if "delta" not in name]
    original = {
        "model.diffusion_model." + TRANSFORMER_NAMES.to_original(name): torch.zeros(1) for name in names
    }
    assert sorted(convert_wan_transformer_to_diffusers(original)) == sorted(names)


def test_the_original_names_are_those_of_wan() -> None:
    assert TRANSFORMER_NAMES.to_original("blocks.11.attn2.to_out.0.bias") == "blocks.11.cross_attn.o.bias"
    assert TRANSFORMER_NAMES.to_original("blocks.0.attn1.norm_q.weight") == "blocks.0.self_attn.norm_q.weight"
    assert TRANSFORMER_NAMES.to_original("blocks.3.norm2.weight") == "blocks.3.norm3.weight"
    assert TRANSFORMER_NAMES.to_original("blocks.3.scale_shift_table") == "blocks.3.modulation"
    assert TRANSFORMER_NAMES.to_original("scale_shift_table") == "head.modulation"
    assert (
        TRANSFORMER_NAMES.to_original("condition_embedder.delta_embedder.linear_2.bias")
        == "delta_embedding.2.bias"
    )


def test_a_comfyui_file_has_every_weight_under_its_prefix(
    network: FlowMapTransformer, tmp_path: Path
) -> None:
    write_comfyui(tmp_path / "m.safetensors", network, {}, None)
    stored = load_file(tmp_path / "m.safetensors")
    expected = {COMFYUI_PREFIX + TRANSFORMER_NAMES.to_original(n): w for n, w in network.state_dict().items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in expected.items())


def test_the_metadata_of_a_merged_file_builds_the_diffusers_class(
    network: FlowMapTransformer, tmp_path: Path
) -> None:
    from diffusers import AnyFlowTransformer3DModel

    write_merged(tmp_path / "m.safetensors", network, {"recipe": "tiny"}, None)
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = file.metadata()
    other = AnyFlowTransformer3DModel.from_config(json.loads(metadata["config"]))
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    z, t, r, text = (
        torch.randn(2, 3, 4, 4, 4),
        torch.tensor([0.9, 0.4]),
        torch.tensor([0.5, 0.0]),
        torch.randn(2, 5, 8),
    )
    with torch.no_grad():
        times = {"timestep": 1000 * t[:, None].expand(2, 3), "r_timestep": 1000 * r[:, None].expand(2, 3)}
        theirs = other(z, **times, encoder_hidden_states=text, return_dict=False)[0]
        torch.testing.assert_close(network(z, t, r, text), theirs, rtol=1e-4, atol=1e-5)
    assert json.loads(metadata["lineage"]) == {"recipe": "tiny"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_are_stored_in_the_requested_dtype(
    network: FlowMapTransformer, tmp_path: Path, dtype: str
) -> None:
    write_merged(tmp_path / "m.safetensors", network, {}, dtype)
    kinds = {w.dtype for w in load_file(tmp_path / "m.safetensors").values()}
    assert kinds == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]}


# --- whole models, runs and their checkpoints


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("models") / "wan")


def recipe_for(wan: Path, lora: bool = False) -> Recipe:
    size = LoraSection(rank=4, alpha=8) if lora else None
    return Recipe(name="test", model=ModelSection(teacher=str(wan), lora=size, shift=3.0))


def make_run(folder: Path, wan: Path, lora: bool) -> FlowMapTransformer:
    """Write a training run with one checkpoint; returns the network with its EMA weights."""
    recipe = recipe_for(wan, lora)
    size = LoraSize(4, 8) if lora else None
    backbone = Backbone(two_time_from(load_network(wan)), lora=size)
    with torch.no_grad():
        for parameter in backbone.parameters_of("student"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    average = backbone.state_dict_of("student")
    weights = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    state = checkpoint.CheckpointState(
        7, {"student": weights, "ema": average}, {}, checkpoint.LoopState({}, 0)
    )
    checkpoint.save(folder / "checkpoints", state, keep=2)
    (folder / "recipe.yaml").write_text(dump(recipe))
    lineage = {
        "stage": "train_flowmap", "base": str(wan), "command": [], "recipe": recipe.name, "versions": {},
        "inputs": {}, "precision": "fp32", "processes": 1,
    }  # fmt: skip
    (folder / "lineage.json").write_text(json.dumps(lineage))
    return network_from(MergedNetwork(two_time_from(load_network(wan)), average, size))


def assert_same(network: FlowMapTransformer, other: FlowMapTransformer) -> None:
    ours, theirs = network.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_opens_with_the_ema_weights_of_its_run(wan: Path, tmp_path: Path, lora: bool) -> None:
    expected = make_run(tmp_path / "run", wan, lora)
    for address in ("run", "run/checkpoints/step-000007"):
        opened = open_model(str(tmp_path / address), recipe_for(wan))
        assert_same(opened.network, expected)
        assert opened.pipeline == wan
        assert opened.shift == 3.0
        assert opened.lineage["checkpoint"] == "step-000007"


def test_a_finished_run_opens_as_its_model(wan: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", wan, lora=False)
    model = two_time_from(load_network(wan))
    save_pipeline(tmp_path / "run" / "model", model, wan, {"steps": 9})
    opened = open_model(str(tmp_path / "run"), recipe_for(wan))
    assert opened.lineage == {"steps": 9}
    assert_same(opened.network, model)


def test_a_run_without_a_checkpoint_is_refused(wan: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump(recipe_for(wan)))
    with pytest.raises(UsageError, match="neither a finished model nor a checkpoint"):
        open_model(str(tmp_path), recipe_for(wan))


def test_an_incomplete_checkpoint_is_refused(wan: Path, tmp_path: Path) -> None:
    make_run(tmp_path, wan, lora=False)
    (tmp_path / "checkpoints" / "step-000007" / "COMPLETE").unlink()
    with pytest.raises(UsageError, match="not complete"):
        open_model(str(tmp_path / "checkpoints" / "step-000007"), recipe_for(wan))


def test_a_checkpoint_without_its_base_model_is_refused(wan: Path, tmp_path: Path) -> None:
    make_run(tmp_path, wan, lora=False)
    lineage = json.loads((tmp_path / "lineage.json").read_text()) | {"base": str(tmp_path / "gone")}
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(UsageError, match=r"was trained from \S+/gone, which does not exist"):
        open_model(str(tmp_path), recipe_for(wan))


def test_diffusers_opens_the_folder_of_an_exported_checkpoint(wan: Path, tmp_path: Path) -> None:
    from diffusers import AnyFlowPipeline

    expected = make_run(tmp_path / "run", wan, lora=True)
    made = export_model(str(tmp_path / "run"), recipe_for(wan), "diffusers", tmp_path / "out")
    pipeline = AnyFlowPipeline.from_pretrained(made)
    assert pipeline.scheduler.config.shift == 3.0
    assert_same(expected, pipeline.transformer)
    lineage = json.loads((made / "lineage.json").read_text())
    assert lineage["checkpoint"] == "step-000007"
    assert lineage["exported_from"] == str(tmp_path / "run")


def test_a_built_in_model_exports_as_a_complete_folder(wan: Path, tmp_path: Path) -> None:
    from diffusers import AnyFlowPipeline

    made = export_model("tiny-anyflow", recipe_for(wan), "diffusers", tmp_path / "out")
    assert AnyFlowPipeline.from_pretrained(made).vae.config.z_dim == 8


@pytest.mark.parametrize("place", ["run", "run/adapter of a finished run"])
def test_peft_merges_an_exported_adapter_to_the_trained_network(
    wan: Path, tmp_path: Path, place: str
) -> None:
    from diffusers import AnyFlowTransformer3DModel
    from peft import PeftModel

    expected = make_run(tmp_path / "run", wan, lora=True)
    recipe = recipe_for(wan)
    if place != "run":
        export_model(str(tmp_path / "run"), recipe, "adapter", tmp_path / "run" / "adapter")
        save_pipeline(tmp_path / "run" / "model", expected, wan, {})
    made = export_model(str(tmp_path / "run"), recipe, "adapter", tmp_path / "out")
    start = two_time_from(load_network(wan))
    base = AnyFlowTransformer3DModel.from_config(start.config.to_diffusers())
    base.load_state_dict(start.state_dict())
    merged = PeftModel.from_pretrained(base, made).merge_and_unload()
    assert_same(expected, merged)
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == str(wan)


def test_a_model_trained_without_lora_has_no_adapter(wan: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", wan, lora=False)
    for address in (tmp_path / "run", wan):
        with pytest.raises(UsageError, match="has no adapter"):
            export_model(str(address), recipe_for(wan), "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_keeps_the_dtype_of_its_weights(wan: Path, tmp_path: Path) -> None:
    recipe = recipe_for(wan)
    half = export_model(str(wan), recipe, "diffusers", tmp_path / "half", "bf16")
    kept = export_model(str(half), recipe, "merged", tmp_path / "kept.safetensors")
    assert {weight.dtype for weight in load_file(kept).values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["diffusers", "merged", "comfyui", "adapter"])
def test_existing_files_are_not_overwritten(wan: Path, tmp_path: Path, kind: str) -> None:
    for name in ("taken", "file.safetensors"):
        (tmp_path / name).write_text("mine")
    out = tmp_path / ("file.safetensors" if kind in ("merged", "comfyui") else "taken")
    with pytest.raises(UsageError, match="exists already"):
        export_model(str(wan), recipe_for(wan), kind, out)  # type: ignore[arg-type]
    assert out.read_text() == "mine"


@pytest.mark.parametrize("lora", ["null", "{rank: 4, alpha: 8}"], ids=["full", "lora"])
def test_the_last_checkpoint_of_a_run_equals_its_finished_model(
    wan: Path, tmp_path: Path, lora: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stages through their commands; with LoRA, the base of stage 2 is the teacher, not its start."""
    from anyflow_cli.cli import app

    recipe = tmp_path / "small.yaml"
    training = "steps: 1, global_batch: 2, preview_every: 0, tensorboard: false, ema: {decay: 0.5, start: 1}"
    recipe.write_text(
        f"model: {{teacher: {wan}, lora: {lora}, height: 32, width: 32, frames: 5, precision: fp32}}\n"
        "synthesize: {count: 2, batch_size: 2, steps: 1}\n"
        f"train_flowmap: {{{training}, optimizer: {{lr: 1e-2, warmup_steps: 0}}}}\n"
        f"distill: {{{training}}}\n"
    )
    given = ["-r", str(recipe), "--runs", str(tmp_path)]
    for command in ("synthesize", "train-flowmap", "distill"):
        assert app.main([command, *given]) == 0, capsys.readouterr().err
    for stage in ("train-flowmap", "distill"):
        run = tmp_path / "small" / stage
        finished = open_model(str(run), recipe_for(wan)).network
        assert_same(finished, open_model(str(run / "checkpoints" / "step-000001"), recipe_for(wan)).network)


def test_adapters_trained_in_bf16_leave_the_base_as_it_was_read(wan: Path, tmp_path: Path) -> None:
    """The base computes in bf16; the finished model and every export hold it as stored, in fp32."""
    data = make_data(tmp_path / "data")
    recipe = make_recipe(wan, data, model={"lora": LORA, "precision": "bf16"})
    finished = train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
    assert finished.adapter is not None
    run = finished.model.parent
    start = two_time_from(load_network(wan))
    stored, adapter = load_network(finished.model, None).state_dict(), load_adapter(finished.adapter)
    assert_same(
        load_network(finished.model, None), network_from(MergedNetwork(start, adapter.weights, adapter.size))
    )
    changed = {name for name, value in start.state_dict().items() if not torch.equal(stored[name], value)}
    assert changed == {name.replace(".lora_B", "") for name in adapter.weights if ".lora_B" in name}
    for address in (run / "model", run / "checkpoints" / "step-000002"):
        made = export_model(str(address), recipe, "merged", tmp_path / f"{address.name}.safetensors")
        exported = load_file(made)
        assert all(torch.equal(exported[name], value) for name, value in stored.items())


# --- adapters for other loaders


def test_diffusers_loads_an_adapter_at_its_strength(wan: Path, tmp_path: Path) -> None:
    from diffusers import AnyFlowPipeline

    expected = make_run(tmp_path / "run", wan, lora=True)
    run, recipe = str(tmp_path / "run"), recipe_for(wan)
    made = export_model(run, recipe, "adapter", tmp_path / "out")
    base = transplant_of(f"{wan}:0", run, None)  # with a second time embedder, and nothing of the run
    pipeline = AnyFlowPipeline.from_pretrained(
        export_model(run, recipe, "diffusers", tmp_path / "start", onto=base)
    )
    pipeline.load_lora_weights(made)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours = expected.state_dict()
    for name, weight in pipeline.transformer.state_dict().items():
        torch.testing.assert_close(weight, ours[name], rtol=1e-4, atol=1e-5)


def test_an_exported_adapter_is_a_lora_that_merges_to_the_trained_network(wan: Path, tmp_path: Path) -> None:
    expected = make_run(tmp_path / "run", wan, lora=True)
    made = export_model(str(tmp_path / "run"), recipe_for(wan), "adapter", tmp_path / "out")
    for file in (DIFFUSERS_LORA, COMFYUI_LORA, "adapter_model.safetensors"):
        network = two_time_from(load_network(wan))
        network = network_from(LoraMerged.of(network, [LoraRequest(made / file)]))
        for name, weight in expected.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


def test_a_lora_is_extracted_from_full_weights(
    wan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = make_run(tmp_path / "run", wan, lora=True)
    save_pipeline(tmp_path / "full", expected, wan, {})
    for rank, exact in ((4, True), (2, False)):
        caplog.clear()
        with caplog.at_level("INFO", logger="anyflow_cli.export"):
            made = export_model(
                str(tmp_path / "full"), recipe_for(wan), "adapter", tmp_path / str(rank),
                extraction=Extraction(str(wan), rank),
            )  # fmt: skip
        assert ("misses 0.0 %" in caplog.text) == exact
        network = two_time_from(load_network(wan))
        network = network_from(LoraMerged.of(network, [LoraRequest(made / DIFFUSERS_LORA)]))
        errors = [(network.state_dict()[n] - w).abs().max() for n, w in expected.state_dict().items()]
        assert bool(max(errors) < 1e-4) == exact
    with pytest.raises(UsageError, match="nothing to extract"):
        export_model(str(wan), recipe_for(wan), "adapter", tmp_path / "x", extraction=Extraction(str(wan), 4))
