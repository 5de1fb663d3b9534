"""``anyflow sample`` and ``anyflow doctor`` as users see them: files, messages and refusals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anyflow_cli.cli import app
from anyflow_cli.data.video import ClipFormat, read_start, write_mp4
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import load_network, save_pipeline
from anyflow_cli.utils.contact_sheet import LIGHT_SHEET
from anyflow_cli.utils.run_lock import RunLock
from tests.tiny_pipeline import make_wan_folder

Run = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a teacher, ``wan``, and an any-step model, ``any``."""
    folder = tmp_path_factory.mktemp("models")
    wan = make_wan_folder(folder / "wan")
    save_pipeline(folder / "any", two_time_from(load_network(wan)), wan, {})
    return folder


@pytest.fixture
def small(models: Path, tmp_path: Path) -> list[str]:
    """The command with the default recipe made small."""
    values = {
        "model.teacher": models / "wan", "model.pretrained_any_step": models / "any",
        "model.precision": "fp32",
        "model.height": 32, "model.width": 32, "model.frames": 5, "sample.teacher_steps": 3,
    }  # fmt: skip
    settings = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return ["sample", *settings, "--runs", str(tmp_path / "runs")]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_prompts_seeds_and_steps_each_give_a_video(small: list[str], tmp_path: Path, capsys: Run) -> None:
    (tmp_path / "p.txt").write_text("a circle\na [bold]square[/bold]\n")
    given = [
        "-p",
        "../../x",
        "--prompts",
        str(tmp_path / "p.txt"),
        "--nfe",
        "1,2",
        "--count",
        "2",
        "--seed",
        "5",
    ]
    assert app.main([*small, *given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(s["nfe"], s["seed"]) for s in result["samples"]] == [(n, s) for n in (1, 2) for s in (5, 6) * 3]
    assert {s["prompt"] for s in result["samples"]} == {"../../x", "a circle", "a [bold]square[/bold]"}
    assert files(tmp_path / "runs") == {"sheet.png", "samples.json", *(s["file"] for s in result["samples"])}
    assert Path(result["out"]) == tmp_path / "runs" / "tiny" / "samples" / "0001"


def test_a_second_sampling_leaves_the_first_alone(small: list[str], tmp_path: Path, capsys: Run) -> None:
    for number in ("0001", "0002"):
        assert app.main([*small, "-p", "a circle", "--nfe", "1"]) == 0
        sheet = capsys.readouterr().out.splitlines()[0]
        assert sheet == str(tmp_path / "runs" / "tiny" / "samples" / number / "sheet.png")


def test_the_model_used_is_said(small: list[str], models: Path, tmp_path: Path, capsys: Run) -> None:
    assert app.main([*small, "-p", "a circle", "--dry-run"]) == 0
    assert f"Model: {models / 'any'} (the recipe's pretrained model" in capsys.readouterr().err
    trained = tmp_path / "runs" / "tiny" / "distill" / "model"
    save_pipeline(trained, load_network(models / "any"), models / "wan", {})
    assert app.main([*small, "-p", "a circle", "--nfe", "1"]) == 0
    assert f"Model: {trained} (the furthest model trained with recipe tiny)" in capsys.readouterr().err


def test_a_run_is_an_address_for_its_model(small: list[str], models: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_pipeline(run / "model", load_network(models / "any"), models / "wan", {})
    assert app.main([*small, "-p", "a circle", "--nfe", "1", "--model", str(run)]) == 0


def test_the_teacher_takes_its_own_steps_twice(small: list[str], tmp_path: Path, capsys: Run) -> None:
    assert app.main([*small, "-p", "a circle", "--teacher", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["sampler"] == "euler"
    assert result["samples"][0]["file"].endswith("-steps3x2.mp4")


def test_without_a_prompt_a_few_of_the_recipe_are_shown(
    small: list[str], tmp_path: Path, capsys: Run
) -> None:
    assert app.main([*small, "--nfe", "1", "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["prompts"] == 4
    assert "No prompt was given" in err
    assert not (tmp_path / "runs").exists()


def test_a_model_without_a_recipe_is_sampled_as_its_family_is(tmp_path: Path, capsys: Run) -> None:
    """Not with the 64x64 and 32 tokens of recipe tiny."""
    command = ["sample", "-p", "a circle", "--runs", str(tmp_path), "--dry-run", "--model"]
    for model, recipe, shape in (
        (
            "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",
            "bidirectional1b",
            "81 frames of 480x832 at 16 fps, shift 5",
        ),
        ("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", "causal1b", "81 frames of 480x832 at 16 fps, shift 5"),
        ("tiny-anyflow", "tiny", "33 frames of 64x64 at 16 fps, shift 9, up to 32 tokens"),
    ):
        assert app.main([*command, model]) == 0
        assert f"Recipe {recipe}: {shape}" in capsys.readouterr().err
    assert app.main([*command, "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "-r", "tiny"]) == 0
    assert "Recipe tiny: 33 frames" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", str(2**63), str(2**64)])
def test_a_seed_out_of_range_is_a_mistake_of_the_recipe(small: list[str], seed: str, capsys: Run) -> None:
    assert app.main([*small, "-p", "a", f"--seed={seed}"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_seeds_may_not_count_beyond_the_last(small: list[str], capsys: Run) -> None:
    assert app.main([*small, "-p", "a", "--seed", str(2**63 - 1), "--count", "2"]) == 2
    assert "--count" in capsys.readouterr().err
    assert app.main([*small, "-p", "a", "--seed", str(2**63 - 1), "--nfe", "1"]) == 0


def test_a_prompt_that_is_cut_is_said(small: list[str], capsys: Run) -> None:
    assert app.main([*small, "-p", "a circle " * 20, "--nfe", "1"]) == 0
    assert "Only the first 32 tokens are read of: a circle a circle" in capsys.readouterr().err


WRONG = {
    "no steps": (["-p", "a", "--nfe", "0"], "--nfe"),
    "steps that are no numbers": (
        ["-p", "a", "--nfe", "4,x"],
        "--nfe takes step counts from 1 to 10000 such as 1,4,32, not '4,x'",
    ),
    "no step counts": (["-p", "a", "--nfe", ""], "--nfe"),
    "a chunk without steps": (["-p", "a", "--nfe", "8:0"], "--nfe"),
    "frames that the VAE cannot make": (["-p", "a", "--frames", "8"], "must be 4 n + 1"),
    "a later prompt without a frame": (
        ["-p", "a", "--then", "a circle"],
        "--then takes a frame",
    ),
    "a later prompt without words": (["-p", "a", "--then", "3:"], "--then takes a frame"),
    "a later prompt after the end": (["-p", "a", "--then", "5: b"], "the video has the frames 0 to 4"),
    "an empty prompt": (["-p", "  "], "A prompt is empty."),
    "a long prompt": (["-p", "a" * 5000], "5,000 characters"),
    "no prompt file": (["--prompts", "none.txt"], "none.txt does not exist"),
    "no model": (["-p", "a", "--model", "no/where/at/all"], "There is no model at no/where/at/all."),
    "no seeds": (["-p", "a", "--count", "0"], "--count"),
    "an unknown sampler": (["-p", "a", "--sampler", "heun"], "--sampler"),
    "steps twice": (["-p", "a", "--nfe", "4", "--preview"], "--nfe and --preview both say how many steps"),
    "a preview in a time": (["-p", "a", "--preview", "--latency-budget", "3"], "both say how many steps"),
    "a refinement of another prompt": (["-p", "a", "--refine", "x"], "Omit --prompt"),
    "a refinement with another seed": (["--seed", "1", "--refine", "x"], "Omit --seed"),
    "a recipe key": (["-p", "a", "--set", "sample.nfee=4"], "sample.nfe"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_sentence_a_hint_and_exit_code_2(
    small: list[str], tmp_path: Path, capsys: Run, given: list[str], message: str
) -> None:
    assert app.main([*small, *given]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "hint: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


def test_a_used_directory_is_left_alone(small: list[str], tmp_path: Path, capsys: Run) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for extra in ([], ["--dry-run"]):
        assert app.main([*small, "-p", "a", "--out", str(mine), *extra]) == 2
        assert "already contains files" in capsys.readouterr().err
    assert files(mine) == {"thesis.txt"}


def test_a_second_sampling_into_a_directory_is_refused_at_once(
    small: list[str], tmp_path: Path, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*small, "-p", "a", "--nfe", "1", "--out"]
    with RunLock(tmp_path / "mine"), monkeypatch.context() as patch:
        patch.setattr("anyflow_cli.sample.sampler.VideoSampler.load", None)  # no model is opened before
        assert app.main([*command, str(tmp_path / "mine")]) == 2
        assert f"{tmp_path / 'mine'} is in use by process {os.getpid()}" in capsys.readouterr().err
    with RunLock(tmp_path / "mine"):
        assert app.main([*command, str(tmp_path / "other")]) == 0
        assert app.main(command[:-1]) == 0
    assert app.main([*command, str(tmp_path / "mine")]) == 0
    assert app.main([*command, str(tmp_path / "mine")]) == 2
    assert "already contains files" in capsys.readouterr().err


def test_a_model_of_another_kind_writes_nothing(
    small: list[str], models: Path, tmp_path: Path, capsys: Run
) -> None:
    assert app.main([*small, "-p", "a", "--teacher", "--model", str(models / "any")]) == 2
    assert "is an any-step model, not a teacher" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def sampled(arguments: list[str], capsys: Run) -> dict[str, Any]:
    assert app.main([*arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_preview_is_refined_to_what_more_steps_would_have_given(small: list[str], capsys: Run) -> None:
    preview = sampled([*small, "-p", "a circle", "-p", "a square", "--preview", "--seed", "7"], capsys)
    assert [entry["nfe"] for entry in preview["samples"]] == [2, 2]
    plain = sampled([*small, "-p", "a square", "--nfe", "3", "--seed", "7"], capsys)
    one = Path(preview["out"]) / preview["samples"][1]["file"]
    runs = ["--runs", small[-1]]  # the recipe's changes come from the record
    refined = sampled(["sample", "--refine", str(one), "--nfe", "3", *runs], capsys)
    assert refined["settings"] == preview["settings"]
    assert [entry["noise"] for entry in refined["samples"]] == [preview["samples"][1]["noise"]]
    videos = [(Path(each["out"]) / each["samples"][0]["file"]).read_bytes() for each in (plain, refined)]
    assert videos[0] == videos[1]


def test_a_whole_sampling_is_refined_at_32_steps(small: list[str], capsys: Run) -> None:
    preview = sampled([*small, "-p", "a circle", "--preview", "--count", "2"], capsys)
    refined = sampled(["sample", "--refine", preview["out"], "--runs", small[-1]], capsys)
    assert [(entry["seed"], entry["nfe"]) for entry in refined["samples"]] == [(0, 32), (1, 32)]


def test_a_teachers_preview_is_refined_by_the_teacher(small: list[str], capsys: Run) -> None:
    preview = sampled([*small, "-p", "a circle", "--preview", "--teacher"], capsys)
    refined = sampled(["sample", "--refine", preview["out"], "--nfe", "3", "--runs", small[-1]], capsys)
    assert refined["guidance"] == preview["guidance"]
    assert refined["samples"][0]["file"].endswith("-steps3x2.mp4")


def damaged(preview: dict[str, Any], **changes: object) -> str:
    """The same sampling, its record changed."""
    file = Path(preview["out"]) / "samples.json"
    record = json.loads(file.read_text())
    record["samples"][0] |= changes
    file.write_text(json.dumps(record))
    return str(preview["out"])


def test_what_is_no_preview_is_not_refined(small: list[str], tmp_path: Path, capsys: Run) -> None:
    preview = sampled([*small, "-p", "a circle", "--preview"], capsys)
    for given, code, message in (
        (str(tmp_path), 2, "is not a directory of samples"),
        (str(tmp_path / "none.mp4"), 2, "is not a directory of samples"),
        (str(Path(preview["out"]) / "sheet.png"), 2, "does not say how sheet.png was sampled"),
        (damaged(preview, noise="other"), 1, "Seed 0 gives other noise here"),
    ):
        assert app.main(["sample", "--refine", given, "--runs", small[-1]]) == code
        error = capsys.readouterr().err
        assert message in error
        assert "hint: " in error


@pytest.mark.parametrize("name", ["../../../x", "/x", "..", "a/b", "x" * 300, "a\nb"])
def test_the_name_of_a_recorded_recipe_leads_nowhere_else(
    small: list[str], tmp_path: Path, capsys: Run, name: str
) -> None:
    preview = sampled([*small, "-p", "a circle", "--preview"], capsys)
    file = Path(preview["out"]) / "samples.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"recipe": {"name": name, "digest": ""}}))
    assert app.main(["sample", "--refine", preview["out"], "--nfe", "1", "--runs", small[-1]]) == 2
    assert "recipe.name" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("x")]


def test_a_budget_picks_the_steps(small: list[str], capsys: Run) -> None:
    assert app.main([*small, "-p", "a circle", "--latency-budget", "1000", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["samples"][0]["nfe"] == 50
    assert "50 steps take " in captured.err
    assert app.main([*small, "-p", "a circle", "--latency-budget", "1e-6"]) == 1
    assert "more than the 1e-06 s allowed" in capsys.readouterr().err


def test_doctor_ends_with_1_where_something_is_in_the_way(tmp_path: Path, capsys: Run) -> None:
    given = ["doctor", "--runs", str(tmp_path), "--set", "model.teacher=/no/where"]
    assert app.main([*given, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is False
    assert {f["name"]: f["state"] for f in report["findings"]}["teacher"] == "stop"
    assert app.main(given) == 1
    out = capsys.readouterr().out
    assert "There is no model at /no/where." in out
    assert "hint: " in out


def test_doctor_ends_with_0_where_nothing_is(
    models: Path, tmp_path: Path, capsys: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anyflow_cli import doctor

    ready = doctor.Finding("built-in models", "ok", "there")
    monkeypatch.setattr(doctor, "built_in_models", lambda: ready)
    monkeypatch.setattr(
        doctor, "packages", lambda: doctor.Finding("packages", "note", "a checkout", "install")
    )
    given = ["--runs", str(tmp_path), "--set", f"model.teacher={models / 'wan'}"]
    assert app.main(["doctor", *given]) == 0
    assert "hint: install" in capsys.readouterr().out


# --- causal models


@pytest.fixture
def far(models: Path, small: list[str]) -> list[str]:
    """The command with a causal model, at a size that its compressed patches divide."""
    from anyflow_cli.model.causal import causal_from
    from anyflow_cli.model.config import CausalConfig

    if not (models / "far").exists():
        network = causal_from(load_network(models / "any"), CausalConfig(full_chunks=2, partition=(1, 1, 1)))
        save_pipeline(models / "far", network, models / "wan", {})
    return [*small, "--set", "model.frames=9", "-p", "a circle", "--nfe", "1", "--model", str(models / "far")]


def picture(path: Path, height: int = 48, width: int = 64) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_picture_begins_a_video(far: list[str], tmp_path: Path, capsys: Run) -> None:
    given = ["--image", str(picture(tmp_path / "first.png")), "--nfe", "3:1", "--json"]
    assert app.main([*far, *given]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["given"]["frames"], result["samples"][0]["nfe"]) == (1, [3, 1])
    assert result["samples"][0]["file"].endswith("-steps3-1.mp4")
    assert "first.png: scaled and cropped from 48x64 to 32x32." in captured.err
    with Image.open(Path(result["out"]) / "sheet.png") as sheet:
        assert LIGHT_SHEET.border in {
            colour for _, colour in sheet.getcolors(sheet.width * sheet.height) or ()
        }


def test_a_video_is_continued(far: list[str], tmp_path: Path, capsys: Run) -> None:
    clip = tmp_path / "start.mp4"
    write_mp4(clip, np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), np.uint8), 8)
    assert (
        app.main([*far, "--set", "model.fps=8", "--video", str(clip), "--video-frames", "6", "--json"]) == 0
    )
    captured = capsys.readouterr()
    assert json.loads(captured.out)["given"]["frames"] == 5
    assert "first 5 of 6 frames used" in captured.err


def test_a_continued_video_is_refined_with_its_frames_and_its_prompts(
    far: list[str], tmp_path: Path, capsys: Run
) -> None:
    image = picture(tmp_path / "first.png")
    given = ["--image", str(image), "--then", "5: a square", "--stream"]
    steps = far.index("--nfe")
    preview = sampled([*far[:steps], *far[steps + 2 :], *given, "--preview"], capsys)
    plain = sampled([*far, *given, "--nfe", "3:2"], capsys)
    again = ["sample", "--refine", preview["out"], "--stream", "--runs", str(tmp_path / "runs")]
    refined = sampled([*again, "--nfe", "3:2"], capsys)
    videos = [(Path(each["out"]) / each["samples"][0]["file"]).read_bytes() for each in (plain, refined)]
    assert videos[0] == videos[1]
    picture(image, height=64)
    assert app.main(again) == 1
    assert "first.png has changed" in capsys.readouterr().err


def test_a_causal_recipe_goes_on_beyond_its_trained_length(
    far: list[str], tmp_path: Path, capsys: Run
) -> None:
    causal = ["--set", "model.causal.partition=[1, 1, 1]", "--frames", "21"]
    steps = far.index("--nfe")
    preview = sampled([*far[:steps], *far[steps + 2 :], *causal, "--preview"], capsys)
    again = ["sample", "--refine", preview["out"], "--nfe", "3", "--runs", str(tmp_path / "runs")]
    assert preview["settings"]["frames"] == sampled(again, capsys)["settings"]["frames"] == 21


def test_a_long_video_of_two_prompts_is_recorded(far: list[str], capsys: Run) -> None:
    assert app.main([*far, "--frames", "21", "--then", "9: a square", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["settings"]["frames"] == 21
    assert result["then"] == [[9, "a square"]]


def test_streamed_videos_are_those_of_a_plain_sampling(far: list[str], capsys: Run) -> None:
    results = []
    for extra in (["--set", "sample.batch_size=1"], ["--stream"]):
        assert app.main([*far, "--count", "2", "--json", *extra]) == 0
        captured = capsys.readouterr()
        results.append(json.loads(captured.out))
    plain, streamed = results
    shown = [entry["file"] for entry in streamed["samples"]]
    assert shown == [entry["file"] for entry in plain["samples"]]
    assert files(Path(streamed["out"])) == {"samples.json", "sheet.png", *shown}
    sheets = [(Path(result["out"]) / "sheet.png").read_bytes() for result in results]
    assert sheets[0] == sheets[1]
    seconds, frames = zip(*streamed["samples"][0]["parts"], strict=True)
    assert frames == (1, 5, 9)
    assert 0 < streamed["samples"][0]["first_frame_seconds"] == seconds[0] < seconds[1] < seconds[2]
    assert captured.err.count("first frame after") == 2


def test_a_video_is_sent_to_a_player(
    far: list[str], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert app.main([*far, "--stream", "--out", "-"]) == 0
    captured = capfdbinary.readouterr()
    (tmp_path / "played.mp4").write_bytes(captured.out)
    played = read_start(tmp_path / "played.mp4", ClipFormat(100, 16, 32, 32)).pixels
    assert played.shape == (9, 32, 32, 3)
    assert b"First frame after" in captured.err
    assert not (tmp_path / "runs").exists()


def test_a_player_that_goes_away_is_one_sentence(
    far: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("anyflow_cli.sample.streaming.STDOUT", writing)
    assert app.main([*far, "--stream", "--out", "-"]) == 1
    assert "The player closed the stream" in capfd.readouterr().err
    os.close(writing)


def test_a_video_shorter_than_asked_for_is_said_and_continued(
    far: list[str], tmp_path: Path, capsys: Run
) -> None:
    clip = tmp_path / "start.mp4"
    write_mp4(clip, np.zeros((2, 32, 32, 3), np.uint8), 16)
    assert app.main([*far, "--video", str(clip), "--video-frames", "5", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["given"]["frames"] == 1
    assert "has 2 frames, fewer than the 5 requested" in captured.err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--image", "{picture}", "--video", "{picture}"], "both say what a video starts with"),
        (["--image", "{missing}"], "is not a file"),
        (["--image", "{text}"], "unreadable"),
        (["--video", "{text}"], "unreadable"),
        (["--video-frames", "5"], "needs --video"),
        (["--image", "{picture}", "--model", "{bidirectional}"], "makes videos from text alone"),
        (["--nfe", "2:1", "--model", "{bidirectional}"], "bidirectional"),
        (["--then", "5: a square", "--model", "{bidirectional}"], "bidirectional"),
        (["--stream", "--model", "{bidirectional}"], "bidirectional"),
        (["--stream", "--out", "-", "--model", "{bidirectional}"], "bidirectional"),
        (["--out", "-"], "--out - needs --stream"),
        (["--stream", "--out", "-", "--count", "2"], "Standard output cannot take 2 videos"),
        (["--stream", "--out", "-", "--json"], "cannot take a video and JSON"),
    ],
)
def test_a_beginning_that_cannot_be_used_is_one_sentence(
    far: list[str], models: Path, tmp_path: Path, given: list[str], message: str, capsys: Run
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    places = {
        "picture": picture(tmp_path / "first.png"), "missing": tmp_path / "missing",
        "text": tmp_path / "text.png", "bidirectional": models / "any",
    }  # fmt: skip
    assert app.main([*far, *(part.format(**places) for part in given)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "hint:" in error
    assert not (tmp_path / "runs").exists()
