"""``evaluate --pipeline``: tiny random pipelines of other systems sample and are scored as our models are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.evaluate.diffusers_pipeline import PUBLISHED_SHAPES, PipelineVideos, find_pipeline
from anyflow_cli.recipe.schema import ModelSection, Recipe
from tests.tiny_pipeline import make_wan_folder

SEED = 11


def text_parts(folder: Path) -> dict[str, Any]:
    """A T5 encoder and its tokenizer of 32 channels."""
    from diffusers import WanPipeline
    from transformers import T5Config, T5EncoderModel

    tokenizer = WanPipeline.from_pretrained(make_wan_folder(folder)).tokenizer
    sizes = {"vocab_size": len(tokenizer), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    return {"tokenizer": tokenizer, "text_encoder": T5EncoderModel(T5Config(num_heads=2, **sizes)).eval()}


def ltx(text: dict[str, Any]) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False), upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1), timestep_conditioning=False, patch_size=1, patch_size_t=1,
        encoder_causal=True, decoder_causal=False,
    )  # fmt: skip
    return LTXPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, transformer=transformer, **text)


def cogvideox(text: dict[str, Any]) -> Any:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8, sample_frames=33,
        max_text_seq_length=226,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return CogVideoXPipeline(scheduler=CogVideoXDDIMScheduler(), vae=vae, transformer=transformer, **text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pipelines")
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {"ltx": ltx, "cogvideox": cogvideox}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = text_parts(place / "wan")
        for name, make in makers.items():
            make(text).save_pretrained(place / name)
    return {name: place / name for name in makers}


SIZE = [
    "--set=model.height=64",
    "--set=model.width=64",
    "--set=model.frames=33",
    "--set=model.precision=fp32",
]


def evaluated(folder: Path, out: Path, *more: str) -> list[str]:
    fps = "--set=model.fps=16"
    return ["evaluate", "--pipeline", str(folder), "--out", str(out), "--limit", "1", fps, *SIZE, *more]


def test_a_pipeline_is_sampled_and_scored_by_the_protocol(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = evaluated(folders["ltx"], tmp_path, "--nfe", "2", "--json")
    assert main(arguments) == 0, capsys.readouterr().err
    results = json.loads(capsys.readouterr().out)
    ((key, card),) = results["card"]["models"].items()
    assert (card["pipeline"], card["steps"], card["guidance"]) == ("LTXPipeline", 2, 3)
    assert card["size"] == [33, 64, 64]
    (scored,) = results["scores"]
    assert scored["total"] is not None
    assert 0 < scored["seconds"]["network"] < scored["seconds"]["with_decoding"]
    assert len([*(tmp_path / key).rglob("*.mp4")]) == 1


@pytest.mark.parametrize("name", ["ltx", "cogvideox"])
def test_a_video_is_what_a_user_of_diffusers_gets_from_the_same_seed(
    folders: dict[str, Path], name: str
) -> None:
    from diffusers import DiffusionPipeline

    model = ModelSection(frames=33, height=64, width=64, fps=16, precision="fp32")
    found = find_pipeline(folders[name])
    generator = PipelineVideos.load(found, Recipe(name="test", model=model))
    (ours,) = generator.videos(["a red circle"], [SEED], 2, 1)
    pipeline = DiffusionPipeline.from_pretrained(folders[name])
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt="a red circle", num_inference_steps=2, num_frames=33, height=64, width=64, output_type="np",
        generator=torch.Generator().manual_seed(SEED), **({"frame_rate": 16} if name == "ltx" else {}),
    ).frames[0]  # fmt: skip
    assert ours.shape == (33, 64, 64, 3)
    assert (ours == np.round(theirs * 255)).all()
    network, decode = generator.latency
    assert min(network, decode) > 0


def test_the_published_size_and_steps_are_the_defaults(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {o.key: o.value for o in find_pipeline(folders["ltx"]).overrides}
    assert (overrides["model.height"], overrides["model.width"], overrides["evaluate.nfe"]) == (
        512,
        768,
        (40,),
    )
    arguments = ["evaluate", "--pipeline", str(folders["ltx"]), "--out", str(tmp_path), "--dry-run", "--json"]
    assert main([*arguments, *SIZE]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["models"] == {f"{folders['ltx']} at 40": "given with --pipeline"}


def test_every_known_pipeline_is_one_of_diffusers() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in PUBLISHED_SHAPES)
    assert all((frames - 1) % 4 == 0 for frames, *_ in PUBLISHED_SHAPES.values())


def changed(folder: Path, target: Path, **entries: Any) -> Path:
    """A folder with another ``model_index.json``; nothing else of it is needed to refuse it."""
    target.mkdir()
    index = json.loads((folder / "model_index.json").read_text()) | entries
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def test_code_in_the_folder_is_refused_and_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    mine = changed(folders["ltx"], tmp_path / "mine", transformer=["mine", "Mine"])
    (mine / "transformer").mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    (mine / "transformer" / "mine.py").write_text(code)
    (mine / "pipeline.py").write_text(code)
    with pytest.raises(UsageError, match=r"component transformer of .* is of 'mine'"):
        find_pipeline(mine)
    custom = changed(folders["ltx"], tmp_path / "custom", _class_name=["pipeline", "Mine"])
    (custom / "pipeline.py").write_text(code)
    with pytest.raises(UsageError, match=r"which this diffusers does not have"):
        find_pipeline(custom)
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "a folder that is none": (None, [], "is not a pipeline folder"),
    "a pipeline of pictures": ("StableDiffusionPipeline", [], "samples no videos from text"),
    "a class that is no pipeline": ("UNet2DModel", [], "which this diffusers does not have"),
    "a model beside it": ("LTXPipeline", ["--model", "tiny"], "cannot be combined with --pipeline"),
    "a task that needs a picture": ("LTXPipeline", ["--task", "i2v"], "LTXPipeline takes no picture"),
    "a picture without the task": ("WanImageToVideoPipeline", [], "needs a picture"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_driven_is_refused_in_words(
    folders: dict[str, Path], tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, more, message = REFUSED[what]
    folder = tmp_path if name is None else changed(folders["ltx"], tmp_path / "folder", _class_name=name)
    assert main(evaluated(folder, tmp_path / "out", *more)) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_without_weights_is_refused_in_words(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(evaluated(changed(folders["ltx"], tmp_path / "x"), tmp_path / "out", "--nfe", "1")) == 2
    assert "cannot be loaded" in " ".join(capsys.readouterr().err.split())
