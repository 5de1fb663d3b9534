"""Everything that anyflow reads from outside, as targets of the fuzzer: how it is made and how it is read."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from anyflow_cli.data.clips import list_clips
from anyflow_cli.data.dataset import LatentData
from anyflow_cli.data.prompts import read_prompts
from anyflow_cli.data.shards import Manifest, parse_manifest, read_manifest, read_shard_record, shard_path
from anyflow_cli.data.verify import verify
from anyflow_cli.data.video import (
    ClipFormat,
    UnusableClipError,
    decoding_error,
    read_image,
    read_start,
    write_mp4,
)
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.evaluate.compare import compare, read_side
from anyflow_cli.evaluate.report.page import render_page, write_results
from anyflow_cli.evaluate.run import run_evaluation
from anyflow_cli.evaluate.store import EvaluationDirectory
from anyflow_cli.evaluate.suite import SuiteClip, VideoScore
from anyflow_cli.evaluate.vbench.dimensions import FLICKERING
from anyflow_cli.evaluate.vbench.prompts import read_prompts_of
from anyflow_cli.evaluate.vbench.suite import VBenchSuite
from anyflow_cli.model import pipeline_io
from anyflow_cli.model.encoders import TextEncoder, VideoVAE
from anyflow_cli.model.experts import network_from
from anyflow_cli.model.folder_check import check_folder
from anyflow_cli.model.layouts.components import open_component
from anyflow_cli.model.lora import LoraSize
from anyflow_cli.model.lora_formats import LoraMerged, LoraRequest
from anyflow_cli.model.network import two_time_from
from anyflow_cli.model.pipeline_io import (
    load_adapter,
    load_network,
    read_shift,
    resolve_pipeline,
    save_adapter,
    save_pipeline,
)
from anyflow_cli.recipe.compare import dump
from anyflow_cli.recipe.load import load_recipe
from anyflow_cli.runs.checkpoint import load, newest, trained_weights
from anyflow_cli.runs.lineage import begin_run, check_run, run_of
from anyflow_cli.runs.open import describe, open_model
from anyflow_cli.utils.files import write_json
from tests.data import datasets
from tests.evaluate.drawn import Drawn, make_job
from tests.evaluate.vbench.stand_in import Answers, environment
from tests.evaluate.vbench.test_suite_vbench import prompt_of
from tests.fuzz.harness import Target, run
from tests.model.helpers import ours, theirs
from tests.model.layouts import test_components as original
from tests.model.layouts import written
from tests.model.layouts.written import EXACT, QUANTIZED
from tests.model.test_lora_formats import FAMILIES, pairs
from tests.tiny_pipeline import make_wan_folder
from tests.train import stage
from tests.train.small import sharded_checkpoint, trainer

FORMAT = ClipFormat(5, 8, 16, 16)
TEMPORARY = tempfile.gettempdir()  # outside of any arena
CSV, JSONL = "captions.csv", "metadata.jsonl"
PROMPTS = ("a red circle", 'a "large" square, moving', "ein Dreieck über Grün")


@cache
def shared() -> Path:
    """A directory with a teacher, ``wan``, and an any-step model, ``any``; nothing may write there."""
    directory = Path(tempfile.mkdtemp(prefix="anyflow-fuzz-", dir=TEMPORARY))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    wan = make_wan_folder(directory / "wan")
    save_pipeline(directory / "any", two_time_from(load_network(wan)), wan, {})
    return directory


def small(*command: str, model: Path | None = None) -> list[str]:
    """A command with the default recipe made small."""
    values = {
        "model.teacher": shared() / "wan", "model.pretrained_any_step": model or shared() / "any",
        "model.precision": "fp32", "model.height": 32, "model.width": 32, "model.frames": 5,
        "sample.teacher_steps": 2,
    }  # fmt: skip
    return [*command, *(part for key, value in values.items() for part in ("--set", f"{key}={value}"))]


def each(*uses: Callable[[Path], object]) -> Callable[[Path], object]:
    """Read a thing in several ways; all are tried, and the first refusal is raised."""

    def use(thing: Path) -> int:
        refused: AnyflowError | None = None
        for one in uses:
            try:
                if isinstance(code := one(thing), int) and code:
                    refused = refused or UsageError("The command refused it.", "See above.")
            except AnyflowError as error:
                refused = refused or error
        if refused is not None:
            raise refused
        return 0

    return use


# --- recipes and prompts


def make_recipe_file(thing: Path) -> None:
    (thing / "base.yaml").write_text("extends: tiny\ntrain_flowmap:\n  steps: 5\n")
    content = dump(load_recipe("tiny")).replace("name: tiny", "name: mine\nextends: ./base.yaml")
    (thing / "mine.yaml").write_text(content)


def validate(thing: Path) -> object:
    return run("recipes", "validate", str(thing / "mine.yaml"))


def make_assignments(thing: Path) -> None:
    lines = (
        "sample.nfe=[1, 2]", "model.frames=5", "distill.optimizer.betas=[0.9, 0.99]", "data.path=data",
        "model.lora={rank: 4, alpha: 4.0}", "name=mine", "model.negative_prompt=blurred",
    )  # fmt: skip
    (thing / "lines.set").write_text("\n".join(lines))


def use_assignments(thing: Path) -> object:
    file = thing / "lines.set"
    lines = file.read_text("utf-8", "surrogateescape").split("\n") if file.is_file() else ["x"]
    return run("recipes", "show", "tiny", *(part for line in lines for part in ("--set", line)))


def make_prompts(thing: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (thing / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    quoted = (prompt.replace('"', '""') for prompt in PROMPTS)
    (thing / "p.csv").write_text("id,caption\n" + "".join(f'{n},"{p}"\n' for n, p in enumerate(quoted)))
    (thing / "p.jsonl").write_text("".join(json.dumps({"prompt": p, "id": 1}) + "\n" for p in PROMPTS))
    parquet.write_table(pyarrow.table({"prompt": PROMPTS, "id": [1, 2, 3]}), thing / "p.parquet")


def use_prompts(thing: Path) -> None:
    for name in ("p.txt", "p.csv", "p.jsonl", "p.parquet"):
        read_prompts(thing / name)


def sample_prompts(thing: Path) -> object:
    files = sorted(thing.iterdir())
    codes = [run(*small("sample", "--prompts", str(file), "--dry-run")) for file in files]
    return max(codes, default=2)


WORDS = (
    ("sample", "--nfe", "1,2", "--seed", "5", "--count", "2", "--frames", "5", "--prompt", "a circle"),
    ("sample", "--then", "3: a square", "--latency-budget", "1.5", "--prompt", "a circle"),
    ("sample", "--model", "tiny-anyflow", "--out", "new", "--recipe", "tiny", "--sampler", "euler"),
    ("synthesize", "--count", "3", "--out", "data", "--previews", "2", "--runs", "runs"),
    ("train-flowmap", "--steps", "5", "--objective", "flow-matching", "--nproc", "1", "--seed", "0"),
    ("evaluate", "--nfe", "1,2", "--limit", "4", "--suite", "shapes", "--task", "t2v", "--fail-below", "5"),
    ("export", "--out", "new", "--format", "merged", "--dtype", "bf16", "--model", "tiny-anyflow"),
)  # fmt: skip


def make_words(thing: Path) -> None:
    for number, words in enumerate(WORDS):
        (thing / f"{number}.txt").write_text("\n".join(words))


def use_words(thing: Path) -> object:
    """Run the commands of which a word has changed; only values of options can change, not which they are."""
    code = 0
    for number, words in enumerate(WORDS):
        file = thing / f"{number}.txt"
        lines = file.read_text("utf-8", "surrogateescape").split("\n") if file.is_file() else []
        if tuple(lines) != words:
            paired = enumerate(zip(words, lines, strict=False))
            values = [new if at in range(2, 99, 2) else old for at, (old, new) in paired]
            code = run(*values, *words[len(values) :], "--dry-run")
    return code


# --- data sets


def make_data_set(thing: Path) -> None:
    datasets.make_data(thing / "d", count=6, size=2)
    write_json(thing / "d" / "provenance.json", {"seed": 0})


def meaning(directory: Path) -> Manifest:
    """A manifest without the one fact that it may lack."""
    return replace(parse_manifest(directory), negative_sha256=None)


@cache
def sound_meaning() -> Manifest:
    with tempfile.TemporaryDirectory() as directory:
        make_data_set(Path(directory))
        return meaning(Path(directory, "d"))


def verify_sees_it(thing: Path) -> None:
    """Verify a data set; a mutant that passes must mean what the sound one does."""
    problems = verify(thing / "d").problems
    if problems:
        raise UsageError(problems[0], "-")
    assert meaning(thing / "d") == sound_meaning(), "verify sees no problem"


def verify_data_set(thing: Path) -> object:
    return run("synthesize", "--verify", "--out", str(thing / "d"))


use_data_set = each(
    lambda thing: read_manifest(thing / "d"),
    lambda thing: [read_shard_record(shard_path(thing / "d", number)) for number in range(3)],
    lambda thing: LatentData(thing / "d", 8).batch(range(6)),
    lambda thing: LatentData(thing / "d", 8).negative,
    verify_sees_it,
)


# --- runs


def make_run(thing: Path) -> None:
    trainer(thing / "run", "on-policy", lora=True, steps=2, log_every=1).run()


def resume(thing: Path) -> None:
    """Take the run up as the next start would."""
    trainer(thing / "run", "on-policy", lora=True, steps=4, log_every=1).resume()


def use_sharded(thing: Path) -> None:
    (checkpoint,) = (thing / "checkpoints").iterdir()
    load(checkpoint)
    trained_weights(checkpoint)


@cache
def stage_data() -> Path:
    return stage.make_data(shared() / "data")


def make_stage(thing: Path) -> None:
    recipe = stage.make_recipe(shared() / "wan", stage_data())
    stage.train(recipe, stage.inputs_of("train-flowmap", recipe, stage.paths(thing)))


def use_stage(thing: Path) -> None:
    recipe = stage.make_recipe(shared() / "wan", stage_data())
    inputs = stage.inputs_of("train-flowmap", recipe, stage.paths(thing))
    checkpoint = newest(inputs.directory / "checkpoints")
    if checkpoint is None:
        raise UsageError("No checkpoint is left.", "-")
    begin_run(recipe, inputs, "fp32", 1)
    check_run(recipe, inputs)
    run_of(checkpoint)
    describe(str(checkpoint), recipe)
    open_model(str(checkpoint), recipe)


def inspect_stage(thing: Path) -> object:
    return run("inspect", str(thing / "runs" / "test" / "train-flowmap"))


# --- models


def make_model(thing: Path) -> None:
    """A pipeline with a sharded transformer, and an adapter beside it."""
    with mock.patch.object(pipeline_io, "SHARD_BYTES", 40_000):
        save_pipeline(thing / "model", load_network(shared() / "any"), shared() / "wan", {})
    pair = {"A": torch.ones(4, 32), "B": torch.ones(32, 4)}
    weights = {f"blocks.0.attn1.to_q.lora_{side}.weight": value for side, value in pair.items()}
    save_adapter(thing / "model" / "adapter", weights, LoraSize(4, 8), "base")


def use_text(thing: Path) -> None:
    TextEncoder.load(thing / "model").encode(["a red circle"], 8)


def use_vae(thing: Path) -> None:
    vae = VideoVAE.load(thing / "model")
    vae.decode(torch.zeros(1, 1, vae.channels, 2, 2))
    vae.encode(torch.zeros(1, 1, 3, *(2 * vae.spatial_factor,) * 2))


def use_network(thing: Path) -> None:
    loaded = load_network(thing / "model")
    channels, width = loaded.config.in_channels, loaded.config.text_dim
    loaded(torch.zeros(1, 1, channels, 4, 4), torch.ones(1), torch.ones(1), torch.zeros(1, 3, width))


def export_model(thing: Path) -> None:
    save_pipeline(thing / "export", load_network(thing / "model"), thing / "model", {}, replace=True)


def check_model(folder: Path) -> int:
    """Check headers alone; every problem is one line."""
    problems = check_folder(folder)
    assert not any("\n" in problem for problem in problems), problems
    return 2 if problems else 0


def inspect_model(thing: Path) -> object:
    return run("inspect", str(thing / "model"))


def sample_model(thing: Path) -> object:
    given = ["-p", "a circle", "--nfe", "1", "--out", str(thing / "out")]
    return run(*small("sample", "--model", str(thing / "model"), *given))


def make_layout(layout: str) -> Callable[[Path], None]:
    """One of the layouts of other projects."""

    def make(thing: Path) -> None:
        write = (EXACT | QUANTIZED)[layout]
        with torch.no_grad():
            write(thing, {name: t.detach().clone() for name, t in written.reference().state_dict().items()})

    return make


def use_layout(thing: Path) -> None:
    found = sorted(thing.iterdir())
    if not found:
        raise UsageError("It is gone.", "-")
    network = load_network(resolve_pipeline(str(found[0])))
    channels, width = network.config.in_channels, network.config.text_dim
    network(torch.zeros(1, 1, channels, 4, 4), torch.ones(1), torch.ones(1), torch.zeros(1, 3, width))


def inspect_layout(thing: Path) -> object:
    return run("inspect", str(next(iter(sorted(thing.iterdir())), thing)))


def make_components(thing: Path) -> None:
    vae, encoder = original.vae(z_dim=16), original.text_encoder()
    save_file(original.original_vae(vae.state_dict()), thing / "vae.safetensors")
    torch.save(original.original_text_encoder(encoder.state_dict()), thing / "t5.pth")
    save_file(original.comfy_text_encoder(encoder.state_dict()), thing / "t5.safetensors")


use_components = each(
    lambda thing: open_component(thing / "vae.safetensors").load(torch.float32),
    lambda thing: open_component(thing / "t5.pth").load(torch.float32),
    lambda thing: open_component(thing / "t5.safetensors").load(torch.float32),
)


def make_loras(thing: Path) -> None:
    made = pairs(ours(theirs("WanTransformer3DModel")))
    for family in ("diffusers", "musubi", "bare"):
        save_file(FAMILIES[family][0](made), thing / f"{family}.safetensors")
    torch.save(FAMILIES["ComfyUI"][0](made), thing / "comfy.pt")


def use_loras(thing: Path) -> None:
    names = ("diffusers.safetensors", "musubi.safetensors", "bare.safetensors", "comfy.pt")
    base = ours(theirs("WanTransformer3DModel"))
    for name in names:
        network_from(LoraMerged.of(base, [LoraRequest(thing / name, 0.5)]))


# --- samples and evaluations


def make_samples(thing: Path) -> None:
    prompts = ("-p", "a circle", "-p", "a square")
    assert run(*small("sample", *prompts, "--preview", "--out", str(thing / "samples"))) == 0


def refine(thing: Path) -> object:
    return run("sample", "--refine", str(thing / "samples"), "--dry-run", "--runs", str(thing / "runs"))


def evaluation(thing: Path) -> Any:
    return make_job(thing / "root", nfe=(1,), prompts=2, teacher=False, kind="AnyFlowFAR")


def make_evaluation(thing: Path) -> None:
    job = evaluation(thing)
    write_results(run_evaluation(job, Drawn().open), job.protocol.suite, job.out)


def use_scores(thing: Path) -> None:
    job = evaluation(thing)
    render_page(run_evaluation(job, Drawn().open), job.protocol.suite)


def use_results(thing: Path) -> None:
    job = evaluation(thing)
    compare(job.protocol.suite, *[read_side(job.out)] * 2)


def compare_results(thing: Path) -> object:
    return run("evaluate", "--compare", *[str(thing / "root" / "out")] * 2)


REPORTS = {"scores.md": b"1", "results.json": b"{}"}


def make_reports(thing: Path) -> None:
    EvaluationDirectory(thing / "out").write(REPORTS)


def make_benchmark(thing: Path) -> None:
    entries = [
        {"prompt_en": f"a bench {n}", "dimension": ["scene"], "auxiliary_info": {"scene": "x"}}
        | {"image_name": "a.jpg"}
        for n in range(3)
    ]
    (thing / "full_info.json").write_text(json.dumps(entries))
    (thing / "augmented.json").write_text(json.dumps([e | {"aug_prompt_en": "long"} for e in entries]))


def read_augmented(thing: Path) -> None:
    read_prompts_of(thing / "full_info.json", str(thing / "augmented.json"))


def assess(thing: Path) -> None:
    suite = VBenchSuite("vbench", (prompt_of(0, FLICKERING),), environment(thing), thing / "none")
    with mock.patch("anyflow_cli.evaluate.vbench.suite.run_jobs", Answers()):
        suite.assess([SuiteClip(0, thing / "0.mp4", VideoScore({}))], thing)


def make_answers(thing: Path) -> None:
    (thing / "0.mp4").write_text("video")
    assess(thing)


# --- pictures and videos


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def make_pictures(thing: Path) -> None:
    for name, mode in (
        ("a.png", "RGB"),
        ("b.png", "RGBA"),
        ("c.png", "P"),
        ("d.jpg", "RGB"),
        ("e.webp", "RGB"),
    ):
        Image.fromarray(noise(24, 32, 3)).convert(mode).save(thing / name)


def of_clip(read: Callable[[], object]) -> None:
    """Read a clip or a picture; callers name the file and add a hint."""
    try:
        read()
    except UnusableClipError as error:
        raise UsageError(error.message, "Leave it out.") from error


def use_pictures(thing: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "d.jpg", "e.webp"):
        of_clip(partial(read_image, thing / name, FORMAT))


def sample_picture(thing: Path) -> object:
    codes = [
        run(*small("sample", "-p", "a", "--image", str(file), "--dry-run"))
        for file in sorted(thing.iterdir())
    ]
    return max(codes, default=2)


def make_video(thing: Path) -> None:
    write_mp4(thing / "a.mp4", noise(9, 32, 32, 3), 8)


def make_gif(thing: Path) -> None:
    frames = [Image.fromarray(frame) for frame in noise(9, 32, 32, 3)]
    frames[0].save(thing / "a.gif", save_all=True, append_images=frames[1:], duration=120)


def use_video(thing: Path) -> None:
    file = next(iter(thing.iterdir()), thing / "none.mp4")
    decoding_error(file)
    of_clip(lambda: read_start(file, FORMAT))


def sample_video(thing: Path) -> object:
    return run(*small("sample", "-p", "a", "--video", str(thing / "a.mp4"), "--dry-run"))


def make_clips(thing: Path, table: str = "") -> None:
    for number in range(3):
        write_mp4(thing / f"{number}.mp4", noise(5, 32, 32, 3), 8)
        (thing / f"{number}.txt").write_text(f"clip {number}")
    if table == CSV:
        (thing / table).write_text("file,caption\n0.mp4,a\n1.mp4,b\n2.mp4,c\n")
    elif table:
        rows = [{"file_name": f"{n}.mp4", "text": "a"} for n in range(3)]
        (thing / table).write_text("".join(json.dumps(row) + "\n" for row in rows))


def encode_clips(thing: Path) -> object:
    given = ("--set", "model.frames=5", "--dry-run", "--runs", "runs")
    return run(*small("synthesize", "--from-videos", str(thing), *given))


def make_external(thing: Path) -> None:
    job = evaluation(thing / "job")
    for number, prompt in enumerate(job.protocol.prompts):
        write_mp4(thing / "videos" / f"{number}.mp4", noise(33, 64, 64, 3), 16)
        (thing / "videos" / f"{number}.txt").write_text(prompt)


def use_external(thing: Path) -> None:
    from anyflow_cli.evaluate.external_videos import prepare_external

    job = evaluation(thing / "job")
    prepare_external(job.recipe, job.protocol, thing / "videos", thing / "out")


TARGETS: Sequence[Target] = (
    Target("recipe", make_recipe_file, lambda at: load_recipe(str(at / "mine.yaml")), share=12),
    Target("recipe, command", make_recipe_file, validate, share=2),
    Target("--set", make_assignments, use_assignments, share=3),
    Target("options", make_words, use_words, share=3),
    Target("prompts", make_prompts, use_prompts, share=40),
    Target("prompts, command", make_prompts, sample_prompts, share=1),
    Target("data set: JSON", make_data_set, use_data_set, "d/*.json", share=16),
    Target("data set: shards and index", make_data_set, use_data_set, "d/*[!n]", share=16),
    Target("data set, command", make_data_set, verify_data_set, share=2),
    Target("checkpoint", make_run, resume, "run/checkpoints/step-*/*",
           writes=("thing/run/metrics.jsonl",), share=3),
    Target("checkpoint, sharded", sharded_checkpoint, use_sharded, "checkpoints/**/*", share=1),
    Target("metrics.jsonl", make_run, resume, "run/metrics.jsonl",
           writes=("thing/run/metrics.jsonl",), share=1),
    Target("lineage and recipe of a run", make_stage, use_stage, "runs/test/train-flowmap/[lr]*", share=3),
    Target("run, inspected", make_stage, inspect_stage, "runs/test/train-flowmap/**/*", share=2),
    Target("model: text encoder", make_model, use_text, "model/text_encoder/*", share=20),
    Target("model: tokenizer", make_model, use_text, "model/tokenizer/*", share=20),
    Target("model: VAE", make_model, use_vae, "model/vae/*", share=14),
    Target("model: transformer", make_model, use_network, "model/transformer/*", share=16),
    Target("model: index and scheduler", make_model, each(export_model, lambda at: read_shift(at / "model")),
           "model/[ms]*/*.json", writes=("thing/export*", "thing/.export*"), share=2),
    Target("model: all headers", make_model, lambda at: check_model(at / "model"), "model/**/*", share=4),
    Target("model: adapter", make_model, lambda at: load_adapter(at / "model" / "adapter"),
           "model/adapter/*", share=20),
    Target("model, inspected", make_model, inspect_model, "model/**/*", share=2),
    Target("model, sampled", make_model, sample_model, "model/**/*", writes=("thing/out*",), share=1),
    *(
        Target(f"weights: {layout}", make_layout(layout), use_layout, share=2)
        for layout in (
            "original folder, sharded", "original file", "diffusers file", "original .pth",
            "original .pth of old torch", "Self-Forcing", "fp8",
        )
    ),
    Target("weights, inspected", make_layout("ComfyUI"), inspect_layout, share=2),
    Target("weights: VAE and text encoder", make_components, use_components, share=1),
    Target("LoRA files", make_loras, use_loras, share=3),
    Target("samples.json", make_samples, refine, "samples/samples.json", share=3),
    Target("scores.jsonl", make_evaluation, use_scores, "root/out/*/scores.jsonl",
           writes=("thing/root/out*",), share=1),
    Target("results.json", make_evaluation, use_results, "root/out/results.json", share=2),
    Target("results.json, command", make_evaluation, compare_results, "root/out/results.json", share=1,
           writes=("runs*",)),
    Target("marker of reports", make_reports, lambda at: EvaluationDirectory(at / "out").write(REPORTS),
           "out/.*", writes=("thing/out*",), share=12),
    Target("VBench prompts", make_benchmark, lambda at: read_prompts_of(at / "full_info.json"),
           "full_info.json", share=12),
    Target("VBench prompts, augmented", make_benchmark, read_augmented, share=12),
    Target("VBench answers", make_answers, assess, "vbench/*.json", writes=("thing/vbench*",), share=16),
    Target("pictures", make_pictures, use_pictures, share=40),
    Target("pictures, command", make_pictures, sample_picture, share=1),
    Target("video: mp4", make_video, use_video, share=2),
    Target("video: gif", make_gif, use_video, share=2),
    Target("video, command", make_video, sample_video, share=1),
    Target("clips with captions", make_clips, list_clips, share=20),
    Target("clips with a csv table", partial(make_clips, table=CSV), list_clips, "*[!4]", share=20),
    Target("clips with a jsonl table", partial(make_clips, table=JSONL), list_clips, "*[!4]", share=20),
    Target("clips, command", partial(make_clips, table=CSV), encode_clips, share=1),
    Target("external videos", make_external, use_external, "videos/*", share=1),
)  # fmt: skip


def cases_of(targets: Sequence[Target], cases: int) -> dict[str, int]:
    """Cases of each target by its share, in all exactly ``cases``."""
    total, given = sum(target.share for target in targets), 0
    found: dict[str, int] = {}
    for target in targets:
        given += target.share
        found[target.name] = cases * given // total - sum(found.values())
    return found
