"""The change of a trained model added to another base; models of two experts exported in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.export import Transplant, transplant_of, transplanted
from anyflow_cli.flow.condition import Condition
from anyflow_cli.inspection import inspect_address
from anyflow_cli.model.config import Conditioning
from anyflow_cli.model.experts import bind, each_expert, network_from
from anyflow_cli.model.lora_formats import expert_of_name
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.model.weights_io import LazyWeight, WeightSource
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.open import open_model
from tests.model.helpers import distance
from tests.tiny_pipeline import CHANNELS, TEXT_DIM, make_expert_folder, make_wan_folder

Make = Callable[..., Path]
RECIPE = load_recipe("tiny")


class Models:
    """A base, what was distilled from it, and a fine-tune of the base."""

    def __init__(self, directory: Path, make: Make, conditioning: Conditioning = "interpolate") -> None:
        self.base, self.other = make(directory / "base", 0), make(directory / "other", 1)
        self.distilled, self.conditioning = directory / "distilled", conditioning
        network = self.flow_map(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_pipeline(self.distilled, network, self.base, {"base": str(self.base)})

    def flow_map(self, path: Path) -> FlowMapTransformer:
        """A base as an any-step model that was not trained."""
        return each_expert(load_network(path), lambda one: two_time_from(one, conditioning=self.conditioning))

    def transplant(self, onto: Path, strength: float) -> FlowMapTransformer:
        given = Transplant(str(self.base), str(onto), strength)
        return network_from(transplanted(str(self.distilled), given, RECIPE)[0])

    def weights(self, onto: Path, strength: float) -> dict[str, Tensor]:
        return self.transplant(onto, strength).state_dict()


@pytest.fixture(scope="module", params=[make_wan_folder, make_expert_folder], ids=["one", "two"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"), request.param)


def same(weights: dict[str, Tensor], others: dict[str, Tensor], rounding: float = 1e-5) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=rounding, atol=rounding / 10, msg=name)


def test_strength_0_is_the_other_base(models: Models) -> None:
    same(models.weights(models.other, 0.0), models.flow_map(models.other).state_dict(), rounding=0)


def test_strength_1_onto_its_own_base_is_the_distilled_model(models: Models) -> None:
    same(models.weights(models.base, 1.0), load_network(models.distilled).state_dict(), rounding=0)


def velocity(network: FlowMapTransformer, r: float) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    z, text = torch.randn(2, 3, CHANNELS, 4, 4, generator=draw), torch.randn(2, 5, TEXT_DIM, generator=draw)
    t = torch.tensor([0.9, 0.6])
    with torch.no_grad():
        return bind(network, Condition(text))(z, t, r * t)


@pytest.mark.parametrize("conditioning", ["interpolate", "zero-init"])
def test_a_transplant_is_a_flow_map_of_the_other_base(tmp_path: Path, conditioning: Conditioning) -> None:
    models = Models(tmp_path, make_wan_folder, conditioning)
    own, distilled = models.transplant(models.base, 1.0), load_network(models.distilled)
    for r in (1.0, 0.5, 0.0):
        assert torch.equal(velocity(own, r), velocity(distilled, r))
    untrained, other = models.transplant(models.other, 0.0), load_network(models.other)
    assert distance(velocity(untrained, 1.0), velocity(other, 1.0)) < 1e-6
    half, wanted = models.transplant(models.other, 0.5).state_dict(), untrained.state_dict()
    trained, start = distilled.state_dict(), models.transplant(models.base, 0.0).state_dict()
    same(half, {name: wanted[name] + 0.5 * (trained[name] - start[name]) for name in half})


def test_bases_that_condition_on_the_second_time_in_another_way_are_refused(
    models: Models, tmp_path: Path
) -> None:
    network = each_expert(load_network(models.other), lambda one: two_time_from(one, 0.75))
    other = save_pipeline(tmp_path / "other", network, models.other, {})
    with pytest.raises(UsageError, match=r"second time in two ways .*0\.25.*0\.75"):
        models.weights(other, 1.0)
    same(models.weights(models.distilled, 0.0), load_network(models.distilled).state_dict(), rounding=0)


def test_half_of_the_change_is_added_to_every_weight(models: Models) -> None:
    trained, start, other = (
        load_network(models.distilled).state_dict(), models.flow_map(models.base).state_dict(),
        models.flow_map(models.other).state_dict(),
    )  # fmt: skip
    wanted = {name: other[name] + 0.5 * (trained[name] - start[name]) for name in trained}
    same(models.weights(models.other, 0.5), wanted)


def test_a_weight_is_read_when_it_is_written_and_not_before(models: Models) -> None:
    """Never two whole models: of each model one weight at a time."""
    reads: list[str] = []

    class Watched:
        def __init__(self, source: WeightSource) -> None:
            self.source, self.config = source, source.config

        def lazy_weights(self) -> dict[str, LazyWeight]:
            return {name: self._watched(name, one) for name, one in self.source.lazy_weights().items()}

        def _watched(self, name: str, weight: LazyWeight) -> LazyWeight:
            def load() -> Tensor:
                reads.append(name)
                return weight.load()

            return LazyWeight(weight.shape, weight.dtype, load)

    given = Transplant(str(models.base), str(models.other), 1.0)
    source, _ = transplanted(str(models.distilled), given, RECIPE)
    watched = replace(
        source,
        distilled=Watched(source.distilled),
        base=Watched(source.base),
        other=Watched(source.other),
    )
    weights = watched.lazy_weights()
    assert not reads
    name = next(name for name in weights if name.endswith("proj_out.weight"))
    weights[name].load()
    assert reads == [name] * 3


@pytest.mark.parametrize("change", [{"ffn_dim": 96}, {"num_layers": 1}, {"num_layers": 3}])
def test_a_base_of_other_shapes_is_refused_by_name(
    models: Models, change: dict[str, Any], tmp_path: Path
) -> None:
    other = make_wan_folder(tmp_path / "larger", **change)
    if (models.base / "transformer_2").exists():
        other = make_expert_folder(tmp_path / "pair", **change)
    with pytest.raises(UsageError) as caught:
        models.weights(other, 1.0)
    assert str(other) in caught.value.message
    assert "blocks." in caught.value.message


def test_one_network_is_not_a_base_of_two_experts(models: Models, tmp_path: Path) -> None:
    is_pair = (models.base / "transformer_2").exists()
    other = (make_wan_folder if is_pair else make_expert_folder)(tmp_path / "other")
    with pytest.raises(UsageError, match="boundary"):
        models.weights(other, 1.0)


@pytest.mark.parametrize(
    ("text", "wanted"), [("other", 1.0), ("other:0.7", 0.7), ("other:-1", -1.0), ("other:.5", 0.5)]
)
def test_the_strength_follows_the_address(models: Models, text: str, wanted: float) -> None:
    found = transplant_of(text, str(models.distilled), None)
    assert found == Transplant(str(models.base), "other", wanted)


def test_a_model_without_lineage_needs_its_base(models: Models) -> None:
    with pytest.raises(UsageError, match="do not tell"):
        transplant_of("other", str(models.other), None)


# --- from the command line


def test_export_writes_the_transplant(
    models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", "--model", str(models.distilled), "--transplant", f"{models.other}:0.5"]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(command) == 0
    same(load_network(tmp_path / "out").state_dict(), models.weights(models.other, 0.5))
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["transplant"]["strength"] == 0.5
    is_pair = (models.base / "transformer_2").exists()
    said = "Diffusers has no pipeline for two any-step experts"
    assert (said in " ".join(capsys.readouterr().err.split())) == is_pair


@pytest.mark.parametrize("kind", ["diffusers", "merged", "comfyui"])
def test_every_format_opens_again_as_the_same_model(models: Models, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", "--model", str(models.distilled), "--format", kind, "--out", str(out)]) == 0
    address = str(out)
    if kind != "diffusers":
        address = f"{out}/model.safetensors"
        if (models.base / "transformer_2").exists():
            address = f"{out}/high_noise.safetensors,{out}/low_noise.safetensors"
            with safe_open(out / "low_noise.safetensors", framework="pt") as file:
                assert json.loads(file.metadata()["lineage"])["boundary"] == 0.875
    same(open_model(address, RECIPE).network.state_dict(), load_network(models.distilled).state_dict())


def test_a_file_for_two_experts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = make_expert_folder(tmp_path / "pair")
    out = tmp_path / "one.safetensors"
    assert main(["export", "--model", str(pair), "--format", "merged", "--out", str(out)]) == 2
    assert "two files" in capsys.readouterr().err
    assert not out.exists()


def test_inspect_describes_two_experts(tmp_path: Path) -> None:
    pair = make_expert_folder(tmp_path / "pair")
    facts = inspect_address(str(pair))
    assert facts["experts"] == "2, which meet at t = 0.875"
    assert facts["parameters"] == sum(p.numel() for p in load_network(pair).parameters())
    facts = inspect_address(f"{pair}/transformer,{pair}/transformer_2@0.9")
    assert (facts["kind"], facts["experts"]) == ("two experts in two places", "2, which meet at t = 0.9")


# --- LoRA files for two experts


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("wan2.2_i2v_A14b_high_noise_lora_rank64.safetensors", "high"), ("MyStyle-LOW.safetensors", "low"),
        ("Wan2.2-Lightning/low_noise_model.safetensors", "low"), ("HighNoise.safetensors", "high"),
        ("style_low_rank.safetensors", None), ("highland.safetensors", None), ("slow.safetensors", None),
        ("high_and_low.safetensors", None), ("adapter/high/adapter_model.safetensors", "high"),
    ],
)  # fmt: skip
def test_the_name_of_a_file_says_its_expert(path: str, wanted: str | None) -> None:
    assert expert_of_name(Path(path)) == wanted


@pytest.mark.parametrize(
    ("given", "changed"),
    [("style_high_noise", {"high"}), ("style_low_noise", {"low"}), ("style", {"high", "low"}),
     ("high=style", {"high"}), ("low=style_high_noise", {"low"})],
)  # fmt: skip
def test_a_lora_file_changes_its_expert_alone(given: str, changed: set[str], tmp_path: Path) -> None:
    folder = make_expert_folder(tmp_path / "pair")
    expert, _, name = given.rpartition("=")
    file, layer = tmp_path / f"{name}.safetensors", "blocks.0.attn1.to_q"
    a, b = torch.randn(4, 32), torch.randn(32, 4)
    save_file({f"transformer.{layer}.lora_A.weight": a, f"transformer.{layer}.lora_B.weight": b}, file)
    address = f"{folder}+{expert + '=' if expert else ''}{file}:0.5"
    network, start = open_model(address, RECIPE).network.state_dict(), load_network(folder).state_dict()
    for name in ("high", "low"):
        wanted = start[f"{name}.{layer}.weight"] + (0.5 * (b @ a) if name in changed else 0)
        torch.testing.assert_close(network[f"{name}.{layer}.weight"], wanted)


def test_an_expert_cannot_be_named_for_one_network(tmp_path: Path) -> None:
    folder, file = make_wan_folder(tmp_path / "wan"), tmp_path / "style.safetensors"
    layer = "transformer.blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.randn(4, 32), f"{layer}.lora_B.weight": torch.randn(32, 4)}, file
    )
    with pytest.raises(UsageError, match="the model is one network"):
        open_model(f"{folder}+high={file}", RECIPE)
