"""``anyflow synthesize`` as its users see it: exit codes, the two streams, nothing written on wrong use."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest

from anyflow_cli.cli import app
from anyflow_cli.data.clips import draw_clips
from tests.data.datasets import make_data
from tests.tiny_pipeline import make_wan_folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wan_folder(tmp_path_factory.mktemp("teacher") / "wan")


@pytest.fixture
def small(teacher: Path, tmp_path: Path) -> list[str]:
    """Arguments that make the default recipe small."""
    values = {
        "model.teacher": teacher, "model.height": 32, "model.width": 32, "model.frames": 9,
        "synthesize.steps": 2, "synthesize.batch_size": 2, "synthesize.shard_size": 2,
    }  # fmt: skip
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["synthesize", *settings, "--runs", str(tmp_path / "runs"), "--count", "3"]


def test_making_continuing_and_verifying(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "runs" / "tiny" / "data"
    for made in (2, 0):
        assert app.main([*small, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result == {
            "data": str(data), "samples": 3, "wanted": 3, "shards": 2, "made": made, "rejected": {},
            "complete": True,
        }  # fmt: skip
    assert app.main([*small, "--verify"]) == 0
    assert app.main([*small, "--seed", "5"]) == 2
    assert "differs in" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main([*small, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["videos"], plan["shards"], plan["complete already"]) == (3, 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_prompts_from_a_file(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n[bold]/../x\n")
    out = tmp_path / "out"
    assert (
        app.main([*small[:-2], "--prompts", str(tmp_path / "p.txt"), "--out", str(out), "--count", "2"]) == 0
    )
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("absent.txt", None), ("empty.txt", b""), ("binary.txt", b"\0\1\2"), ("long.txt", b"x" * 5000)],
)
def test_bad_prompt_files(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert app.main([*small, "--prompts", str(tmp_path / name)]) == 2
    streams = capsys.readouterr()
    error, hint = streams.err.strip().splitlines()
    assert error.startswith("error: ")
    assert name in error
    assert hint.startswith("hint: ")
    assert streams.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--count", "0"],
        ["--set", "synthesize.guidence=3"],
        ["--prompts", "p.txt", "--from-videos", "."],
        ["--from-videos", "absent"],
        ["--verify", "--out", "absent"],
    ],
)
def test_wrong_use(small: list[str], capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    arguments = small[:-2] if "--from-videos" in wrong else small
    assert app.main([*arguments, *wrong]) == 2
    assert "hint: " in capsys.readouterr().err


def test_verifying_a_damaged_data_set_fails_and_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = make_data(tmp_path / "d") / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert app.main(["synthesize", "--verify", "--out", str(tmp_path / "d"), "--json"]) == 1
    streams = capsys.readouterr()
    assert len(json.loads(streams.out)["problems"]) == 1
    assert "00001.tar" in streams.err
    assert "has 1 problem." in streams.err


def test_several_processes_share_the_shards(
    small: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first process waits for the other, so that the report is that of both."""
    assert app.main([*small[:-1], "6", "--nproc", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["samples"], result["shards"], result["complete"]) == (6, 3, True)
    assert app.main([*small[:-1], "6", "--verify"]) == 0


def test_a_data_set_elsewhere_is_verified_but_not_written(
    tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = fsspec.filesystem("memory")
    for path in make_data(tmp_path / "d").iterdir():
        files.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    address = "memory://bucket/data"
    for named in (["--out", address], ["--set", f"data.path={address}"]):
        assert app.main(["synthesize", "--verify", *named, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["samples"] == 10
    for extra in ([], ["--dry-run"]):
        assert app.main([*small, "--out", address, *extra]) == 2
        assert "is not a local directory" in capsys.readouterr().err
    files.rm("/bucket", recursive=True)
    assert not Path("memory:").exists()


def test_finetune_data_are_encoded_again_only_if_told_to(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clip swapped for one of equal size is noticed, and the hint names an option of finetune."""
    draw_clips(tmp_path / "clips", "shapes", 2)
    command = ["finetune", *small[1:-2], "--data", str(tmp_path / "clips"), "--dry-run"]
    encode = ["synthesize", *small[1:-4], "--from-videos", str(tmp_path / "clips")]
    out = tmp_path / "runs" / "tiny" / "finetune-data"
    assert app.main([*encode, "--out", str(out)]) == 0
    clip = tmp_path / "clips" / "00000.mp4"
    clip.write_bytes(clip.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    assert app.main(command) == 2
    error = capsys.readouterr().err
    assert "differs in clip_files" in error
    assert "Choose another --runs, remove that directory" in error
