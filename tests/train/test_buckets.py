"""Data sets of several sizes and lengths: encoded, shown, drawn batch by batch, trained on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anyflow_cli.cli.app import main
from anyflow_cli.data.dataset import Batches, LatentData
from anyflow_cli.data.shards import (
    LatentSample,
    bucketed_ranges,
    read_manifest,
    shard_path,
    write_manifest,
    write_negative,
    write_shard,
)
from anyflow_cli.data.verify import verify
from anyflow_cli.data.video import write_mp4
from anyflow_cli.errors import UsageError
from anyflow_cli.recipe.compare import dump
from tests.tiny_pipeline import CHANNELS, TEXT_DIM, make_i2v_folder, make_wan_folder
from tests.train.small import same_run
from tests.train.stage import inputs_of, make_recipe, paths, train

Capture = pytest.CaptureFixture[str]
COUNTS = {(3, 4, 4): 10, (2, 4, 4): 6, (3, 2, 4): 4, (1, 4, 4): 5}  # F, h, w -> samples


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


def make_buckets(directory: Path, counts: dict[tuple[int, int, int], int] = COUNTS) -> Path:
    """Random latents in several shapes."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shapes = [shape for shape, count in counts.items() for _ in range(count)]
    records = []
    for number, indices in enumerate(bucketed_ranges(list(counts.values()), 4)):
        samples = [
            LatentSample(
                index, f"clip {index}",
                torch.randn(shapes[index][0], CHANNELS, *shapes[index][1:], generator=generator),
                torch.randn(5, TEXT_DIM, generator=generator),
            )
            for index in indices
        ]  # fmt: skip
        records.append(write_shard(shard_path(directory, number), samples))
    write_negative(directory, torch.zeros(1, TEXT_DIM))
    write_manifest(directory, records, {"buckets": []})
    return directory


def test_no_shard_has_two_buckets() -> None:
    assert bucketed_ranges([5, 2], 4) == [range(4), range(4, 5), range(5, 7)]
    assert bucketed_ranges([6], 4) == [range(4), range(4, 6)]


def test_a_data_set_of_several_shapes_is_of_version_2(tmp_path: Path) -> None:
    data = make_buckets(tmp_path / "d")
    manifest = read_manifest(data)
    assert (manifest.version, manifest.latent_shape) == (2, (3, CHANNELS, 4, 4))
    assert verify(data).problems == ()
    assert [(b.shape[0], *b.shape[2:]) for b in LatentData(data, 8).buckets] == [
        (3, 4, 4), (2, 4, 4), (3, 2, 4), (1, 4, 4)
    ]  # fmt: skip
    assert read_manifest(make_buckets(tmp_path / "one", {(3, 4, 4): 5})).version == 1


def test_every_batch_has_one_shape_and_every_clip_is_drawn(tmp_path: Path) -> None:
    data = LatentData(make_buckets(tmp_path / "d"), 8)
    batches = Batches(data, 2, seed=3)
    steps = [batches.positions(step) for step in range(50)]  # four epochs of 25 clips
    seen = Counter(position for positions in steps for position in positions)
    assert set(seen) == set(range(25))
    assert all(count == 4 for count in seen.values())
    turns = Counter(batches.turn(step)[0] for step in range(50))
    assert turns == {0: 20, 1: 12, 2: 8, 3: 10}
    first = [batches.turn(step)[0] for step in range(12)]
    assert first != sorted(first)  # buckets alternate
    assert batches.load(0).latents.ndim == 5


def test_the_bucket_of_a_step_follows_from_seed_and_step(tmp_path: Path) -> None:
    data = LatentData(make_buckets(tmp_path / "d"), 8)
    one, other = (Batches(data, 2, seed=3) for _ in range(2))
    backwards = [other.positions(step) for step in reversed(range(40))]
    assert [one.positions(step) for step in range(40)] == backwards[::-1]
    assert [one.turn(s) for s in range(40)] != [Batches(data, 2, seed=4).turn(s) for s in range(40)]
    parts = [one.load(7, slice(rank, None, 2)).latents for rank in range(2)]
    assert torch.equal(torch.cat(parts), one.load(7).latents)


