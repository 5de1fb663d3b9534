"""Sampling: equal to diffusers from equal noise, independent of the batch, clear about what does not fit."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_cli.data.video import Pixels, from_pixels
from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import noise
from anyflow_cli.flow.samplers import SAMPLERS, flow_map_euler
from anyflow_cli.flow.times import grid
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.chunk_sampling import sample_chunks
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.kv_cache import KeyCache
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.recipe.schema import ModelSection, Recipe
from anyflow_cli.recipe.schema import SampleSection as SampleSection
from anyflow_cli.runs.open import ModelChoice, open_model
from anyflow_cli.sample.output import SampleRequest, file_name, make_directory, write_samples
from anyflow_cli.sample.sampler import PromptSwitch, VideoSampler, one_ahead
from tests.tiny_pipeline import make_wan_folder

SHAPE = (2, 8, 4, 6)  # latents of 5 frames of 32x48
PROMPTS = ["a small red circle moving left", "a large blue square", "a green triangle moving up", "a circle"]


def recipe_for(folder: Path, **changes: object) -> Recipe:
    model: dict[str, object] = {
        "frames": 5,
        "height": 32,
        "width": 48,
        "max_text_tokens": 16,
        "precision": "fp32",
        "shift": 3.0,
    }
    return Recipe(
        name="test",
        model=ModelSection.model_validate({"teacher": str(folder)} | model | changes),
        sample=SampleSection(teacher_guidance=4.0),
    )


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("models") / "wan")


@pytest.fixture(scope="module")
def any_step(wan: Path) -> Path:
    """A flow-map model whose second embedder differs from its first, so that r matters."""
    network = two_time_from(load_network(wan))
    with torch.no_grad():
        for parameter in network.condition_embedder.delta_embedder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return save_pipeline(wan.parent / "any-step", network, wan, {"recipe": "test"}, shift=3.0)


@pytest.fixture(scope="module")
def sampler(any_step: Path, wan: Path) -> VideoSampler:
    return VideoSampler.load(str(any_step), recipe_for(wan))


def largest_difference(a: list[Pixels], b: list[Pixels]) -> int:
    return int(np.abs(np.stack(a).astype(int) - np.stack(b).astype(int)).max())


# --- what is computed


@pytest.mark.parametrize("nfe", [1, 3])
def test_an_any_step_folder_gives_the_videos_of_diffusers(
    sampler: VideoSampler, any_step: Path, nfe: int
) -> None:
    from diffusers import AnyFlowPipeline

    pipeline = AnyFlowPipeline.from_pretrained(any_step)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.stack([noise(seed, SHAPE) for seed in (7, 8)]).transpose(1, 2)
    theirs = pipeline(
        PROMPTS[:2], height=32, width=48, num_frames=5, num_inference_steps=nfe, latents=latents,
        max_sequence_length=16, output_type="np",
    ).frames  # fmt: skip
    ours = np.stack(list(sampler.videos(PROMPTS[:2], [7, 8], nfe, batch=2)))
    assert np.abs(ours / 255 - theirs).max() < 1 / 255


def test_a_plain_wan_folder_is_a_teacher_and_gives_the_videos_of_diffusers(wan: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipeline = WanPipeline.from_pretrained(wan, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.set_timesteps = _our_grid(pipeline.scheduler)
    theirs = pipeline(
        PROMPTS[0], negative_prompt="", height=32, width=48, num_frames=5, num_inference_steps=3,
        guidance_scale=4.0, latents=noise(7, SHAPE)[None].transpose(1, 2), max_sequence_length=16,
        output_type="np",
    ).frames  # fmt: skip
    teacher = VideoSampler.load(str(wan), recipe_for(wan))
    assert teacher.guidance == 4.0
    ours = np.stack(list(teacher.videos(PROMPTS[:1], [7], 3)))
    assert np.abs(ours / 255 - theirs).max() < 1 / 255


def test_a_teacher_sampled_with_unipc_gives_the_videos_of_its_pipeline(wan: Path) -> None:
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipeline = WanPipeline.from_pretrained(wan, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS[0], negative_prompt="", height=32, width=48, num_frames=5, num_inference_steps=4,
        guidance_scale=4.0, latents=noise(7, SHAPE)[None].transpose(1, 2), max_sequence_length=16,
        output_type="np",
    ).frames  # fmt: skip
    recipe = recipe_for(wan)
    sample = recipe.sample.model_copy(update={"teacher_sampler": "unipc"})
    teacher = VideoSampler.load(str(wan), recipe.model_copy(update={"sample": sample}))
    ours = np.stack(list(teacher.videos(PROMPTS[:1], [7], 4)))
    assert np.abs(ours / 255 - theirs).max() < 1.5 / 255
    assert (
        largest_difference(list(ours), list(VideoSampler.load(str(wan), recipe).videos(PROMPTS[:1], [7], 4)))
        > 1
    )


def test_unipc_is_for_teachers(any_step: Path, wan: Path) -> None:
    with pytest.raises(UsageError, match="unipc is for teachers"):
        VideoSampler.load(str(any_step), recipe_for(wan), method="unipc")


def _our_grid(scheduler: object) -> Callable[..., None]:
    """The scheduler's own grid ends at 1/1000; ours is even down to 0, as the flow-map scheduler's."""
    original = scheduler.set_timesteps  # type: ignore[attr-defined]

    def set_timesteps(count: int, device: object = None, **_: object) -> None:
        original(sigmas=np.linspace(1, 0, count + 1)[:-1], device=device)

    return set_timesteps


@pytest.mark.parametrize("method", ["flow-map", "euler", "consistency"])
def test_a_video_depends_on_its_seed_and_not_on_its_batch(any_step: Path, wan: Path, method: str) -> None:
    sampler = VideoSampler.load(str(any_step), recipe_for(wan), method=method)  # type: ignore[arg-type]
    seeds = [3, 4, 5, 6]
    alone = [next(sampler.videos([p], [s], 2)) for p, s in zip(PROMPTS, seeds, strict=True)]
    for batch in (3, 4):
        assert largest_difference(alone, list(sampler.videos(PROMPTS, seeds, 2, batch))) <= 1
    assert largest_difference(alone[:1], list(sampler.videos(PROMPTS[:1], [9], 2))) > 1


def test_the_three_samplers_differ(any_step: Path, wan: Path) -> None:
    videos = {
        method: next(
            VideoSampler.load(str(any_step), recipe_for(wan), method=method).videos(PROMPTS[:1], [0], 3)
        )
        for method in ("flow-map", "euler", "consistency")
    }
    for a, b in (("flow-map", "euler"), ("flow-map", "consistency"), ("euler", "consistency")):
        assert largest_difference([videos[a]], [videos[b]]) > 1


def test_embeddings_give_the_latents_of_their_prompts(sampler: VideoSampler) -> None:
    text = Condition(sampler.encoder.encode(PROMPTS[:2], 16))
    for a, b in zip(
        sampler.latents(text, [3, 4], 2, batch=2),
        sampler.latents(PROMPTS[:2], [3, 4], 2, batch=2),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_guidance_changes_a_teachers_video(wan: Path) -> None:
    recipe = recipe_for(wan)
    strong = recipe.model_copy(update={"sample": SampleSection(teacher_guidance=8.0)})
    videos = [next(VideoSampler.load(str(wan), r).videos(PROMPTS[:1], [0], 2)) for r in (recipe, strong)]
    assert largest_difference(videos[:1], videos[1:]) > 1


def test_videos_have_the_recipes_shape_and_latency_is_recorded(sampler: VideoSampler) -> None:
    videos = list(sampler.videos(PROMPTS[:2], [0, 1], 2, batch=2))
    assert [video.shape for video in videos] == [(5, 32, 48, 3)] * 2
    assert videos[0].dtype == np.uint8
    assert sampler.latency.network > 0
    assert sampler.latency.decode > 0


# --- which model


def test_a_bare_transformer_borrows_the_teachers_encoders(any_step: Path, wan: Path) -> None:
    opened = open_model(str(any_step / "transformer"), recipe_for(wan))
    assert opened.pipeline == wan


def test_an_any_step_model_is_no_teacher(any_step: Path, wan: Path) -> None:
    with pytest.raises(UsageError, match="not a teacher"):
        VideoSampler.load(str(any_step), recipe_for(wan), teacher=True)


def test_the_flow_map_sampler_refuses_a_single_time(wan: Path) -> None:
    with pytest.raises(UsageError, match="single time"):
        VideoSampler.load(str(wan), recipe_for(wan), method="flow-map")


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("in_channels", {"in_channels": 16, "out_channels": 16}, "latents of 16 channels; the VAE has 8"),
        ("text_dim", {"text_dim": 64}, "text of width 64; the encoder has width 32"),
    ],
)
def test_a_network_of_another_architecture_is_refused(
    wan: Path, tmp_path: Path, key: str, change: dict[str, int], message: str
) -> None:
    from tests.tiny_pipeline import wan_transformer

    folder = tmp_path / "other"
    shutil.copytree(wan, folder)
    shutil.rmtree(folder / "transformer")
    wan_transformer(**change).save_pretrained(folder / "transformer")
    with pytest.raises(UsageError, match=message):
        VideoSampler.load(str(folder), recipe_for(wan))


# --- causal models


@pytest.fixture(scope="module")
def causal(wan: Path) -> Path:
    """A causal folder of random weights: chunks of 1, 2 and 1 latent frames, two of them in full."""
    network = causal_from(two_time_from(load_network(wan)), CausalConfig(full_chunks=2, partition=(1, 2, 1)))
    return save_pipeline(wan.parent / "causal", network, wan, {}, shift=3.0)


def causal_sampler(causal: Path) -> VideoSampler:
    return VideoSampler.load(str(causal), recipe_for(causal, frames=13, height=64, width=64))


def test_a_causal_model_is_sampled_chunk_by_chunk_whatever_its_batch(causal: Path) -> None:
    sampler = causal_sampler(causal)
    seeds = [3, 4, 5]
    alone = [next(sampler.videos([p], [s], 2)) for p, s in zip(PROMPTS[:3], seeds, strict=True)]
    assert alone[0].shape == (13, 64, 64, 3)
    assert largest_difference(alone, list(sampler.videos(PROMPTS[:3], seeds, 2, batch=3))) <= 1
    latents = next(sampler.latents(PROMPTS[:1], seeds[:1], 2))
    model = Conditioned(sampler._network, Condition(sampler.encoder.encode(PROMPTS[:1], 16)))
    times = grid(2, 3.0)
    chunks = sample_chunks(model, noise(3, sampler.shape)[None], (1, 2, 1), flow_map_euler, [times])
    torch.testing.assert_close(latents, torch.cat(list(chunks), dim=1), rtol=0, atol=0)


def test_given_frames_begin_every_video(causal: Path) -> None:
    sampler, plain = causal_sampler(causal), causal_sampler(causal)
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    sampler.condition_on(frames)
    given = sampler.vae.encode(from_pixels(frames)[None])
    latents = next(sampler.latents(PROMPTS[:2], [1, 2], 2, batch=2))
    torch.testing.assert_close(latents[:, :2], given.expand(2, -1, -1, -1, -1), rtol=0, atol=0)
    free = next(plain.latents(PROMPTS[:2], [1, 2], 2, batch=2))
    assert (latents[:, 2:] - free[:, 2:]).abs().max() > 1e-3


def test_each_video_of_a_batch_can_begin_with_frames_of_its_own(causal: Path) -> None:
    sampler = causal_sampler(causal)
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 64, 64, 3), np.uint8)
    sampler.condition_on(frames)
    together = next(sampler.latents(PROMPTS[:2], [1, 2], 2, batch=2))
    for number, own in enumerate(frames):
        sampler.condition_on(own)
        alone = next(sampler.latents(PROMPTS[number : number + 1], [1 + number], 2))
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-4, atol=1e-4)


def test_chunks_can_have_steps_of_their_own(causal: Path) -> None:
    sampler = causal_sampler(causal)
    four, one, mixed = (next(sampler.latents(PROMPTS[:1], [1], nfe)) for nfe in (4, 1, (4, 1)))
    torch.testing.assert_close(mixed[:, :1], four[:, :1], rtol=0, atol=0)
    assert (mixed[:, :1] - one[:, :1]).abs().max() > 1e-3
    assert (mixed[:, 1:] - four[:, 1:]).abs().max() > 1e-3


@pytest.mark.parametrize("given", [0, 5])
def test_a_streamed_video_has_the_pixels_of_a_whole_one(causal: Path, given: int) -> None:
    sampler = causal_sampler(causal)
    if given:
        sampler.condition_on(np.random.default_rng(0).integers(0, 256, (given, 64, 64, 3), np.uint8))
    parts = list(sampler.stream(PROMPTS[0], 3, (3, 1)))
    assert [len(part) for part in parts] == ([1, 8, 4] if not given else [1, 4, 4, 4])
    whole = next(sampler.videos(PROMPTS[:1], [3], (3, 1)))
    assert np.array_equal(np.concatenate(parts), whole)
    assert sampler.latency.decode > 0


def test_a_part_is_shown_before_the_next_is_begun(causal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def watched(model: Velocity, z: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append(z)
        return flow_map_euler(model, z, *args, **options)

    monkeypatch.setitem(SAMPLERS, "flow-map", watched)
    stream = causal_sampler(causal).stream(PROMPTS[0], 3, 1)
    for made in (1, 2, 3):
        assert next(stream).std() > 0
        assert len(calls) == made


def test_the_next_chunk_is_sampled_while_a_chunk_is_decoded(
    causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the decoder waits for the next chunk's network, and the video stays the same."""
    wanted = np.concatenate(list(causal_sampler(causal).stream(PROMPTS[0], 3, 2)))
    begun = [threading.Event() for _ in range(4)]

    def watched(model: Velocity, z: Tensor, *args: Any, **options: Any) -> Tensor:
        next(event for event in begun if not event.is_set()).set()
        return flow_map_euler(model, z, *args, **options)

    monkeypatch.setitem(SAMPLERS, "flow-map", watched)
    sampler, decoded = causal_sampler(causal), iter(begun[1:3])
    sampler.overlaps, decoding = True, sampler.vae.decoding()

    def slow(chunk: Tensor) -> Tensor:
        if (event := next(decoded, None)) is not None:
            assert event.wait(60), "the next chunk was not begun"
        return decoding(chunk)

    monkeypatch.setattr(sampler.vae, "decoding", lambda: slow)
    assert np.array_equal(np.concatenate(list(sampler.stream(PROMPTS[0], 3, 2))), wanted)


