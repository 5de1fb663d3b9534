"""What is at an address, from headers alone: every layout, runs, other models, parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anyflow_cli.cli import app
from anyflow_cli.errors import UsageError
from anyflow_cli.inspection import inspect_address
from anyflow_cli.model import pipeline_io
from anyflow_cli.model.layouts.named_weights import NamedWeights
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from tests.model.layouts import written
from tests.test_export import make_run
from tests.tiny_pipeline import make_wan_folder


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("models") / "wan")


def inspected(address: object) -> dict[str, Any]:
    """Facts about an address, while no weight may be read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NamedWeights, "read", lambda *_: pytest.fail("a weight was read"))
        return inspect_address(str(address))


def test_a_built_in_any_step_model() -> None:
    facts = inspected("tiny-anyflow")
    assert facts["usable"]
    assert (facts["kind"], facts["times"], facts["causal"]) == ("pipeline folder", 2, None)
    assert (facts["gate"], facts["second_time"]) == (0.25, "r")
    assert facts["missing"] == facts["problems"] == []
    assert facts["types"] == {"bf16": 1.0} or sum(facts["types"].values()) == pytest.approx(1, abs=1e-3)


def test_parameters_are_counted(wan: Path) -> None:
    facts = inspected(wan)
    network = load_network(wan)
    assert facts["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert facts["types"] == {"fp32": 1.0}
    assert facts["family"] == "Wan architecture, other sizes"


@pytest.mark.parametrize("layout", written.EXACT | written.QUANTIZED)
def test_every_layout(tmp_path: Path, layout: str) -> None:
    weights = dict(written.reference().state_dict())
    path = (written.EXACT | written.QUANTIZED)[layout](tmp_path, weights)
    facts = inspected(path)
    assert facts["usable"]
    assert (facts["layers"], facts["width"], facts["heads"], facts["channels"]) == (2, 256, 2, 8)
    assert ("original Wan names" in facts["layout"]) == (layout not in PLAIN)
    assert any(dtype in facts["types"] for dtype in ("fp8_e4m3", "int8")) == (layout in written.QUANTIZED)
    assert "taken from the recipe's teacher" in facts["missing"][0]
    is_student = bool(facts["sampler_presets"]) or any("--list-presets" in note for note in facts["notes"])
    assert is_student == (layout in STUDENTS)


PLAIN = ("diffusers file", "AnyFlow training state", "FastWan, sparse attention")
STUDENTS = ("Self-Forcing", "Self-Forcing, FSDP", "CausVid directory")


@pytest.mark.parametrize(
    ("sizes", "family"),
    [
        ((12, 30, 8960, 16), "Wan 2.1 T2V 1.3B"),
        ((24, 30, 14336, 48), "Wan 2.2 TI2V 5B"),
        ((40, 40, 13824, 16), "Wan 2.1 T2V 14B or one expert of Wan 2.2 T2V A14B"),
    ],
)
def test_published_sizes_have_names(tmp_path: Path, sizes: tuple[int, ...], family: str) -> None:
    heads, layers, ffn, channels = sizes
    config = {
        "dim": 128 * heads, "num_heads": heads, "num_layers": layers, "ffn_dim": ffn, "in_dim": channels,
        "out_dim": channels, "model_type": "t2v",
    }  # fmt: skip
    weights = written.as_original(written.reference().state_dict())
    facts = inspected(written.folder(tmp_path / "wan", weights, config))
    assert facts["family"] == family
    assert facts["problems"]  # these weights are not of that model


def test_a_run_and_its_checkpoint(wan: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", wan, lora=True)
    facts = inspected(tmp_path / "run")
    assert (facts["kind"], facts["step"], facts["times"]) == (
        "checkpoint of a training run",
        "step-000007",
        2,
    )
    assert (facts["base"], facts["shift"]) == (str(wan), 3.0)
    save_pipeline(tmp_path / "run" / "model", two_time_from(load_network(wan)), wan, {})
    assert inspected(tmp_path / "run")["kind"] == "pipeline folder"


def test_what_cannot_be_used_says_why(tmp_path: Path) -> None:
    for name, tensors, key, words in (
        ("vace", {"vace_blocks.0.before_proj.weight": torch.zeros(1)}, "problem", "VACE"),
        ("lora", {"blocks.0.self_attn.q.lora_down.weight": torch.zeros(1)}, "kind", "LoRA"),
    ):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        facts = inspected(tmp_path / f"{name}.safetensors")
        assert not facts["usable"]
        assert words in facts[key]
        assert facts["instead"]
    (tmp_path / "x.gguf").touch()
    assert "GGUF" in inspected(tmp_path / "x.gguf")["problem"]
    with pytest.raises(UsageError, match="There is no model at"):
        inspected(tmp_path / "nothing")


def test_a_file_that_lacks_a_tensor_is_not_usable(tmp_path: Path) -> None:
    weights = written.as_original(written.reference().state_dict())
    del weights["blocks.1.ffn.0.weight"]
    save_file(weights, tmp_path / "wan.safetensors")
    facts = inspected(tmp_path / "wan.safetensors")
    assert not facts["usable"]
    assert "do not fit each other: blocks.1.ffn.net.0.proj.weight is missing" in facts["problems"][0]


def test_an_adapter_of_peft_may_state_no_base(tmp_path: Path) -> None:
    weights = {f"blocks.0.attn1.to_q.lora_{one}.weight": torch.ones(4, 4) for one in "AB"}
    pipeline_io.save_adapter(tmp_path / "adapter", weights, LoraSize(4, 8), "base")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    facts = inspect_address(str(tmp_path / "adapter"))
    assert (facts["kind"], facts["rank"], facts["base"]) == ("LoRA adapter of PEFT", 4, None)


def test_parts_of_a_pipeline(tmp_path: Path) -> None:
    tensors = {
        "encoder.conv1.weight": torch.zeros(96, 3, 3, 3, 3),
        "decoder.conv1.weight": torch.zeros(384, 16, 3, 3, 3), "conv2.weight": torch.zeros(16, 16, 1, 1, 1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "vae.safetensors")
    facts = inspected(tmp_path / "vae.safetensors")
    assert (facts["kind"], facts["z_dim"], facts["base_dim"]) == ("VAE", 16, 96)


@pytest.mark.parametrize(("name", "kind"), [("vae", "VAE"), ("text_encoder", "text encoder")])
def test_the_folder_of_a_part_is_described(wan: Path, name: str, kind: str) -> None:
    facts = inspected(wan / name)
    assert (facts["kind"], facts["usable"]) == (kind, False)
    assert facts["instead"] == "Name the folder that it is part of."


def test_a_model_of_the_hub_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_io, "_from_hub", lambda name: pytest.fail("downloaded"))
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    facts = inspected("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers")
    assert (facts["family"], facts["times"]) == ("Wan 2.1 T2V 1.3B", 2)
    assert facts["causal"] == [1, 3, 3, 3, 3, 3, 3, 2]
    assert "download" in facts["missing"][0]
    with pytest.raises(UsageError, match="on the Hub it may be"):
        inspected("someone/some-model")


def test_the_command_prints_a_table_or_json(wan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["inspect", str(wan), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["times"], facts["usable"]) == (1, True)
    assert app.main(["inspect", str(wan)]) == 0
    shown = capsys.readouterr().out
    assert "fp32 100.0%" in shown
    assert "usable" in shown


def lora_file(path: Path, prefix: str, network: Any, alpha: float | None, layers: int = 2) -> Path:
    """Pairs of rank 2 on the queries of a network's first layers."""
    stored: dict[str, torch.Tensor] = {}
    for number in range(layers):
        rows, columns = network.get_parameter(f"blocks.{number % 2}.attn1.to_q.weight").shape
        key = f"{prefix}blocks.{number}.self_attn.q".replace(".", "." if prefix.endswith(".") else "_")
        stored |= {f"{key}.lora_down.weight": torch.zeros(2, columns)}
        stored |= {f"{key}.lora_up.weight": torch.zeros(rows, 2)}
        if alpha is not None:
            stored[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(stored, path)
    return path


def test_a_lora_file_is_described_with_what_it_fits(tmp_path: Path) -> None:
    network = load_network(pipeline_io.resolve_pipeline("tiny"))
    facts = inspect_address(str(lora_file(tmp_path / "a.safetensors", "diffusion_model.", network, 1.0)))
    assert (facts["kind"], facts["family"], facts["ranks"]) == ("LoRA file", "ComfyUI", [2])
    assert (facts["alpha"], facts["scales"]) == ("stated by 2 keys", ["0.5 (2 pairs)"])
    assert facts["fits"] == ["tiny", "tiny-anyflow"]
    assert not facts["usable"]
    bare = inspect_address(str(lora_file(tmp_path / "b.safetensors", "lora_unet_", network, None)))
    assert (bare["family"], bare["scales"]) == ("musubi", ["0.5 (2 pairs)"])  # alpha 1 by the family's rule


def test_a_lora_file_that_fits_nothing_says_which_keys_are_refused(tmp_path: Path) -> None:
    network = load_network(pipeline_io.resolve_pipeline("tiny"))
    path = lora_file(tmp_path / "a.safetensors", "diffusion_model.", network, None, layers=9)
    facts = inspect_address(str(path))
    assert facts["fits"] == []
    assert facts["refused"].endswith(" and 3 more are without a place in tiny, the nearest")
    assert "blocks.6.self_attn.q" in facts["refused"]


def test_a_model_with_a_lora_file_is_described_with_both(tmp_path: Path) -> None:
    network = load_network(pipeline_io.resolve_pipeline("tiny"))
    path = lora_file(tmp_path / "a.safetensors", "diffusion_model.", network, None)
    facts = inspect_address(f"tiny-anyflow+{path}:0.5")
    assert (facts["usable"], facts["times"], facts["loras"]) == (True, 2, [f"{path} at 0.5"])
    wrong = lora_file(tmp_path / "b.safetensors", "diffusion_model.", network, None, layers=9)
    assert "does not fit the model" in inspect_address(f"tiny+{wrong}")["problem"]
