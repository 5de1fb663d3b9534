"""``--sampler-preset``: from published files to videos by one command; other models are refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from anyflow_cli.cli.app import main
from anyflow_cli.data.video import ClipFormat, read_clip
from anyflow_cli.errors import UsageError
from anyflow_cli.model.config import CausalConfig, NetworkConfig
from anyflow_cli.sample.presets import PRESETS, presets_of
from tests.model.layouts import written
from tests.tiny_pipeline import WAN21_SIZES, make_expert_folder, make_wan21_folder, wan_transformer

OF_SHAPES = ["--set=model.height=64", "--set=model.width=64", "--set=model.frames=33"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published files of several systems, each in its own layout, and a pipeline folder."""
    place = tmp_path_factory.mktemp("models")
    make_wan21_folder(place / "wan")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        weights = wan_transformer(**WAN21_SIZES).state_dict()
    original = written.as_original(weights)
    torch.save(written.self_forcing(weights), place / "self_forcing_dmd.pt")
    torch.save(written.rcm(weights), place / "rCM_Wan2.1_T2V_1.3B_480p.pt")
    torch.save(written.rcm(weights), place / "Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-sCM_c3-3.pt")
    torch.save(written.self_forcing(weights), place / "longlive_base.pt")
    save_file(original, place / "causal_model.safetensors")
    save_file(written.prefixed(original, "model."), place / "krea-realtime-video-14b.safetensors")
    experts = make_wan21_folder(place / "SFWan2.2-T2V-A14B-Diffusers", make_expert_folder)
    for part in ("transformer", "transformer_2"):  # the class of FastVideo's causal folders
        config = experts / part / "config.json"
        config.write_text(config.read_text().replace("WanTransformer3DModel", "CausalWanTransformer3DModel"))
    return place


def command(models: Path, verb: str, model: str, preset: str, *more: str) -> list[str]:
    small = [
        f"--set=model.{key}" for key in ("height=32", "width=32", "precision=fp32", "max_text_tokens=16")
    ]
    small.append(f"--set=model.teacher={models / 'wan'}")
    return [verb, "-r", "tiny", "--model", str(models / model), "--sampler-preset", preset, *small, *more]


FILES = {
    "self-forcing": ("self_forcing_dmd.pt", 9),
    "causalwan2.2": ("SFWan2.2-T2V-A14B-Diffusers", 13),
    "longlive": ("longlive_base.pt", 69),
    "lightx2v-causvid": ("causal_model.safetensors", 9),
    "krea-realtime": ("krea-realtime-video-14b.safetensors", 33),
    "rcm": ("rCM_Wan2.1_T2V_1.3B_480p.pt", 5),
    "causal-rcm": ("Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-sCM_c3-3.pt", 9),
}


@pytest.mark.parametrize("preset", FILES)
def test_a_published_file_is_sampled_by_one_command(
    models: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, frames = FILES[preset]
    out = tmp_path / "out"
    arguments = command(models, "sample", file, preset, "-p", "a red circle", "--out", str(out), "--json")
    assert main([*arguments, f"--set=model.frames={frames}"]) == 0, capsys.readouterr().err
    record = json.loads((out / "samples.json").read_text())
    assert record["preset"] == preset
    assert record["sampling"] == PRESETS[preset].in_words
    assert record["settings"]["shift"] == PRESETS[preset].shift
    assert [video["nfe"] for video in record["samples"]] == [PRESETS[preset].steps]
    assert record["samples"][0]["network_seconds"] > 0


def test_a_published_file_without_its_preset_is_sampled_with_a_warning(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(models, "sample", "self_forcing_dmd.pt", "self-forcing", "-p", "a red circle")
    place = arguments.index("--sampler-preset")
    del arguments[place : place + 2]
    arguments += ["--nfe", "1", "--set=model.frames=5", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "without --sampler-preset self-forcing it is sampled as a teacher" in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "renoised"), "--sampler", "consistency"]) == 0
    assert "--sampler-preset" not in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["causalwan2.2", "self-forcing"])
def test_a_causal_preset_continues_a_picture(
    models: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "first.png")
    arguments = command(models, "sample", FILES[preset][0], preset, "-p", "a", "--out", str(tmp_path / "out"))
    arguments += [f"--set=model.frames={FILES[preset][1]}", "--image", str(tmp_path / "first.png")]
    assert main(arguments) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["given"]["frames"], record["preset"]) == (1, preset)


