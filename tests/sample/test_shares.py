"""Several processes sample: videos of their own, or one together; the files are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anyflow_cli.cli.app import main
from anyflow_cli.model.causal import causal_from
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.pipeline_io import load_network, resolve_pipeline, save_pipeline
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.sample.sampler import VideoSampler
from anyflow_cli.sample.shares import VideoShare
from anyflow_cli.utils import distributed
from anyflow_cli.utils.distributed import join_group
from tests.model.helpers import distance
from tests.train.ranks import start

PROMPTS = ["a small red circle moving left", "a large blue square moving up", "a green triangle"]
COMMON = ["--nfe", "2", "--set", "model.precision=fp32", "--json"]


@pytest.mark.parametrize(
    ("videos", "size", "world", "wanted"),
    [(1, None, 1, (1, 1)), (1, None, 4, (4, 1)), (2, None, 4, (2, 2)), (3, None, 4, (2, 2)),
     (9, None, 4, (1, 4)), (9, 2, 4, (2, 2)), (5, None, 6, (2, 3)), (0, None, 2, (2, 1))],
)  # fmt: skip
def test_processes_share_a_video_where_there_are_too_few(
    videos: int, size: int | None, world: int, wanted: tuple[int, int]
) -> None:
    share = VideoShare.of_process(videos, size, world)
    assert (share.size, share.groups) == wanted


def test_the_videos_of_all_groups_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [VideoShare(2, group, 2, writes) for group in (0, 1) for writes in (True, False)]
    own = [share.own(range(5)) for share in shares]
    monkeypatch.setattr("anyflow_cli.sample.shares.from_all", lambda value: own)
    assert [share.joined(part, 5) for share, part in zip(shares, own, strict=True)] == [[0, 1, 2, 3, 4]] * 4


def sample_together(directory: Path) -> None:
    """What each of two processes does; several commands in turn stay in one group."""
    distributed._leave_group = lambda: None
    join_group()
    recipe = load_recipe("tiny", ["model.precision=fp32"])
    shared, alone = (VideoSampler.load("tiny-anyflow", recipe, device="cpu", context=n) for n in (2, 1))
    one, other = (next(sampler.latents(PROMPTS[:1], [3], 2)) for sampler in (shared, alone))
    assert distance(one, other) < 1e-5
    pixels = [sampler.vae.decode(one) for sampler in (shared, alone)]
    assert distance(*pixels) < 1e-5
    short = load_recipe("tiny", ["model.precision=fp32", "model.frames=9"])
    streams = [
        np.concatenate(list(sampler.stream(PROMPTS[0], 3, 2))).astype(int)
        for sampler in (VideoSampler.load(str(directory / "causal"), short, context=n) for n in (2, 1))
    ]
    assert np.abs(streams[0] - streams[1]).max() <= 1
    runs = ["--runs", str(directory)]
    for prompts, more in ((PROMPTS[:1], []), (PROMPTS, []), (PROMPTS, ["launch.context_parallel=2"])):
        named = [part for prompt in prompts for part in ("--prompt", prompt)]
        keys = [part for key in more for part in ("--set", key)]
        torch.distributed.barrier()
        assert main(["sample", *named, *COMMON, *runs, *keys]) == 0
    for name, context in (("shared", "2"), ("divided", "null")):
        torch.distributed.barrier()
        keys = [f"launch.context_parallel={context}", "evaluate.teacher=false"]
        more = [part for key in keys for part in ("--set", key)]
        assert main(["evaluate", "--limit", "2", *COMMON, *more, "--out", str(directory / name)]) == 0


def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    folder, chunks = resolve_pipeline("tiny-anyflow"), CausalConfig(full_chunks=2, partition=(1, 2))
    save_pipeline(tmp_path / "causal", causal_from(load_network(folder), chunks), folder, {})
    assert start(2, sample_together, tmp_path) == [0, 0]
    folders = sorted((tmp_path / "tiny" / "samples").iterdir())
    assert [folder.name for folder in folders] == ["0001", "0002", "0003"]
    for folder, prompts in zip(folders, (PROMPTS[:1], PROMPTS, PROMPTS), strict=True):
        record = json.loads((folder / "samples.json").read_text())
        assert [entry["prompt"] for entry in record["samples"]] == prompts
        files = {entry["file"] for entry in record["samples"]}
        assert {path.name for path in folder.iterdir()} == files | {"sheet.png", "samples.json"}
        assert all(entry["network_seconds"] > 0 for entry in record["samples"])
    evaluations = {name: records_of(tmp_path / name) for name in ("shared", "divided")}
    assert {name: [len(part) for part in parts] for name, parts in evaluations.items()} == {
        "shared": [2], "divided": [1, 1],
    }  # fmt: skip
    scores = [
        {one["prompt"]: one["score"] for part in parts for one in part} for parts in evaluations.values()
    ]
    assert scores[0].keys() == scores[1].keys()


def records_of(out: Path) -> list[list[dict[str, Any]]]:
    """Records of an evaluation's videos, by the process that wrote them."""
    files = sorted(out.glob("*/scores*.jsonl"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def test_processes_that_form_no_groups_are_refused_by_a_dry_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for verb in (["sample", "--prompt", "a circle"], ["evaluate"], ["distill"]):
        assert main([*verb, "--dry-run", "--nproc", "3", "--set", "launch.context_parallel=2"]) == 2
        shown = capsys.readouterr().err
        assert "launch.context_parallel is 2, and 3 processes do not form groups of 2" in shown
    pipeline = str(resolve_pipeline("tiny"))
    together = ["--nproc", "2", "--set", "launch.context_parallel=2", "--dry-run"]
    assert main(["evaluate", "--pipeline", pipeline, *together]) == 2
    assert "samples each video with one process" in capsys.readouterr().err
    assert main(["sample", "--prompt", "a circle", "--dry-run", "--nproc", "4"]) == 0
    assert "4 share the tokens of each video" in capsys.readouterr().out
    together = ["--nproc", "4", "--set", "launch.context_parallel=2", "--dry-run", "--json"]
    assert main(["evaluate", *together]) == 0
    assert "2 groups of 2, which share the tokens of each video" in capsys.readouterr().out
