"""Synthesis with a small random pipeline: what it makes and rejects, what kills and ranks leave behind."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import anyflow_cli.synthesize.run as synthesis
from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.shapes_world import WORLDS, render
from anyflow_cli.data.shard_index import index_members
from anyflow_cli.data.shards import Rejection, read_manifest
from anyflow_cli.data.verify import verify
from anyflow_cli.data.video import from_pixels, write_mp4
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import fold_seed, noise
from anyflow_cli.flow.times import grid
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.recipe.schema import DataSection, LaunchSection, ModelSection, Recipe, SynthesizeSection
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.synthesize.content_hashes import HASHES_FILE
from anyflow_cli.synthesize.job import prepare_synthesis
from anyflow_cli.synthesize.quality_checks import find_defect
from anyflow_cli.synthesize.run import SynthesisReport, attempt_seed, run_synthesis
from anyflow_cli.utils import distributed
from anyflow_cli.utils.distributed import join_group
from tests.tiny_pipeline import make_wan_folder
from tests.train.ranks import start

TOKENS = 16
STEPS, GUIDANCE, SHIFT = 3, 2.5, 5.0


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("teacher") / "wan")


def recipe_of(teacher: Path, **changes: Any) -> Recipe:
    model = ModelSection(
        teacher=str(teacher), height=32, width=32, frames=9, max_text_tokens=TOKENS, precision="fp32",
        shift=SHIFT, negative_prompt="a gray background",
    )  # fmt: skip
    made = {"count": 5, "steps": STEPS, "guidance": GUIDANCE, "batch_size": 2, "shard_size": 2, "seed": 10}
    return Recipe(
        name="t", model=model, data=DataSection(), synthesize=SynthesizeSection(**{**made, **changes})
    )


def contents(directory: Path) -> dict[str, bytes]:
    """Files by name, without the remembered hashes."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != HASHES_FILE}


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    run_synthesis(prepare_synthesis(recipe_of(teacher), out))
    return out


def test_samples_are_the_guided_ode_from_their_own_seed(teacher: Path, undisturbed: Path) -> None:
    """Eq. by hand: z <- z - (t - r) (u_null + g (u - u_null)), one sample at a time."""
    network, encoder = load_network(teacher), TextEncoder.load(teacher)
    data = LatentData(undisturbed, TOKENS)
    null = encoder.encode(["a gray background"], TOKENS)
    assert torch.allclose(data.negative, null[0], atol=1e-6)
    for index in (0, 3, 4):
        sample = data.sample(index)
        text = encoder.encode([WORLDS["shapes"].scene(10 + index).caption], TOKENS)
        z = noise(10 + index, data.latent_shape)[None]
        times = grid(STEPS, SHIFT)
        with torch.no_grad():
            for t, r in pairwise(times):
                u, u_null = (network(z, t[None], t[None], condition) for condition in (text, null))
                z = z - (t - r) * (u_null + GUIDANCE * (u - u_null))
        assert torch.allclose(sample.latents, z[0], atol=1e-4), index
        assert torch.allclose(data.batch([index]).condition.text, text, atol=1e-6)
        assert sample.facts["seed"] == 10 + index
        assert sample.caption == WORLDS["shapes"].scene(10 + index).caption


def test_the_report_and_the_manifest(teacher: Path, tmp_path: Path) -> None:
    told: list[int] = []
    report = run_synthesis(prepare_synthesis(recipe_of(teacher, previews=True), tmp_path / "d"), told.append)
    assert report == SynthesisReport(tmp_path / "d", 5, 5, 3, 3, True, ())
    assert told[-1] == 5
    assert told == sorted(told)
    assert verify(tmp_path / "d").problems == ()
    manifest = read_manifest(tmp_path / "d")
    assert (manifest.latent_shape, manifest.count, manifest.provenance["steps"]) == ((3, 8, 4, 4), 5, STEPS)
    parts = index_members(tmp_path / "d" / "00000.tar")
    assert all(set(endings) == {"safetensors", "json", "mp4"} for endings in parts.values())