def test_without_sizes_the_published_ones_are_used(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sample", "--model", str(models / "rCM_Wan2.1_T2V_1.3B_480p.pt"), "--sampler-preset", "rcm"]
    assert main([*arguments, f"--set=model.teacher={models / 'wan'}", "-p", "x", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    assert "77 frames of 480x832 at 16 fps" in printed.err
    assert json.loads(printed.out)["nfe"] == [4]


def test_a_preset_streams_and_changes_the_prompt_on_the_way(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = command(models, "sample", FILES["krea-realtime"][0], "krea-realtime", "-p", "a red circle")
    arguments += ["--set=model.frames=45", "--stream", "--then", "21: a blue square", "--out", str(out)]
    assert main(arguments) == 0, capsys.readouterr().err
    (sampled,) = json.loads((out / "samples.json").read_text())["samples"]
    # chunks of 3 latent frames in rollouts of 6 that share 3
    assert [frames for _, frames in sampled["parts"]] == [9, 21, 33, 45]


def test_longlive_is_its_base_with_its_lora(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    down, up = torch.randn(4, 256), torch.randn(256, 4)
    name = "base_model.model.blocks.0.self_attn.q.lora_{}.weight"
    lora = tmp_path / "lora.pt"
    torch.save({"generator_lora": {name.format("A"): down, name.format("B"): up}}, lora)
    shown: list[Any] = []
    for more in ([], ["--lora", str(lora)]):
        out = tmp_path / str(len(shown))
        arguments = command(models, "sample", "longlive_base.pt", "longlive", "-p", "a", "--out", str(out))
        assert main([*arguments, "--set=model.frames=9", *more]) == 0, capsys.readouterr().err
        (video,) = out.glob("*.mp4")
        shown.append(read_clip(video, ClipFormat(9, 16, 32, 32)).pixels)
    assert (shown[0] != shown[1]).any()


def test_an_evaluation_records_the_preset_and_its_latency(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(models, "evaluate", "self_forcing_dmd.pt", "self-forcing", "--limit", "1", "--json")
    assert main([*arguments, *OF_SHAPES, "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    results = json.loads(capsys.readouterr().out)
    ((key, card),) = results["card"]["models"].items()
    assert (card["preset"], card["sampler"]) == ("self-forcing", PRESETS["self-forcing"].in_words)
    assert (card["steps"], card["shift"], card["guidance"]) == (4, 5.0, None)
    (scored,) = results["scores"]
    assert scored["seconds"]["network"] > 0
    assert (scored["steps"], scored["evaluations"]) == (4, 4)
    assert key.startswith("model-4-")


def test_an_evaluation_refuses_what_the_preset_is_not_for(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(models, "evaluate", "rCM_Wan2.1_T2V_1.3B_480p.pt", "self-forcing", "--dry-run")
    assert main([*arguments, *OF_SHAPES]) == 2
    assert "rCM_Wan2.1_T2V_1.3B_480p.pt is published for" in " ".join(capsys.readouterr().err.split())
    arguments = command(models, "evaluate", "self_forcing_dmd.pt", "self-forcing", "--dry-run")
    assert main([*arguments, "--set=model.frames=13"]) == 2
    assert "chunks of 3 latent frames" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("preset", FILES)
def test_inspect_names_the_preset(models: Path, preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(models / FILES[preset][0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sampler_presets"] == [preset]


def test_inspect_tells_that_a_student_of_unknown_name_needs_a_preset(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    path.symlink_to(models / "self_forcing_dmd.pt")
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sampler_presets"] == []
    assert any("--list-presets" in note for note in facts["notes"])


REFUSED: dict[str, tuple[str, str, list[str], str]] = {
    "another system": ("rCM_Wan2.1_T2V_1.3B_480p.pt", "self-forcing", [], "for --sampler-preset rcm"),
    "the pretrained model": ("tiny", "self-forcing", [], "8 latent channels|16"),
    "frames that are no whole chunks": (
        "self_forcing_dmd.pt", "self-forcing", ["--set=model.frames=13"], "chunks of 3 latent frames",
    ),
    "more frames than the system samples": (
        "self_forcing_dmd.pt", "self-forcing", ["--set=model.frames=93"], "at most 81 frames",
    ),
    "one network instead of two": ("self_forcing_dmd.pt", "causalwan2.2", [], "published for|one network"),
    "two experts instead of one": ("SFWan2.2-T2V-A14B-Diffusers", "rcm", [], "a model of two experts"),
    "other frames than whole chunks after the first": (
        "SFWan2.2-T2V-A14B-Diffusers", "causalwan2.2", ["--set=model.frames=21"], "after one of 1",
    ),
    "other steps of the recipe": (
        "self_forcing_dmd.pt", "self-forcing", ["--set=sample.nfe=[8]"], "takes 4 steps, not 8",
    ),
    "steps": ("self_forcing_dmd.pt", "self-forcing", ["--nfe", "8"], "says how to sample"),
    "a sampler": ("self_forcing_dmd.pt", "self-forcing", ["--sampler", "euler"], "so does --sampler"),
    "an unknown name": ("self_forcing_dmd.pt", "self-forceing", [], "There is no preset 'self-forceing'"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_preset_is_not_for_is_refused_before_a_model_loads(
    models: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, preset, more, message = REFUSED[what]
    arguments = command(models, "sample", file, preset, "-p", "x", "--dry-run", *more)
    if file == "tiny":
        arguments[arguments.index(str(models / "tiny"))] = "tiny"
    assert main(arguments) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert any(part in error for part in message.split("|")), error


def test_an_any_step_model_is_refused() -> None:
    causal = NetworkConfig(12, 128, 30, 8960, two_time=True, causal=CausalConfig())
    with pytest.raises(UsageError, match="an any-step model, which needs no preset"):
        PRESETS["self-forcing"].check("far", causal)
    with pytest.raises(UsageError, match="the pretrained model, not a student"):
        PRESETS["rcm"].check("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", NetworkConfig(12, 128, 30, 8960))
    with pytest.raises(UsageError, match="48 latent channels, not of 16"):
        PRESETS["rcm"].check("x", NetworkConfig(24, 128, 30, 14336, in_channels=48, out_channels=48))


PUBLISHED = {
    "Efficient-Large-Model/LongLive-2.0-5B/model_bf16.pt": "longlive-2",
    "gdhe17/Self-Forcing/checkpoints/self_forcing_sid.pt": "self-forcing",
    "wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers": "self-forcing",
    "CausVid/autoregressive_checkpoint/model.pt": "causvid",
    "CausVid/autoregressive_checkpoint_warp_4step_cfg2/model.pt": "causvid-4step",
    "CausVid/bidirectional_checkpoint2/model.pt": "causvid-bidirectional",
    "lightx2v/Wan2.1-T2V-14B-CausVid/causal_model.pt": "lightx2v-causvid",
    "wan2.1_t2v_14b_lightx2v_4step.safetensors": "lightx2v-4step",
    "Causal-Forcing/chunkwise/causal_forcing.pt": "causal-forcing",
    "Causal-Forcing/framewise/causal_forcing.pt": "causal-forcing-framewise",
    "Causal-Forcing/causal-forcing++/framewise-2step.pt": "causal-forcing-2step",
    "Causal-Forcing/causal-forcing++/framewise-1step.pt": "causal-forcing-1step",
    "LongLive-1.3B/models/longlive_base.pt": "longlive",
    "krea/krea-realtime-video-14b.safetensors": "krea-realtime",
    "rCM_Wan2.1_T2V_14B_480p.pt": "rcm",
    "rCM_Wan2.1_T2V_14B_720p.pt": "rcm-720p",
    "Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_c3-3_step4.pt": "causal-rcm",
    "Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-sCM_c1-1.pt": "causal-rcm-framewise",
    "FastVideo/FastWan2.1-T2V-1.3B-Diffusers": "fastwan",
    "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers": "fastwan-5b",
    "FastVideo/CausalWan2.2-I2V-A14B-Preview-Diffusers": "causalwan2.2",
    "rand0nmr/SFWan2.2-T2V-A14B-Diffusers": "causalwan2.2",
    "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers": "skyreels-v2",
}


def test_published_names_lead_to_their_presets() -> None:
    found: dict[str, list[Any]] = {name: [p.name for p in presets_of(name)] for name in PUBLISHED}
    assert found == {name: [preset] for name, preset in PUBLISHED.items()}
    assert {*PUBLISHED.values()} == PRESETS.keys()


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--list-presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["presets"]
    assert [row["preset"] for row in rows] == [*PRESETS]