def test_what_a_thread_raises_ends_the_iteration() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("the end")

    found = one_ahead(items())
    assert next(found) == 1
    with pytest.raises(ValueError, match="the end"):
        next(found)


def test_a_later_prompt_takes_over_from_its_frame_on(causal: Path) -> None:
    """Frame 5 is the first of latent frame 2, inside a chunk: a border is made there, prompt or no prompt."""
    videos = []
    for prompt in (PROMPTS[0], PROMPTS[1]):
        sampler = causal_sampler(causal)
        sampler.condition_on(switches=[PromptSwitch(5, prompt)])
        videos.append(next(sampler.latents(PROMPTS[:1], [1], 2)))
    torch.testing.assert_close(videos[0][:, :2], videos[1][:, :2], rtol=0, atol=0)
    assert ((videos[0] - videos[1])[:, 2:].abs().amax((0, 2, 3, 4)) > 1e-3).all()


def test_beyond_the_trained_length_the_window_slides_in_the_memory_of_that_length(
    causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks 1, 2, 2, ... of a model trained on 1, 2, 1: one compressed chunk and one in full are kept."""
    caches: list[KeyCache] = []

    def watched(*args: Any, **options: Any) -> KeyCache:
        caches.append(KeyCache(*args, **options))
        return caches[-1]

    monkeypatch.setattr("anyflow_cli.model.chunk_sampling.KeyCache", watched)
    for frames in (33, 65):
        sampler = VideoSampler.load(str(causal), recipe_for(causal, frames=frames, height=64, width=64))
        assert next(sampler.latents(PROMPTS[:1], [1], 1)).isfinite().all()
    assert [chunk.frames for chunk in caches[0].chunks] == [1, 2, 2, 2, 2]
    assert caches[0].bytes == caches[1].bytes


def test_what_cannot_begin_a_video_is_said(causal: Path, sampler: VideoSampler) -> None:
    frames = np.zeros((13, 64, 64, 3), np.uint8)
    with pytest.raises(UsageError, match="13 conditioning frames leave nothing to sample"):
        causal_sampler(causal).condition_on(frames)
    with pytest.raises(UsageError, match="bidirectional"):
        sampler.condition_on(frames)
    with pytest.raises(UsageError, match="bidirectional"):
        sampler.condition_on(switches=[PromptSwitch(1, "a circle")])
    with pytest.raises(UsageError, match="bidirectional"):
        next(sampler.latents(PROMPTS[:1], [1], (2, 1)))
    with pytest.raises(UsageError, match="bidirectional"):
        next(sampler.stream(PROMPTS[0], 1, 2))


def test_another_shift_than_the_models_own_is_said(
    wan: Path, any_step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    VideoSampler.load(str(any_step), recipe_for(wan))
    assert not caplog.messages
    VideoSampler.load(str(any_step), recipe_for(wan, shift=5.0))
    assert "trained at shift 3 and is sampled at the recipe's 5" in caplog.text


def test_weights_that_do_not_fit_their_config_are_refused(wan: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(wan, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: w for name, w in load_file(file).items() if "proj_out" not in name}, file)
    with pytest.raises(UsageError, match=r"proj_out.* are missing"):
        VideoSampler.load(str(folder), recipe_for(wan))


# --- files

HOSTILE = [
    "../../etc/passwd", "[red]bold[/red]", "two\nlines", "\N{ROCKET}\N{FIRE}", "x" * 200, "CON",
    "a/b\\c:d*e?", "-rf", ".hidden", "é à ü", "\u202egnp.exe",
]  # fmt: skip


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_never_becomes_a_path(prompt: str) -> None:
    name = file_name(0, prompt, 3, "50x2")
    assert Path(name).name == name
    assert len(name) < 90
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
    assert name.endswith("-seed3-steps50x2.mp4")


def test_prompts_that_share_their_letters_get_names_of_their_own() -> None:
    assert file_name(0, "a b", 0, "1") != file_name(0, "a-b", 0, "1")


def test_everything_is_written_and_the_record_repeats_it(
    sampler: VideoSampler, wan: Path, tmp_path: Path
) -> None:
    request = SampleRequest([PROMPTS[0], "[red]../x"], [4, 5], [1, 3])
    seen: list[int] = []
    record = write_samples(
        sampler, request, tmp_path, recipe_for(wan), ModelChoice("any", "why"), seen.append
    )
    assert seen == list(range(1, 9))
    assert json.loads((tmp_path / "samples.json").read_text()) == record
    assert {path.name for path in tmp_path.iterdir()} == {
        "samples.json", "sheet.png", *(entry["file"] for entry in record["samples"]),
    }  # fmt: skip
    assert record["model"] == {"address": "any", "why": "why", "lineage": {"recipe": "test"}}
    again = Recipe(name="again", model=ModelSection.model_validate(record["settings"]))
    entry = record["samples"][-1]
    repeated = VideoSampler.load(str(wan.parent / "any-step"), again, method=record["sampler"])
    first = next(sampler.videos([entry["prompt"]], [entry["seed"]], entry["nfe"]))
    second = next(repeated.videos([entry["prompt"]], [entry["seed"]], entry["nfe"]))
    assert np.array_equal(first, second)


def test_a_written_video_plays_back_as_sampled(sampler: VideoSampler, wan: Path, tmp_path: Path) -> None:
    from anyflow_cli.data.video import ClipFormat, read_clip

    record = write_samples(
        sampler, SampleRequest(PROMPTS[:1], [4], [2]), tmp_path, recipe_for(wan), ModelChoice("any", "")
    )
    video = next(sampler.videos(PROMPTS[:1], [4], 2))
    stored = read_clip(tmp_path / record["samples"][0]["file"], ClipFormat(5, 16, 32, 48)).pixels
    assert np.abs(stored.astype(int) - video.astype(int)).mean() < 12  # noise is hard on a codec
    assert stored.shape == video.shape


def test_directories_are_numbered_and_a_used_one_is_refused(tmp_path: Path) -> None:
    numbered = [make_directory(None, tmp_path / "samples").name for _ in range(3)]
    assert numbered == ["0001", "0002", "0003"]
    mine = tmp_path / "mine"
    assert make_directory(mine, tmp_path) == mine
    (mine / "video.mp4").write_text("kept")
    with pytest.raises(UsageError, match="already contains files"):
        make_directory(mine, tmp_path)
    assert (mine / "video.mp4").read_text() == "kept"


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_compiled_blocks_sample_the_same_video(
    causal: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops before code is made: what may go wrong is what is traced."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    if kind == "causal":
        address, recipe = str(causal), recipe_for(causal, frames=13, height=64, width=64)
    else:
        address, recipe = "tiny-anyflow", load_recipe("tiny", ["model.precision=fp32", "sample.frames=9"])
    videos = [
        next(
            VideoSampler.load(
                address, recipe.model_copy(update={"sample": SampleSection(compile=on)}), device="cpu"
            ).latents(PROMPTS[:1], [1], 2)
        )
        for on in (False, True)
    ]
    torch.testing.assert_close(*videos, rtol=1e-5, atol=1e-5)
