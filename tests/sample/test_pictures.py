"""Sampling from pictures: equal to diffusers' pipelines from equal noise; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anyflow_cli.data.video import Pixels
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.noise import noise
from anyflow_cli.model.experts import each_expert
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.schema import ModelSection, Pictures, Recipe, SampleSection
from anyflow_cli.sample.sampler import VideoSampler
from tests.tiny_pipeline import I2V_A14B, PICTURE_SETTINGS, make_i2v_folder, make_ti2v_folder

PROMPTS = ["a small red circle moving left", "a large blue square"]
TI2V = "2.2 TI2V"
KINDS = (*PICTURE_SETTINGS, I2V_A14B, TI2V)
TEXT = 512  # diffusers splits CLIP's tokens from text by this length
SIZE = {kind: (64, 96) if kind == TI2V else (32, 48) for kind in KINDS}
SHAPE = (3, 8, 4, 6)  # of 9 frames, at both factors


def pictures_of(kind: str) -> Pictures:
    return "optional-first" if kind == TI2V else "first-last" if "FLF" in kind else "first"


def recipe_for(kind: str, folder: Path) -> Recipe:
    height, width = SIZE[kind]
    model = ModelSection(
        teacher=str(folder), vae_scale=16 if kind == TI2V else 8, height=height, width=width, frames=9,
        shift=3.0, max_text_tokens=TEXT, pictures=pictures_of(kind), precision="fp32",
    )  # fmt: skip
    return Recipe(
        name="test", model=model, sample=SampleSection(teacher_guidance=4.0, teacher_sampler="unipc")
    )


def with_pictures(recipe: Recipe, pictures: Pictures) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"pictures": pictures})})


def picture(kind: str, seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (*SIZE[kind], 3), np.uint8)


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Kind and folder of a teacher."""
    kind, target = request.param, tmp_path_factory.mktemp("teacher") / "model"
    return kind, make_ti2v_folder(target) if kind == TI2V else make_i2v_folder(target, kind)


def their_latents(kind: str, folder: Path, first: Pixels | None, last: Pixels | None) -> Tensor:
    """Latents (F, C, h, w) that diffusers' pipeline samples."""
    import diffusers
    from PIL import Image

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    name = "WanPipeline" if first is None else "WanImageToVideoPipeline"
    pipeline = getattr(diffusers, name).from_pretrained(folder, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = {"image": first, "last_image": last}
    given = {key: Image.fromarray(pixels) for key, pixels in images.items() if pixels is not None}
    height, width = SIZE[kind]
    latents: Tensor = pipeline(
        prompt=PROMPTS[0], negative_prompt="", height=height, width=width, num_frames=9,
        num_inference_steps=4, guidance_scale=4.0, latents=noise(7, SHAPE)[None].transpose(1, 2),
        output_type="latent", **given,
    ).frames  # fmt: skip
    return latents[0].transpose(0, 1)


def test_a_teacher_gives_the_latents_of_its_pipeline(teacher: tuple[str, Path]) -> None:
    kind, folder = teacher
    first, last = picture(kind, 1), picture(kind, 2) if "FLF" in kind else None
    sampler = VideoSampler.load(str(folder), recipe_for(kind, folder), teacher=True)
    sampler.condition_on(first[None], last=last)
    ours = next(sampler.latents(PROMPTS[:1], [7], 4))[0]
    torch.testing.assert_close(ours, their_latents(kind, folder, first, last), rtol=1e-4, atol=1e-5)


def test_without_a_picture_ti2v_samples_from_text_like_its_pipeline(tmp_path: Path) -> None:
    folder = make_ti2v_folder(tmp_path / "model")
    sampler = VideoSampler.load(str(folder), recipe_for(TI2V, folder), teacher=True)
    ours = next(sampler.latents(PROMPTS[:1], [7], 4))[0]
    torch.testing.assert_close(ours, their_latents(TI2V, folder, None, None), rtol=1e-4, atol=1e-5)


def test_an_any_step_folder_of_it_samples_from_pictures(teacher: tuple[str, Path]) -> None:
    """The folder opens again; each video of a batch follows its own picture, whatever the batch."""
    kind, folder = teacher
    any_step = each_expert(load_network(folder), two_time_from)
    saved = save_pipeline(folder.parent / "any-step", any_step, folder, {})
    sampler = VideoSampler.load(str(saved), recipe_for(kind, folder))
    last = picture(kind, 9) if "FLF" in kind else None
    both = np.stack([picture(kind, 1), picture(kind, 2)])[:, None]
    sampler.condition_on(both, last=last)
    together = next(sampler.latents(PROMPTS, [7, 8], 2, batch=2))
    for number, given in enumerate(both):
        sampler.condition_on(given, last=last)
        alone = next(sampler.latents(PROMPTS[number : number + 1], [7 + number], 2))
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-4)
    sampler.condition_on(both[0], last=last)
    other = next(sampler.latents(PROMPTS[1:], [8], 2))
    assert (other[0] - together[1]).abs().max() > 1e-2


def test_a_given_first_frame_is_the_first_frame_of_the_video(tmp_path: Path) -> None:
    folder = make_ti2v_folder(tmp_path / "model")
    sampler = VideoSampler.load(str(folder), recipe_for(TI2V, folder), teacher=True)
    first = picture(TI2V, 1)
    sampler.condition_on(first[None])
    latents = next(sampler.latents(PROMPTS[:1], [7], 2))
    encoded = sampler.vae.encode(torch.from_numpy(first).permute(2, 0, 1)[None, None] / 255)
    torch.testing.assert_close(latents[:, :1], encoded)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    i2v, ti2v = make_i2v_folder(tmp_path / "i2v"), make_ti2v_folder(tmp_path / "ti2v")
    recipe = recipe_for("2.1 I2V", i2v)
    none, first = with_pictures(recipe, "none"), with_pictures(recipe_for(TI2V, ti2v), "first")
    with pytest.raises(UsageError, match=r"makes videos from pictures, and the recipe's model\.pictures is"):
        VideoSampler.load(str(i2v), none, teacher=True)
    with pytest.raises(UsageError, match="makes videos from pictures"):
        next(VideoSampler.load(str(i2v), recipe, teacher=True).latents(PROMPTS[:1], [1], 1))
    with pytest.raises(UsageError, match="VAE has 16 pixels per latent"):
        VideoSampler.load(str(ti2v), with_pictures(recipe, "optional-first"), teacher=True)
    sampler = VideoSampler.load(str(ti2v), recipe_for(TI2V, ti2v), teacher=True)
    with pytest.raises(UsageError, match="takes a first frame, not a last one"):
        sampler.condition_on(picture(TI2V, 1)[None], last=picture(TI2V, 2))
    with pytest.raises(UsageError, match="is bidirectional"):
        sampler.condition_on(np.stack([picture(TI2V, n) for n in range(5)]))
    with pytest.raises(UsageError, match=r"takes no pictures, and the recipe's model\.pictures is first"):
        VideoSampler.load(str(ti2v), first, teacher=True)