def test_a_bucket_smaller_than_a_batch_is_drawn_in_proportion(tmp_path: Path) -> None:
    data = LatentData(make_buckets(tmp_path / "d", {(3, 4, 4): 7, (1, 4, 4): 1}), 8)
    turns = Counter(Batches(data, 4, seed=0).turn(step)[0] for step in range(64))
    assert turns == {0: 56, 1: 8}


def test_a_corrupt_sample_is_replaced_by_one_of_its_shape(tmp_path: Path) -> None:
    path = make_buckets(tmp_path / "d")
    content = bytearray((path / "00006.tar").read_bytes())  # the last shard: pictures
    content[600] ^= 1
    (path / "00006.tar").write_bytes(content)
    data = LatentData(path, 8)
    (bucket,) = [bucket for bucket in data.buckets if bucket.shape[0] == 1]
    batch = data.batch(bucket.positions)
    assert len(batch.replaced) == 1
    assert batch.latents.shape[1] == 1


def test_training_on_buckets_resumes_to_the_bit(wan: Path, tmp_path: Path) -> None:
    data = make_buckets(tmp_path / "d")
    settings = {"train_flowmap": {"steps": 8, "preview_every": 4, "preview_prompts": 1}}
    whole, halves = (make_recipe(wan, data, **settings) for _ in range(2))
    train(whole, inputs_of("train-flowmap", whole, paths(tmp_path / "a")))
    first = make_recipe(wan, data, train_flowmap=settings["train_flowmap"] | {"steps": 3})
    for recipe in (first, halves):
        train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path / "b")))
    runs = [paths(tmp_path / place).home / "train-flowmap" for place in "ab"]
    same_run(*runs)


