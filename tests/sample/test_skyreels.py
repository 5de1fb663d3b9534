"""SkyReels-V2 in synchronous mode: the network and the pipeline of diffusers, and what is refused."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_cli.cli.app import main
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.noise import noise
from anyflow_cli.model.pipeline_io import load_network
from anyflow_cli.recipe.schema import ModelSection, Recipe, SampleSection
from anyflow_cli.sample.presets import PRESETS
from anyflow_cli.sample.sampler import VideoSampler
from tests.model.helpers import distance
from tests.model.layouts import written
from tests.tiny_pipeline import WAN21_SIZES, make_wan21_folder, sizes, spread

FILE = "diffusion_pytorch_model.safetensors"


def skyreels(rate_input: bool = True) -> Any:
    """Diffusers' network; the 1.3B has the input of the frame rate, the 14B has not."""
    from diffusers import SkyReelsV2Transformer3DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return spread(
            SkyReelsV2Transformer3DModel(**sizes(**WAN21_SIZES), inject_sample_info=rate_input)
        ).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["1.3B", "14B"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder as SkyReels-V2 publishes it."""
    from diffusers import SkyReelsV2DiffusionForcingPipeline, UniPCMultistepScheduler, WanPipeline

    place = tmp_path_factory.mktemp("models")
    parts = WanPipeline.from_pretrained(make_wan21_folder(place / "wan")).components
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    pipeline = SkyReelsV2DiffusionForcingPipeline(
        tokenizer=parts["tokenizer"], text_encoder=parts["text_encoder"], vae=parts["vae"],
        transformer=skyreels(request.param), scheduler=scheduler,
    )  # fmt: skip
    pipeline.save_pretrained(place / "SkyReels-V2-DF-1.3B-540P-Diffusers")
    return place / "SkyReels-V2-DF-1.3B-540P-Diffusers"


def velocity(network: Any, z: Tensor, t: float, text: Tensor) -> Tensor:
    """Diffusers' network at 24 fps, with a time for every frame."""
    times = torch.full(z.shape[:2], 1000 * t)
    with torch.no_grad():
        out: Tensor = network(
            z.transpose(1, 2), times, text, enable_diffusion_forcing=True, fps=[1] * len(z), return_dict=False
        )[0]
    return out.transpose(1, 2)


def network_beside_diffusers(rate_input: bool, layout: str = "diffusers") -> tuple[Tensor, Tensor]:
    """Velocities of our network and of diffusers', which wrote the weights."""
    reference = skyreels(rate_input)
    draw = torch.Generator().manual_seed(3)
    # one video: diffusers' class cannot add the frame rate to several
    z, text = torch.randn(1, 3, 16, 4, 6, generator=draw), torch.randn(1, 7, 32, generator=draw)
    t = torch.full((1,), 0.7)
    with tempfile.TemporaryDirectory() as place:
        if layout == "diffusers":
            reference.save_pretrained(place)
        else:
            weights = reference.state_dict()
            rate = {name: weights.pop(name) for name in [*weights] if name.startswith("fps_")}
            for ours_, theirs in (("net.0.proj", "0"), ("net.2", "2")):
                rate = {name.replace(ours_, theirs): tensor for name, tensor in rate.items()}
            save_file(written.as_original(weights) | rate, Path(place) / "model.safetensors")
        ours = load_network(Path(place))
        return ours(z, t, t, text), velocity(reference, z, 0.7, text)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("rate_input", [True, False], ids=["1.3B", "14B"])
def test_the_network_is_that_of_diffusers_at_24_fps(layout: str, rate_input: bool) -> None:
    got, expected = network_beside_diffusers(rate_input, layout)
    assert distance(got, expected) < 1e-5


def test_the_frame_rate_matters() -> None:
    reference, z = skyreels(), torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    text = torch.zeros(1, 7, 32)
    before = velocity(reference, z, 0.7, text)
    reference.fps_embedding.weight.data[1] += 1
    assert distance(velocity(reference, z, 0.7, text), before) > 1e-2


def test_the_preset_gives_the_latents_of_diffusers_pipeline(folder: Path) -> None:
    from diffusers import SkyReelsV2DiffusionForcingPipeline

    preset = PRESETS["skyreels-v2"]
    model = ModelSection(
        teacher=str(folder), frames=9, height=32, width=32, shift=8.0, max_text_tokens=16, precision="fp32",
        negative_prompt="a blue square",
    )  # fmt: skip
    sample = SampleSection(teacher_sampler="unipc", teacher_guidance=6.0)
    recipe = Recipe(name="test", model=model, sample=sample)
    sampler = VideoSampler.load(str(folder), recipe, preset=preset)
    (ours,) = sampler.latents(["a red circle"], [7], 6)
    pipeline = SkyReelsV2DiffusionForcingPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    start = noise(7, (3, 16, 4, 4))[None].transpose(1, 2)
    pipeline.prepare_latents = lambda *_, **__: (start.clone(), 3, None, 0)  # its `latents` does not work
    theirs = pipeline(
        "a red circle", negative_prompt="a blue square", height=32, width=32, num_frames=9,
        num_inference_steps=6, guidance_scale=6.0, max_sequence_length=16, ar_step=0,
        fps=24, output_type="latent",
    ).frames  # fmt: skip
    assert distance(ours.transpose(1, 2), theirs) < 1e-5


def test_one_command_samples_a_published_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["height=32", "width=32", "frames=9", "precision=fp32", "max_text_tokens=16"]
    arguments = ["sample", "-r", "tiny", "--model", str(folder), "--sampler-preset", "skyreels-v2", "-p", "x"]
    arguments += [f"--set=model.{key}" for key in keys] + ["--out", str(tmp_path / "out"), "--nfe", "3"]
    assert main(arguments) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert (record["preset"], record["sampler"], record["guidance"]) == ("skyreels-v2", "unipc", 6.0)
    assert (record["settings"]["shift"], record["settings"]["fps"]) == (8.0, 24)
    assert [one["nfe"] for one in record["samples"]] == [3]


def test_asynchronous_mode_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"num_frame_per_block": 5}
    written.folder(tmp_path / "asynchronous", load_file(folder / "transformer" / FILE), config)
    with pytest.raises(UsageError, match="asynchronous mode, with blocks of 5 frames"):
        load_network(tmp_path / "asynchronous")


def test_longer_videos_than_one_window_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 97 frames"):
        PRESETS["skyreels-v2"].check_request(121, [30])