def test_bf16_is_stored_as_such_and_stays_close(teacher: Path, undisturbed: Path, tmp_path: Path) -> None:
    recipe = recipe_of(teacher, count=2)
    model = recipe.model.model_copy(update={"precision": "bf16"})
    run_synthesis(prepare_synthesis(recipe.model_copy(update={"model": model}), tmp_path / "d"))
    half, full = LatentData(tmp_path / "d", TOKENS), LatentData(undisturbed, TOKENS)
    for position in (0, 1):
        x, expected = half.sample(position).latents, full.sample(position).latents
        assert x.dtype == torch.bfloat16
        assert (x.float() - expected).norm() < 0.03 * expected.norm()
    assert half.batch([0]).latents.dtype == torch.float32


def test_truncated_captions_are_counted(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = recipe_of(teacher, count=3)
    model = recipe.model.model_copy(update={"max_text_tokens": 4})
    run_synthesis(prepare_synthesis(recipe.model_copy(update={"model": model}), tmp_path / "d"))
    assert caplog.text.count("3 captions have more than 4 tokens (model.max_text_tokens)") == 1
    assert LatentData(tmp_path / "d", 4).batch([0, 1, 2]).condition.text.shape == (3, 4, 32)


def test_a_second_start_makes_nothing(
    teacher: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "_source", lambda job: pytest.fail("a model was loaded"))
    before = contents(undisturbed)
    report = run_synthesis(prepare_synthesis(recipe_of(teacher), undisturbed))
    assert (report.made, report.complete, report.samples) == (0, True, 5)
    assert contents(undisturbed) == before


def test_only_a_missing_shard_is_made_again_and_to_the_same_bytes(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    out.mkdir()
    for name, content in contents(undisturbed).items():
        (out / name).write_bytes(content)
    (out / "00001.tar").unlink()
    kept = (out / "00000.tar").stat().st_mtime_ns
    assert run_synthesis(prepare_synthesis(recipe_of(teacher, batch_size=2), out)).made == 1
    assert (out / "00000.tar").stat().st_mtime_ns == kept
    assert contents(out) == contents(undisturbed)


KILLED = """
import os, signal, sys
from pathlib import Path
from anyflow_cli.synthesize.content_hashes import HASHES_FILE
from anyflow_cli.synthesize.job import prepare_synthesis
from anyflow_cli.synthesize.run import run_synthesis
from tests.synthesize.test_run import recipe_of

def on_progress(settled):
    if settled >= 3:  # the first shard holds two: this is the middle of the second
        os.kill(os.getpid(), signal.SIGKILL)

run_synthesis(prepare_synthesis(recipe_of(Path(sys.argv[1])), Path(sys.argv[2])), on_progress)
"""


def test_a_kill_in_the_middle_changes_no_byte(teacher: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    command = [sys.executable, "-c", KILLED, str(teacher), str(out)]
    killed = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = {path.name for path in out.iterdir()}
    assert "00000.tar" in names
    assert "00001.tar" not in names
    assert any(name.startswith(".00001") for name in names), "it was to be killed while a shard was open"
    report = run_synthesis(prepare_synthesis(recipe_of(teacher), out))
    assert report.made == 2
    assert contents(out) == contents(undisturbed)


CLAIMING = """
import sys
from pathlib import Path
from anyflow_cli.synthesize.shard_locks import ShardLocks

with ShardLocks(Path(sys.argv[1]), 1, 2) as claims, claims.shard(1):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_ranks_share_the_work_by_shard(
    teacher: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process is making is left to it; when it dies, the next start takes its shard over."""
    out = tmp_path / "d"
    command = [sys.executable, "-c", CLAIMING, str(out)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        monkeypatch.setenv("WORLD_SIZE", "2")
        report = run_synthesis(prepare_synthesis(recipe_of(teacher), out))
        assert (report.made, report.complete) == (2, False)
        assert not (out / "00001.tar").exists()
        assert not (out / "manifest.json").exists()
        other.kill()
    report = run_synthesis(prepare_synthesis(recipe_of(teacher), out))
    assert (report.made, report.complete) == (1, True)
    assert contents(out) == contents(undisturbed)


def synthesize_together(teacher: Path, out: Path) -> None:
    """What each of two processes does: a data set of which one video is rejected once."""
    join_group()
    recipe = recipe_of(teacher)
    shared = recipe.model_copy(update={"launch": LaunchSection(context_parallel=2)})
    first, seen = distributed.rank() == 0, list[int]()

    def reject_third(x: Tensor, video: Tensor) -> str | None:
        seen.append(1)  # the other process would find nothing
        return "static" if len(seen) == 3 and first else find_defect(x, video)

    torch.distributed.barrier()
    with patch.object(synthesis, "find_defect", reject_third):
        report = run_synthesis(prepare_synthesis(shared, out))
    assert report.made == (3 if first else 0)
    torch.distributed.barrier()


def test_two_processes_share_each_video(teacher: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    assert start(2, synthesize_together, teacher, out) == [0, 0]
    assert verify(out).problems == ()
    assert [entry.index for entry in read_manifest(out).shards[2].rejected] == [4]
    made, alone = LatentData(out, TOKENS), LatentData(undisturbed, TOKENS)
    for index in range(4):
        torch.testing.assert_close(
            made.sample(index).latents, alone.sample(index).latents, rtol=1e-5, atol=1e-5
        )
    assert made.sample(4).facts["seed"] == attempt_seed(10, 4, 1)


def test_each_rank_begins_with_shards_of_its_own(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = prepare_synthesis(recipe_of(teacher), tmp_path / "d")
    for rank, order in (("0", [0, 2, 1]), ("1", [1, 0, 2])):
        monkeypatch.setenv("RANK", rank)
        assert job.missing() == order


def test_a_lost_index_is_written_again_without_the_models(
    teacher: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "d"
    shutil.copytree(undisturbed, out)
    (out / "00001.npy").unlink()
    monkeypatch.setattr(synthesis, "_source", lambda job: pytest.fail("a model was loaded"))
    assert run_synthesis(prepare_synthesis(recipe_of(teacher), out)).made == 0
    assert contents(out) == contents(undisturbed)


def rejecting(seeds: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the checks turn down what was sampled from these seeds."""
    sampled: list[int] = []
    latents = VideoSampler.latents

    def recorded(self: VideoSampler, prompts: Condition, seeds: list[int], *rest: Any) -> Iterator[Tensor]:
        sampled.extend(seeds)
        return latents(self, prompts, seeds, *rest)

    monkeypatch.setattr(VideoSampler, "latents", recorded)
    monkeypatch.setattr(synthesis, "find_defect", lambda latents, video: seeds.get(sampled.pop(0)))


def test_a_rejected_video_is_made_from_the_next_seed_of_its_index(
    teacher: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lost = {attempt_seed(10, 2, attempt): "frozen" for attempt in range(3)}
    rejecting({11: "black", **lost}, monkeypatch)
    with caplog.at_level(logging.WARNING):
        report = run_synthesis(prepare_synthesis(recipe_of(teacher), tmp_path / "d"))
    assert (report.samples, report.wanted, report.complete) == (4, 5, True)
    assert report.reasons == {"black": 1, "frozen": 3}
    assert report.rejected[0] == Rejection(1, "seed 11", "black")
    assert "seed 11 is black; trying the next seed" in caplog.text
    assert "is frozen; given up" in caplog.text
    mine, before = LatentData(tmp_path / "d", TOKENS), LatentData(undisturbed, TOKENS)
    facts = [mine.sample(position) for position in range(4)]
    assert [sample.index for sample in facts] == [0, 1, 3, 4]
    assert [sample.facts["seed"] for sample in facts] == [10, attempt_seed(10, 1, 1), 13, 14]
    assert torch.allclose(facts[2].latents, before.sample(3).latents, atol=1e-5)
    assert not torch.allclose(facts[1].latents, before.sample(1).latents, atol=0.1)
    assert verify(tmp_path / "d").problems == ()


def test_no_two_attempts_share_a_seed() -> None:
    seeds = {attempt_seed(10, index, attempt) for index in range(1000) for attempt in range(3)}
    assert len({fold_seed(seed) for seed in seeds}) == 3000


def test_a_shard_in_which_nothing_passes_ends_with_the_reasons(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesis, "find_defect", lambda latents, video: "black")
    with pytest.raises(AnyflowError, match=r"videos 0 to 1 passed the checks \(6 black\)"):
        run_synthesis(prepare_synthesis(recipe_of(teacher), tmp_path / "d"))
    assert not list((tmp_path / "d").glob("*.tar"))


def test_a_truncated_shard_is_named_and_not_overwritten(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    out.mkdir()
    for name, content in contents(undisturbed).items():
        (out / name).write_bytes(content[:-100] if name == "00001.tar" else content)
    before = contents(out)
    with pytest.raises(UsageError, match=r"00001\.tar has") as error:
        run_synthesis(prepare_synthesis(recipe_of(teacher), out))
    assert error.value.hint is not None
    assert "--verify" in error.value.hint
    assert contents(out) == before


def test_an_any_step_model_is_no_teacher(teacher: Path, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "anyflow", two_time_from(load_network(teacher)), teacher, {})
    with pytest.raises(UsageError, match="not a teacher"):
        run_synthesis(prepare_synthesis(recipe_of(folder), tmp_path / "d"))


@pytest.mark.parametrize(("frames", "height", "said"), [(10, 32, "10 frames"), (9, 36, "36x32")])
def test_shapes_the_vae_cannot_take_are_refused_before_sampling(
    teacher: Path, tmp_path: Path, frames: int, height: int, said: str
) -> None:
    recipe = recipe_of(teacher)
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"frames": frames, "height": height})}
    )
    with pytest.raises(UsageError, match=said):
        run_synthesis(prepare_synthesis(recipe, tmp_path / "d"))
    assert not list((tmp_path / "d").glob("*.tar"))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Clips of several kinds, of which three can be used."""
    folder = tmp_path / "videos"
    clip = render(WORLDS["shapes"].scene(1))
    write_mp4(folder / "a good.mp4", clip[:9, 16:48, 16:48] // 2 + 40, 16)
    write_mp4(folder / "b fast and large.mp4", clip, 32)
    write_mp4(folder / "c short.mp4", clip[:8], 16)
    write_mp4(folder / "d still.mp4", np.repeat(clip[:1], 33, 0), 16)
    (folder / "e broken.mp4").write_text("not a video")
    write_mp4(folder / "f no caption.mp4", clip, 16)
    write_mp4(folder / "g.mp4", clip, 16)
    for path in folder.glob("*.mp4"):
        if "no caption" not in path.name:
            path.with_suffix(".txt").write_text(f"caption of {path.stem}")
    return folder


def test_real_clips_are_encoded_resampled_or_named(
    teacher: Path, videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        report = run_synthesis(prepare_synthesis(recipe_of(teacher), tmp_path / "d", videos))
    assert (report.samples, report.wanted, report.complete) == (3, 7, True)
    reasons = {entry.what.removeprefix("clip "): entry.reason for entry in report.rejected}
    assert set(reasons) == {"c short.mp4", "d still.mp4", "e broken.mp4", "f no caption.mp4"}
    assert "too short: 8 frames" in reasons["c short.mp4"]
    assert reasons["d still.mp4"] == "frozen"
    assert "unreadable" in reasons["e broken.mp4"]
    assert "no caption" in reasons["f no caption.mp4"]
    assert all(f"{name} is left out" in caplog.text for name in reasons)
    assert "1 of 7 videos are left out, without a caption" in caplog.text
    for counted in ("1 clip: resampled from 32 to 16 fps", "2 clips: scaled from 64x64 to 32x32"):
        assert counted in caplog.text
    assert verify(tmp_path / "d").problems == ()
    samples = [LatentData(tmp_path / "d", TOKENS).sample(i) for i in range(3)]
    assert [s.caption for s in samples] == [
        "caption of a good",
        "caption of b fast and large",
        "caption of g",
    ]
    assert samples[0].facts["changes"] == []


def test_latents_of_a_clip_are_the_vaes(teacher: Path, videos: Path, tmp_path: Path) -> None:
    from anyflow_cli.data.video import ClipFormat, read_clip

    run_synthesis(prepare_synthesis(recipe_of(teacher), tmp_path / "d", videos))
    sample = LatentData(tmp_path / "d", TOKENS).sample(0)
    pixels = read_clip(videos / "a good.mp4", ClipFormat(9, 16, 32, 32)).pixels
    expected = VideoVAE.load(teacher).encode(from_pixels(pixels)[None])[0]
    assert torch.allclose(sample.latents, expected, atol=1e-5)


def test_clips_and_teacher_do_not_share_a_directory(teacher: Path, videos: Path, undisturbed: Path) -> None:
    with pytest.raises(UsageError, match="differs in kind"):
        prepare_synthesis(recipe_of(teacher), undisturbed, videos)


@pytest.mark.parametrize("changed", ["clip", "caption", "text_encoder", "vae", "tokenizer"])
def test_encodings_depend_on_the_content_of_what_they_are_made_from(
    teacher: Path, videos: Path, tmp_path: Path, changed: str
) -> None:
    """Every change keeps the size of its file, and its times as far as a program can set them."""
    model, clips, out = tmp_path / "wan", tmp_path / "clips", tmp_path / "d"
    shutil.copytree(teacher, model)
    shutil.copytree(videos, clips)
    run_synthesis(prepare_synthesis(recipe_of(model), out, clips))
    prepare_synthesis(recipe_of(model), out, clips)
    if changed in ("clip", "caption"):
        path = clips / ("g.mp4" if changed == "clip" else "g.txt")
    else:
        path = max((model / changed).iterdir(), key=lambda file: file.stat().st_size)
    content, times = bytearray(path.read_bytes()), path.stat()
    content[-1 if changed != "caption" else 0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match=r"differs in (clip_files|captions|encoder_files)") as error:
        prepare_synthesis(recipe_of(model), out, clips, choose_another="--runs")
    assert (
        error.value.hint == "Choose another --runs, remove that directory, or restore its settings and files."
    )


def test_a_teacher_of_other_weights_does_not_continue_a_data_set(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out, path = tmp_path / "d", teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copytree(undisturbed, out)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        with pytest.raises(UsageError, match="differs in transformer_files"):
            prepare_synthesis(recipe_of(teacher), out)
    finally:
        path.write_bytes(content)


def test_a_data_set_without_content_hashes_is_continued(
    teacher: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Version 0.1 wrote none."""
    out = tmp_path / "d"
    shutil.copytree(undisturbed, out)
    provenance = json.loads((out / "provenance.json").read_text())
    old = {key: value for key, value in provenance.items() if not key.endswith("_files")}
    (out / "provenance.json").write_text(json.dumps(old))
    (out / "00001.tar").unlink()
    assert run_synthesis(prepare_synthesis(recipe_of(teacher), out)).made == 1
    assert (out / "00001.tar").read_bytes() == (undisturbed / "00001.tar").read_bytes()


def test_videos_without_any_usable_caption_are_refused_before_a_model_is_loaded(
    teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    with pytest.raises(UsageError, match=r"None of the 1 videos in .* has a caption that can be used"):
        prepare_synthesis(recipe_of(teacher), tmp_path / "d", tmp_path / "clips")
