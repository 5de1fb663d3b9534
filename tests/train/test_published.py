"""Training on published data sets, from the command line: the same numbers as on the same samples in ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anyflow_cli.cli.app import main
from anyflow_cli.data.shards import write_negative
from anyflow_cli.model.encoders import TextEncoder
from anyflow_cli.recipe.compare import dump
from anyflow_cli.runs.paths import RunPaths
from anyflow_cli.utils.files import read_json
from tests.data.published import make_fastvideo, make_own, make_rcm
from tests.tiny_pipeline import make_wan_folder
from tests.train import ranks
from tests.train.stage import inputs_of, make_recipe, train

MAKERS = {"rcm": make_rcm, "fastvideo": make_fastvideo}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("wan") / "wan")


def own_data(directory: Path, kind: str, wan: Path) -> Path:
    """The samples of a published set in ours, with the teacher's embedding of the negative prompt."""
    make_own(directory, kind)
    encoder = TextEncoder.load(wan)
    write_negative(directory, encoder.encode([""], 8)[0, : encoder.tokens([""])[0]])
    manifest = read_json(directory / "manifest.json")
    del manifest["negative_sha256"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def trained(wan: Path, data: Path, directory: Path, *more: str) -> dict[str, torch.Tensor]:
    """Weights after two steps of ``train-flowmap``."""
    directory.mkdir(exist_ok=True)
    (directory / "test.yaml").write_text(dump(make_recipe(wan, data)))
    assert main(["train-flowmap", "-r", f"{directory}/test.yaml", "--runs", f"{directory}/runs", *more]) == 0
    (weights,) = (directory / "runs/test/train-flowmap/model/transformer").glob("*.safetensors")
    return load_file(weights)


@pytest.mark.parametrize("kind", MAKERS)
def test_training_equals_that_on_our_format_to_the_bit(kind: str, wan: Path, tmp_path: Path) -> None:
    theirs = trained(wan, MAKERS[kind](tmp_path / "theirs"), tmp_path / "a")
    ours = trained(wan, own_data(tmp_path / "ours", kind, wan), tmp_path / "b")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert sorted(path.name[:5] for path in (tmp_path / "a/runs/test/cache").iterdir()) == ["index", "text-"]


@pytest.mark.parametrize("make", [make_rcm, make_fastvideo])
def test_a_dry_run_refuses_latents_of_another_size(
    make: Callable[[Path], Path], wan: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "test.yaml").write_text(dump(make_recipe(wan, make(tmp_path / "theirs"))))
    command = ["train-flowmap", "-r", f"{tmp_path}/test.yaml", "--runs", f"{tmp_path}/runs", "--dry-run"]
    assert main(command) == 0
    assert main([*command, "--set", "model.height=64"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "theirs has latents of 3 frames of 4x4" in said
    assert "model.height=32" in said
    assert not (tmp_path / "runs").exists()


def one_rank(wan: Path, data: Path, directory: Path) -> None:
    recipe = make_recipe(wan, data)
    train(recipe, inputs_of("train-flowmap", recipe, RunPaths(directory / "runs", "test")))


@pytest.mark.slow
def test_several_processes_share_one_index(wan: Path, tmp_path: Path) -> None:
    data = make_rcm(tmp_path / "theirs")
    alone = trained(wan, data, tmp_path / "alone")
    assert ranks.start(2, one_rank, wan, data, tmp_path / "two") == [0, 0]
    (file,) = (tmp_path / "two/runs/test/train-flowmap/model/transformer").glob("*.safetensors")
    for name, value in load_file(file).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


def refused(capsys: Capture, wan: Path, data: Path, directory: Path, *more: str) -> str:
    (directory / "test.yaml").write_text(dump(make_recipe(wan, data)))
    assert main(["train-flowmap", "-r", f"{directory}/test.yaml", "--runs", f"{directory}/runs", *more]) == 2
    return capsys.readouterr().err


def test_another_size_is_refused_with_the_settings_that_fit(
    wan: Path, tmp_path: Path, capsys: Capture
) -> None:
    data = make_fastvideo(tmp_path / "d", frames=5)
    said = " ".join(refused(capsys, wan, data, tmp_path).split())
    assert "has latents of 5 frames of 4x4; the recipe's 9 frames of 32x32 have 3 of 4x4" in said
    assert "model.frames=17, model.height=32, model.width=32; or cut" in said
    causal = ["--set", "model.causal.partition=[1,2]", "--set", "model.causal.compressed_patch=[4,4]"]
    said = " ".join(refused(capsys, wan, data, tmp_path, *causal).split())
    assert "model.causal.partition=[1,2,2]" in said


def test_a_dry_run_refuses_another_size(wan: Path, tmp_path: Path, capsys: Capture) -> None:
    data = own_data(tmp_path / "d", "rcm", wan)
    said = refused(capsys, wan, data, tmp_path, "--set", "model.frames=5", "--dry-run")
    assert "has latents of 3 frames of 4x4" in " ".join(said.split())


def test_longer_clips_are_cut_by_a_key_that_a_run_keeps(wan: Path, tmp_path: Path, capsys: Capture) -> None:
    data = make_fastvideo(tmp_path / "d", frames=5)
    cut = trained(wan, data, tmp_path, "--set", "data.truncate=true")
    capsys.readouterr()
    assert all(value.isfinite().all() for value in cut.values())
    assert "data.truncate" in refused(capsys, wan, data, tmp_path)


def test_a_run_refuses_other_data_at_the_same_place(wan: Path, tmp_path: Path, capsys: Capture) -> None:
    trained(wan, make_rcm(tmp_path / "d"), tmp_path)
    (tmp_path / "d" / "shard_000002.tar").unlink()
    capsys.readouterr()
    assert "holds a run from another data" in refused(capsys, wan, tmp_path / "d", tmp_path)


def test_a_dry_run_names_the_format(wan: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "test.yaml").write_text(dump(make_recipe(wan, make_rcm(tmp_path / "d"))))
    assert (
        main(["train-flowmap", "-r", f"{tmp_path}/test.yaml", "--runs", f"{tmp_path}/runs", "--dry-run"]) == 0
    )
    assert "rCM (WebDataset), 3 files" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()


def test_verify_names_files_and_samples(tmp_path: Path, capsys: Capture) -> None:
    data = make_rcm(tmp_path / "d", count=3)
    assert main(["synthesize", "--verify", "--out", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    content = bytearray((data / "shard_000000.tar").read_bytes())
    at = content.index(b"data.pkl")
    content[at - 40 : at] = bytes(40)
    (data / "shard_000000.tar").write_bytes(content)
    assert main(["synthesize", "--verify", "--out", str(data)]) == 1
    assert "Sample 000000000 of" in " ".join(capsys.readouterr().err.split())