@pytest.mark.parametrize("verb", ["train-flowmap", "distill"])
def test_a_causal_model_takes_the_lengths_that_its_chunks_make_up(
    wan: Path, tmp_path: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = {"causal": {"partition": (1, 2), "full_chunks": 2, "compressed_patch": (2, 2)}}
    recipe = make_recipe(wan, make_buckets(tmp_path / "d"), model=model, train_flowmap={"steps": 8},
                         distill={"steps": 8})  # fmt: skip
    train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
    assert "6 samples of 2 latent frames are left out" in caplog.text
    if verb == "distill":
        train(recipe, inputs_of("distill", recipe, paths(tmp_path)))


def test_the_largest_bucket_is_the_recipes(wan: Path, tmp_path: Path) -> None:
    recipe = make_recipe(wan, make_buckets(tmp_path / "d", {(2, 4, 4): 4, (1, 4, 4): 4}))
    with pytest.raises(UsageError, match="latents of 2 frames of 4x4") as error:
        train(recipe, inputs_of("train-flowmap", recipe, paths(tmp_path)))
    assert "model.frames=5" in (error.value.hint or "")


def moving(frames: int, height: int, width: int) -> Any:
    noise = np.random.default_rng(0).integers(60, 200, (frames, height, width, 3))
    return noise.astype(np.uint8)


def test_clips_and_pictures_are_encoded_into_buckets(wan: Path, tmp_path: Path, capsys: Capture) -> None:
    videos = tmp_path / "videos"
    write_mp4(videos / "long.mp4", moving(30, 32, 32), 16)
    write_mp4(videos / "wide.mp4", moving(12, 32, 64), 16)
    Image.fromarray(moving(1, 40, 40)[0]).save(videos / "picture.png")
    rows = [f'{{"file_name": "{file.name}", "text": "a caption"}}' for file in sorted(videos.iterdir())]
    (videos / "metadata.jsonl").write_text("\n".join(rows))
    made = {"clips": "slide", "buckets": ((16, 32, 9), (32, 32, 1)), "shard_size": 2}
    (tmp_path / "test.yaml").write_text(dump(make_recipe(wan, "", synthesize=made, data={"path": None})))
    command = ["-r", f"{tmp_path}/test.yaml", "--runs", f"{tmp_path}/runs"]
    assert main(["synthesize", *command, "--from-videos", str(videos), "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 9 frames of 32x32, 1 of 9 frames of 16x32, 1 of 1 frames of 32x32" in said
    assert main(["synthesize", *command, "--from-videos", str(videos), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 5
    out = tmp_path / "runs" / "test" / "data"
    assert verify(out).problems == ()
    data = LatentData(out, 8)
    assert [(b.shape[0], b.shape[2], b.shape[3], len(b.positions)) for b in data.buckets] == [
        (3, 4, 4, 3), (3, 2, 4, 1), (1, 4, 4, 1)
    ]  # fmt: skip
    assert [data.sample(i).facts.get("start", 0) for i in range(3)] == [0, 9, 18]
    assert main(["train-flowmap", *command, "--set", "train_flowmap.steps=5"]) == 0
    other = [*command, "--from-videos", str(videos), "--set", "synthesize.clips=head"]
    assert main(["synthesize", *other]) == 2
    assert "holds another data set; it differs in" in " ".join(capsys.readouterr().err.split())


def test_buckets_that_do_not_fit_the_model_are_refused(capsys: Capture) -> None:
    for buckets, said in (
        ("[[64,64,37]]", "larger than the model's own"),
        ("[[20,32,9]]", "multiples of 16"),
    ):
        assert main(["synthesize", "--set", f"synthesize.buckets={buckets}", "--dry-run"]) == 2
        assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_plan_names_the_largest_bucket(capsys: Capture) -> None:
    assert main(["plan", "-r", "tiny", "--set", "synthesize.buckets=[[32,64,9]]"]) == 0
    assert "the largest of 2 buckets" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("kind", "rule"), [("2.1 I2V", "first"), ("2.1 FLF2V", "first-last")])
def test_a_clip_gives_a_picture_of_its_buckets_size(
    tmp_path: Path, capsys: Capture, kind: str, rule: str
) -> None:
    videos = tmp_path / "videos"
    for name, frames, size in (("long", 9, (32, 32)), ("wide", 12, (32, 64)), ("short", 5, (32, 32))):
        write_mp4(videos / f"{name}.mp4", moving(frames, *size), 16)
        (videos / f"{name}.txt").write_text("a caption")
    teacher = make_i2v_folder(tmp_path / "wan", kind)
    made = {"clips": "slide", "buckets": ((16, 32, 9), (32, 32, 5)), "shard_size": 2}
    recipe = make_recipe(
        teacher,
        "",
        model={"pictures": rule},
        synthesize=made,
        data={"path": None},
        train_flowmap={"steps": 6},
    )
    (tmp_path / "test.yaml").write_text(dump(recipe))
    command = ["-r", f"{tmp_path}/test.yaml", "--runs", f"{tmp_path}/runs"]
    assert main(["synthesize", *command, "--from-videos", str(videos)]) == 0
    data = LatentData(tmp_path / "runs" / "test" / "data", 8)
    given = [data.batch(bucket.positions[:1]).condition for bucket in data.buckets]
    shapes = [one.channels.shape[1:] for one in given if one.channels is not None]
    assert shapes == [(3, 12, 4, 4), (2, 12, 4, 4), (3, 12, 2, 4)]
    for one in given:
        assert one.channels is not None
        assert one.channels[:, 0, :4].eq(1).all()
        assert one.channels[:, -1, 3].eq(float(rule == "first-last")).all()
    assert main(["train-flowmap", *command]) == 0
    assert main(["synthesize", *command, "--set", "synthesize.buckets=[[32,32,1]]", "--dry-run"]) == 2
    assert "no bucket of one frame, which the model is given" in " ".join(capsys.readouterr().err.split())
